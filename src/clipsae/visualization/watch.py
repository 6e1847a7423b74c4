"""Reference images of the leading latents while an SAE is trained."""

from io import BytesIO
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Callback

from clipsae.clip import FrozenCLIP
from clipsae.data import ImageDataset
from clipsae.training.logging import log_picture
from clipsae.training.module import SAEGroup, SAEModule
from clipsae.visualization.collector import collect_references
from clipsae.visualization.figures import draw_sheet, leading_latents

_DOTS = 150  # of an inch


class ReferenceSheets(Callback):
    """Logs a sheet of the leading latents' reference images (`val/reference_images`) after a
    validation: a picture in W&B, a PNG beside the CSV file.

    It costs as much time as a validation pass over the images, and ten patch maps a latent (96 MB
    at M = 49,152 with 14 x 14 patches). In a training on several devices the first one does it.

    Args:
        dataset: held-out images.
        name, split: of the dataset, for the record.
        images: how many of them, evenly spaced over the classes.
        every_n_steps: at least so many steps lie between two sheets; 1: one at every validation.
        rows: latents on a sheet.
    """

    def __init__(
        self,
        clip: FrozenCLIP,
        dataset: ImageDataset,
        *,
        name: str,
        split: str,
        images: int = 256,
        every_n_steps: int = 1,
        rows: int = 8,
        batch_size: int = 32,
    ) -> None:
        self.clip = clip
        self.dataset = dataset
        self.options: dict[str, Any] = {"name": name, "split": split, "batch_size": batch_size}
        self.options |= {"limit_images": images, "sample": 0}
        self.every_n_steps = every_n_steps
        self.rows = rows
        self.last_step: dict[SAEModule, int] = {}

    def on_validation_end(self, trainer: Trainer, pl_module: SAEGroup) -> None:
        if trainer.is_global_zero:
            pl_module.each(lambda member: self._log(member, pl_module.device))

    def _log(self, member: SAEModule, device: torch.device) -> None:
        step, last = member.step, self.last_step.get(member)
        if member.run is None or (last is not None and step - last < self.every_n_steps):
            return
        self.last_step[member] = step
        saes = {"sae": member.sae}
        clip = self.clip if member.layer is None else self.clip.at(member.layer)
        found = collect_references(clip, saes, self.dataset, device=device, **self.options)
        references = found["sae"]
        latents = leading_latents(references, self.rows)
        figure = draw_sheet(references, latents, lambda i: self.dataset[i][0], f"step {step:,}")
        file = BytesIO()
        figure.savefig(file, format="png", dpi=_DOTS)
        log_picture(member.run, "val/reference_images", file.getvalue(), step)
