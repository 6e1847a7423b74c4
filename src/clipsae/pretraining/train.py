"""Pretraining of the built-in CLIP on rendered scenes.

A plain loop. Everything random is a function of (seed, step), and a checkpoint holds model,
optimizers and step, so that the same command continues where it was stopped and ends with the
same weights. Muon (Jordan 2024, "Muon: an optimizer for hidden layers") moves the matrices of
the blocks, AdamW the rest.

The first part is a supervised warm start, without which shape stays at chance for an hour:
scenes begin with one large object, and patches that an object covers are trained to name its
shape, colour and pattern, through the text tower like everything else, with a weight that falls
to zero.
"""

import functools
import logging
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.model import CLIP
from open_clip.pos_embed import get_2d_sincos_pos_embed
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import save_file
from torch import Tensor

from clipsae.clip import tiny
from clipsae.data.scenes import KINDS, ScenesDataset
from clipsae.data.scenes.dataset import patch_labels
from clipsae.data.scenes.renderer import patch_coverage, render
from clipsae.data.scenes.world import Distribution, Scenes, sample_scenes
from clipsae.pretraining.losses import scene_losses
from clipsae.sae.checks import one_of, whole
from clipsae.store import put_checkpoint, whole_checkpoint

log = logging.getLogger(__name__)

_STREAM = 0x79A1  # of scenes that no dataset shows
_PATCH_COVERAGE = 0.25  # a patch shows an object that covers this much of it


