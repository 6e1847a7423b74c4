"""The callbacks that observe a training, as `cfg.callbacks` asks for."""

from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig
from torch import Tensor

from clipsae.clip import FrozenCLIP
from clipsae.data import ImageDataset
from clipsae.data.loader import image_batches
from clipsae.evaluation.passes import evenly_spaced
from clipsae.store import Store
from clipsae.tasks import build
from clipsae.tasks.stages import classifier
from clipsae.training.predictions import Predictions
from clipsae.visualization.watch import ReferenceSheets


def callbacks(
    cfg: DictConfig, store: Store, clip: FrozenCLIP, held_out: ImageDataset
) -> list[Callback]:
    """Those that are asked for and possible. They read held-out images of what the SAE is trained
    on: datasets that share an SAE find the same curves, whoever trains it.

    Args:
        held_out: the test split of the training dataset.
    """
    name = cfg.train_dataset.name
    options, found = cfg.callbacks, []
    if options.prediction_images and clip.has_text:
        indices = evenly_spaced(held_out.labels, options.prediction_images)
        images, labels = build.user_error(read, held_out, indices)
        classes = classifier.embeddings(cfg, store, clip, held_out, name)
        found.append(Predictions(clip, images, labels, classes))
    if options.reference_sheet_every_n_steps:
        found.append(
            ReferenceSheets(
                clip,
                held_out,
                name=name,
                split="test",
                images=options.reference_sheet_images,
                every_n_steps=options.reference_sheet_every_n_steps,
                batch_size=cfg.evaluation.batch_size,
            )
        )
    return found


def read(dataset: ImageDataset, indices: list[int]) -> tuple[Tensor, Tensor]:
    """Images uint8 [B, 3, S, S] and their labels [B], without those that may be skipped.

    Raises:
        ValueError: none of them can be read, or one that may not be skipped.
    """
    for images, labels, _ in image_batches(dataset, len(indices), 0, indices):
        return images, labels
    raise ValueError(f"none of {len(indices)} held-out images can be read")
