"""Real training steps: their time and memory, and whether this machine computes the right thing.

B images, T tokens of an image, d width, M latents.
"""

import copy
import statistics
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning import LightningDataModule, Trainer
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from clipsae.data.loader import Batch
from clipsae.sae import SAE
from clipsae.tasks import build, precision
from clipsae.tasks.check.jobs import on_one_device
from clipsae.tasks.stages.sae import MEMBER_OPTIONS, TRAINER_OPTIONS
from clipsae.training.density import set_density
from clipsae.training.module import SAEGroup, SAEModule

LEAST, MOST = 2, 1000  # steps that are timed
TRAINED_SHARE = 0.03  # of latents that are active after a training; tiny recipes aim at 20 of 512
TOKENS = 5  # that the float64 formula is computed on
# Largest distance of the gradients from those in float64, relative to their norm.
TOLERANCES = {"float32": 1e-4, "tf32": 3e-2, "bf16": 0.5}


@dataclass(frozen=True)
class Steps:
    """What steps of one SAE cost.

    Attributes:
        seconds: of a step, the median.
        taken: steps that were timed.
        gb: peak memory (10^9 bytes) of the device; on a CPU of the process.
        sae: after these steps, in training mode.
    """

    seconds: float
    taken: int
    gb: float
    sae: SAE


class _SameBatch(LightningDataModule):
    """One batch of tokens [B, T, d], again and again, with what of `SAE.needs` is needed: numbers
    of the right shape."""

    def __init__(self, tokens: Tensor, needs: Collection[str]) -> None:
        super().__init__()
        self.tokens = tokens
        self.more = needed(needs, tokens)

    def first_batch(self, images: int) -> Tensor:
        return self.tokens[:images]

    def first_batches(self, images: int) -> Iterator[Tensor]:
        yield self.tokens

    def train_dataloader(self) -> "_SameBatch":
        return self

    def __len__(self) -> int:
        return MOST

    def __iter__(self) -> Iterator[Batch]:
        for _ in range(MOST):
            yield {"tokens": self.tokens, **self.more} if self.more else self.tokens


class _Stopwatch(Callback):
    """Times each step and ends the fit after so many seconds.

    Args:
        share: of latents that are to be active; None: as initialised.
    """

    def __init__(self, share: float | None, seconds: float) -> None:
        self.share, self.seconds = share, seconds
        self.times: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: SAEGroup) -> None:
        if self.share is not None:
            set_density(pl_module.members[0].sae, trainer.datamodule.tokens, self.share)
        self.last = self.begun = now()

    def on_train_batch_end(self, trainer: Trainer, pl_module: SAEGroup, *args: Any) -> None:
        self.times.append(now() - self.last)
        self.last = now()
        if len(self.times) > LEAST and self.last - self.begun > self.seconds:
            trainer.should_stop = True


def needed(needs: Collection[str], tokens: Tensor) -> dict[str, Tensor]:
    """What of `SAE.needs` is needed beside tokens [B, T, d] or [B, d]: numbers of the right
    shape."""
    of_images = tokens[:, 0] if tokens.ndim == 3 else tokens
    more = {"target": tokens, "embeddings": nn.functional.normalize(of_images, dim=-1)}
    return {name: more[name] for name in needs}


def timed(cfg: DictConfig, tokens: Tensor, share: float | None, seconds: float) -> Steps:
    """Steps as `task=experiment` takes them, on one device and always on the same tokens.

    Args:
        tokens: of a batch, [B, T, d].
        share: of latents that are to be active; None: as initialised.
        seconds: for all of them; two at least are timed after a first one.
    """
    _forget_peak()
    watch = _Stopwatch(share, seconds)
    trainer = _trainer(cfg, [watch])
    lightning.seed_everything(cfg.seed, workers=True, verbose=False)
    # Single tokens are looked at, which a mean of positions does not take and which cost the same.
    anywhere = OmegaConf.merge(cfg, {"model": {"position_mean": False}})
    module = SAEModule(
        build.build_sae(anywhere, tokens.shape[-1]),
        # The rate is so small that the SAE stays what it is; penalties are whole from the start.
        **build.training_options(cfg) | {"learning_rate": 1e-12, "sparsity_warmup_steps": 0},
        gradient_clip_val=cfg.trainer.gradient_clip_val,
        max_steps=MOST,
    )
    trainer.fit(SAEGroup([module]), datamodule=_SameBatch(tokens, module.sae.needs))
    times = watch.times[1:]  # the first step allocates what the others use again
    return Steps(statistics.median(times), len(times), _peak_gb(), module.sae)


def _trainer(cfg: DictConfig, callbacks: list[Callback]) -> Trainer:
    options = build.plain(on_one_device(cfg).trainer)
    if cfg.trainer.accelerator == "cpu":
        options["accelerator"] = "cpu"
    return build.call_target(
        {k: v for k, v in options.items() if k not in MEMBER_OPTIONS},
        max_steps=MOST,
        logger=False,
        enable_checkpointing=False,
        callbacks=callbacks,
        precision=precision.of_lightning(cfg),
        **TRAINER_OPTIONS,
    )


def distance(cfg: DictConfig, sae: SAE, tokens: Tensor) -> float:
    """How far the gradients of a training step on one token are from those of the same formula in
    float64 on the CPU, all products dense, relative to the norm of these. The median of a few
    tokens: a latent at the threshold may be active in one and not in the other.

    Args:
        tokens: [B, T, d] on the SAE's device.
    """
    here, reference = copy.deepcopy(sae).train(), copy.deepcopy(sae).cpu().double().train()
    reference.architecture.dictionary = lambda: None  # dense
    forward = _trainer(cfg, []).precision_plugin.forward_context
    found = []
    for token in tokens[0, :: max(1, tokens.shape[1] // TOKENS)][:TOKENS].split(1):
        here.zero_grad()
        reference.zero_grad()
        with forward():
            loss = here(token, **needed(sae.needs, token)).loss
        loss.backward()
        wide = token.cpu().double()
        reference(wide, **needed(sae.needs, wide)).loss.backward()
        pairs = [
            (a.grad.cpu().double(), b.grad)
            for a, b in zip(here.parameters(), reference.parameters(), strict=True)
            if b.grad is not None
        ]
        between = sum((a - b).square().sum() for a, b in pairs)
        found.append(float((between / sum(b.square().sum() for _, b in pairs)).sqrt()))
    return statistics.median(found)


def now() -> float:
    """Seconds, the GPU's work included."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _forget_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins again
    except OSError:
        return


def _peak_gb() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(int(line.split()[1]) * 1024 / 1e9 for line in lines if line.startswith("VmHWM"))
