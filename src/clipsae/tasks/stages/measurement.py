"""Kind "measurement": how sparse, faithful and monosemantic an SAE is on a dataset (Tables 5, 6),
and with ground truth which concepts it found. `metrics.csv`, `latents.safetensors`,
`concepts.csv`, `config.yaml`."""

import logging
from pathlib import Path

import pandas as pd
from omegaconf import DictConfig
from safetensors.torch import save_file

from clipsae.clip import FrozenCLIP
from clipsae.data import ImageDataset
from clipsae.evaluation.metrics import (
    MeasureResult,
    check_measure_options,
    check_metrics,
    image_encoder,
    measure,
)
from clipsae.evaluation.metrics.truth import has_truth
from clipsae.evaluation.numbers import current_names
from clipsae.progress import Bar
from clipsae.sae import SAE
from clipsae.store import Stage, Store
from clipsae.tasks import build, together

log = logging.getLogger(__name__)


def encoder_name(cfg: DictConfig, dataset: ImageDataset) -> str | None:
    """The image encoder of MonoSemanticity; None: it is not measured.

    "auto" is the source's choice, OpenAI's ViT-B/32; in the built-in world the ground truth, or
    its own CLIP where there is none; nothing beside random CLIP weights.
    """
    name = cfg.measurement.image_encoder
    if name != "auto":
        return name
    if has_truth(dataset):
        return "attributes"
    if cfg.clip.pretrained is None:
        return None
    return "tiny" if cfg.clip.pretrained == "builtin" else "open_clip:ViT-B-32/openai"


def stage(cfg: DictConfig, store: Store, sae_stage: Stage, test_set: ImageDataset) -> Stage:
    """The place of the numbers."""
    key = {
        "sae": sae_stage.path.name,
        "dataset": build.dataset_key(cfg.dataset, test_set),
        "split": cfg.evaluation.split,
        "measurement": {
            **build.plain(cfg.measurement),
            "image_encoder": encoder_name(cfg, test_set),
            "limit_images": build.limit_images(cfg),
        },
    }
    name = [cfg.model.name, cfg.clip.name, cfg.dataset.name]
    return store.stage("measurement", [*name, f"s{cfg.seed}"], key, build.cell(cfg))


def check_options(cfg: DictConfig) -> None:
    """Refuse metrics that do not exist, whatever is measured.

    Raises:
        ConfigError: such a metric.
    """
    build.user_error(check_metrics, cfg.measurement.metrics)


def check(cfg: DictConfig, clip: FrozenCLIP, test_set: ImageDataset) -> None:
    """Refuse now what would be refused after the training.

    Raises:
        ConfigError: metrics or a pooling that do not exist, or lack what they need; an image
            encoder that cannot be had.
    """
    options = cfg.measurement
    name = encoder_name(cfg, test_set)
    metrics = build.user_error(
        check_measure_options,
        clip,
        test_set,
        metrics=options.metrics,
        image_encoder=name,
        pooling=options.pooling,
        sample_tokens=options.sample_tokens,
        sample_images=options.sample_images,
    )
    if "monosemanticity" in metrics:
        image_encoder(name, test_set)


def make(
    cfg: DictConfig,
    clip: FrozenCLIP,
    trained: Stage,
    test_set: ImageDataset,
    stage: Stage,
    folder: Path,
) -> None:
    """Measure a trained SAE and write the numbers into `folder`."""
    device = build.best_device()

    def measure_all(cells: dict[str, Path]) -> MeasureResult:
        with Bar(f"measuring {build.title(cfg, len(cells))}", stage.progress) as bar:
            return measure(
                clip.to(device),
                {name: SAE.load(path).to(device) for name, path in cells.items()},
                test_set,
                **build.plain(cfg.measurement) | {"image_encoder": encoder_name(cfg, test_set)},
                batch_size=cfg.evaluation.batch_size,
                num_workers=cfg.features.num_workers,
                device=device,
                limit_images=build.limit_images(cfg),
                progress=bar,
            )

    name, result = together.in_one_pass("measurement", cfg, trained.path, measure_all)
    about = {
        **build.cell(cfg),
        "images": result.images,
        "image_encoder": result.image_encoder,
        "pooling": result.pooling,
    }
    rows = [
        {**about, "metric": r["metric"], "value": r["value"]}
        for r in result.rows
        if r["sae"] == name
    ]
    pd.DataFrame(rows).to_csv(folder / "metrics.csv", index=False)
    if name in result.scores:
        scores = result.scores[name].contiguous()
        save_file({"monosemanticity": scores}, folder / "latents.safetensors")
    if name in result.recovery:
        concepts_table(result, name).to_csv(folder / "concepts.csv", index=False)
    build.save_config(cfg, folder)


def concepts_table(result: MeasureResult, name: str) -> pd.DataFrame:
    """Per level and concept the best latent by AUROC and by F1, and how many are good for it."""
    columns = ("positives", "auroc", "auroc_latent", "f1", "f1_latent", "latents")
    tables = [
        pd.DataFrame(
            {
                "level": level,
                "concept": result.concepts[level],
                **{column: found[column].tolist() for column in columns},
            }
        )
        for level, found in result.recovery[name].items()
    ]
    return pd.concat(tables)


def read(folder: Path) -> dict[str, float]:
    """The numbers of a finished measurement by name."""
    rows = pd.read_csv(folder / "metrics.csv")
    return current_names(dict(zip(rows.metric, rows.value, strict=True)))