def _option(default: Any, help: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": help, **more})


@dataclass(frozen=True)
class PretrainConfig:
    """Options of the tool; lengths are in steps."""

    steps: int = _option(2000, "of batch_size scenes each; every scene is seen once")
    batch_size: int = _option(256, "scenes a step")
    curriculum_steps: int = _option(1000, "from one large object to several of both sizes")
    patch_steps: int = _option(2000, "in which patch_weight falls to zero")
    patch_weight: float = _option(1.0, "of the warm start's loss, on what a patch shows")
    counts: tuple[float, float, float] = _option(
        (0.7, 0.15, 0.15), "shares of scenes with one, two and three objects"
    )
    weights: dict[str, float] = field(
        default_factory=lambda: {
            **{"caption": 0.5, "shape": 2.0, "colour": 0.5, "pattern": 1.5, "size": 0.5},
            **{"shape_colour": 1.0, "position": 0.5, "background": 0.5, "count": 0.5},
        },
        metadata={"help": "of the losses: caption, and each kind of class"},
    )
    muon_lr: float = _option(0.02, "learning rate of the blocks' matrices")
    adamw_lr: float = _option(0.002, "learning rate of the rest")
    weight_decay: float = _option(0.1, "of Muon's matrices, times the learning rate")
    warmup_steps: int = _option(100, "of linear warm-up")
    cooldown: float = _option(0.4, "last share of the steps, in which the rates fall to zero")
    max_logit_scale: float = _option(100.0, "ceiling of exp(logit_scale), as in CLIP")
    precision: str = _option("bf16", "bf16 (autocast) or fp32")
    threads: int | None = _option(None, "of torch; torch's own choice if not given", type=int)
    log_every: int = _option(50, "steps between two lines of losses")
    checkpoint_every: int = _option(200, "steps between two checkpoints, with exported weights")
    evaluate_every: int = _option(400, "steps between two zero-shot classifications")
    evaluate_images: int = _option(512, "test scenes of each kind that are classified")

    def __post_init__(self) -> None:
        unknown = set(self.weights) ^ {"caption", *KINDS}
        if unknown:
            raise ValueError(f"weights must name caption and every kind once; see {unknown}")
        one_of("precision", self.precision, ("bf16", "fp32"))
        for name in ("curriculum_steps", "patch_steps", "warmup_steps"):
            whole(name, getattr(self, name), least=0)
        for name in ("steps", "batch_size", "log_every", "checkpoint_every", "evaluate_every"):
            whole(name, getattr(self, name))


# --- model and optimizers ---


def build_model(seed: int) -> CLIP:
    """The tiny CLIP with fresh weights, the patches' position embeddings set to sines."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = open_clip.create_model(tiny.register(), pretrained=None)
    visual = model.visual
    width, grid = visual.positional_embedding.shape[1], visual.grid_size[0]
    sines = get_2d_sincos_pos_embed(width, grid, cls_token=True)  # [1 + P, d]
    visual.positional_embedding.data.copy_(0.5 * torch.from_numpy(sines))
    return model


@functools.cache
def tokenizer() -> SimpleTokenizer:
    """The tiny CLIP's tokenizer: texts -> ids [n, 32]."""
    return open_clip.get_tokenizer(tiny.register())


def build_optimizers(model: CLIP, cfg: PretrainConfig) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices; AdamW for embeddings, norms, biases and projections."""
    named = list(model.named_parameters())
    matrices = [p for n, p in named if "resblocks" in n and p.ndim == 2]
    rest = [p for n, p in named if not ("resblocks" in n and p.ndim == 2)]
    return [
        torch.optim.Muon(matrices, lr=cfg.muon_lr, weight_decay=cfg.weight_decay),
        torch.optim.AdamW(rest, lr=cfg.adamw_lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def learning_rate_factor(step: int, cfg: PretrainConfig) -> float:
    """Linear warm-up, constant, then a linear decay to zero over the last `cooldown` of steps.

    Until the decay begins nothing depends on `steps`: a run can be made longer.
    """
    warm = min(1.0, (step + 1) / max(1, cfg.warmup_steps))
    left = (cfg.steps - step) / max(1.0, cfg.cooldown * cfg.steps)
    return warm * min(1.0, left)


# --- data ---


def _fraction(step: int, steps: int) -> float:
    return min(1.0, step / steps) if steps > 0 else 1.0


def draw_batch(
    cfg: PretrainConfig, seed: int, step: int
) -> tuple[Scenes, Tensor, dict[str, Tensor]]:
    """Scenes, images [B, 3, S, S] uint8 and patch labels of one step, a function of the step.

    The curriculum goes from one large object to both sizes and one to three objects.
    """
    f = _fraction(step, cfg.curriculum_steps)
    one, two, three = cfg.counts
    counts = (1 - f * (1 - one), f * two, f * three)
    index = step * cfg.batch_size + torch.arange(cfg.batch_size)
    scenes = sample_scenes(seed, _STREAM, index, Distribution(counts, large=1 - 0.5 * f))
    images, coverage = render(scenes)
    return scenes, images, patch_labels(scenes, patch_coverage(coverage, 8), _PATCH_COVERAGE)


class Normalize:
    """uint8 [B, 3, S, S] -> float32, with the model's own mean and standard deviation."""

    def __init__(self, model: CLIP) -> None:
        stats = open_clip.get_model_preprocess_cfg(model)
        self.mean = 255 * torch.tensor(stats["mean"])[:, None, None]
        self.std = 255 * torch.tensor(stats["std"])[:, None, None]

    def __call__(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


# --- evaluation ---


@torch.no_grad()
def zero_shot_accuracy(model: CLIP, kind: str, n_images: int, seed: int = 0) -> float:
    """Accuracy on `n_images` test scenes of a kind, with open_clip's own classifier."""
    dataset = ScenesDataset(kind, "test", n_images, seed)
    normalize = Normalize(model)
    model.eval()
    classifier = open_clip.build_zero_shot_classifier(
        model, tokenizer(), dataset.classnames, dataset.templates
    )
    right = 0
    for begin in range(0, n_images, 256):
        images, labels = dataset.images(range(begin, min(begin + 256, n_images)))
        logits = model.encode_image(normalize(images), normalize=True) @ classifier
        right += int((logits.argmax(1) == labels).sum())
    model.train()
    return right / n_images


# --- the loop ---


def save_weights(model: CLIP, path: Path) -> None:
    """float16 safetensors, as open_clip's `pretrained=path` reads them."""
    state = {k: v.detach().half().contiguous() for k, v in model.state_dict().items()}
    aside = path.with_suffix(".tmp")
    save_file(state, aside)
    aside.replace(path)


def save_checkpoint(
    path: Path, model: CLIP, optimizers: list[torch.optim.Optimizer], step: int
) -> None:
    """All that continuing needs: tensors and numbers, read with `weights_only`."""
    states = [optimizer.state_dict() for optimizer in optimizers]
    aside = path.with_suffix(".tmp")
    torch.save({"model": model.state_dict(), "optimizers": states, "step": step}, aside)
    put_checkpoint(aside, path, step)


def load_checkpoint(path: Path, model: CLIP, optimizers: list[torch.optim.Optimizer]) -> int:
    """Put a checkpoint's state in place and return the number of steps done."""
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return state["step"]


def training_step(
    cfg: PretrainConfig,
    seed: int,
    step: int,
    model: CLIP,
    optimizers: list[torch.optim.Optimizer],
    normalize: Normalize,
) -> dict[str, Tensor]:
    """One step of both optimizers; returns the named losses before it, detached."""
    factor = learning_rate_factor(step, cfg)
    for optimizer, lr in zip(optimizers, (cfg.muon_lr, cfg.adamw_lr), strict=True):
        optimizer.param_groups[0]["lr"] = lr * factor
    weight = {**cfg.weights, "patch": cfg.patch_weight * (1 - _fraction(step, cfg.patch_steps))}
    scenes, images, patches = draw_batch(cfg, seed, step)
    if weight["patch"] == 0:
        patches = None
    with torch.autocast("cpu", torch.bfloat16, enabled=cfg.precision == "bf16"):
        losses = scene_losses(model, tokenizer(), normalize(images), scenes, patches, seed, step)
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    sum(weight[name] * value for name, value in losses.items()).backward()
    for optimizer in optimizers:
        optimizer.step()
    with torch.no_grad():
        model.logit_scale.clamp_(max=math.log(cfg.max_logit_scale))
    return {name: value.detach() for name, value in losses.items()}


def train(cfg: PretrainConfig, seed: int, output_dir: Path) -> CLIP:
    """Train to `cfg.steps`, continuing from `output_dir/pretrain.ckpt` if it is there and whole.

    Every checkpoint also exports `output_dir/weights.safetensors`.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    checkpoint = output_dir / "pretrain.ckpt"
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    model = build_model(seed)
    optimizers = build_optimizers(model, cfg)
    normalize = Normalize(model)
    begun = whole_checkpoint(checkpoint)
    first = load_checkpoint(begun, model, optimizers) if begun else 0
    if first:
        log.info("continuing at step %d of %d", first, cfg.steps)

    began = time.perf_counter()
    for step in range(first, cfg.steps):
        losses = training_step(cfg, seed, step, model, optimizers, normalize)
        done = step + 1
        if done % cfg.log_every == 0:
            speed = cfg.log_every * cfg.batch_size / (time.perf_counter() - began)
            named = "  ".join(f"{name} {value.item():.3f}" for name, value in losses.items())
            log.info("step %d  %.0f images/s  %s", done, speed, named)
            began = time.perf_counter()
        if done % cfg.checkpoint_every == 0 or done == cfg.steps:
            save_checkpoint(checkpoint, model, optimizers, done)
            save_weights(model, output_dir / "weights.safetensors")
        if done % cfg.evaluate_every == 0 or done == cfg.steps:
            accuracy = {k: zero_shot_accuracy(model, k, cfg.evaluate_images) for k in KINDS}
            named = "  ".join(f"{k} {100 * a:.1f}" for k, a in accuracy.items())
            log.info("step %d  zero-shot accuracy in %%:  %s", done, named)
            began = time.perf_counter()
    log.info("the weights are in %s", output_dir / "weights.safetensors")
    return model
