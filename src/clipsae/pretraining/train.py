"""Train the built-in CLIP on rendered scenes, some 40 minutes on one core.

Stopped, the same command continues. The weights end in <output>/weights.safetensors.
"""

# A plain loop. Everything random is a function of (seed, step), and a checkpoint holds model,
# optimizers and step, so that a continued run ends with the same weights. Muon (Jordan 2024,
# "Muon: an optimizer for hidden layers") moves the matrices of the blocks, AdamW the rest.
#
# The first part is a supervised warm start, without which shape stays at chance for an hour:
# scenes begin with one large object, and patches that an object covers are trained to name its
# shape, colour and pattern, through the text tower like everything else, with a weight that falls
# to zero.

import argparse
import functools
import gzip
import itertools
import logging
import math
import os
import time
from argparse import Namespace
from collections.abc import Iterable, Sequence
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
from clipsae.store import put_checkpoint, whole_checkpoint

log = logging.getLogger(__name__)

_STREAM = 0x79A1  # of scenes that no dataset shows
_PATCH_COVERAGE = 0.25  # a patch shows an object that covers this much of it
WEIGHTS = {
    **{"caption": 0.5, "shape": 2.0, "colour": 0.5, "pattern": 1.5, "size": 0.5},
    **{"shape_colour": 1.0, "position": 0.5, "background": 0.5, "count": 0.5},
}
OPTIONS: dict[str, tuple[Any, str]] = {  # default and help; lengths are in steps
    "output": (Path(os.environ.get("CLIPSAE_OUTPUT", "outputs"), "pretrain"), "a folder"),
    "seed": (0, "of the weights and the scenes"),
    "steps": (2000, "of batch_size scenes each; every scene is seen once"),
    "batch_size": (256, "scenes a step"),
    "curriculum_steps": (1000, "from one large object to several of both sizes"),
    "patch_steps": (2000, "in which patch_weight falls to zero"),
    "patch_weight": (1.0, "of the warm start's loss, on what a patch shows"),
    "muon_lr": (0.02, "learning rate of the blocks' matrices"),
    "adamw_lr": (0.002, "learning rate of the rest"),
    "weight_decay": (0.1, "of Muon's matrices, times the learning rate"),
    "warmup_steps": (100, "of linear warm-up"),
    "cooldown": (0.4, "last share of the steps, in which the rates fall to zero"),
    "max_logit_scale": (100.0, "ceiling of exp(logit_scale), as in CLIP"),
    "threads": (0, "of torch; 0: torch's own choice"),
    "log_every": (50, "steps between two lines of losses"),
    "checkpoint_every": (200, "steps between two checkpoints, with exported weights"),
    "evaluate_every": (400, "steps between two zero-shot classifications"),
    "evaluate_images": (512, "test scenes of each kind that are classified"),
}
AT_LEAST_ONE = ("steps", "batch_size", "log_every", "checkpoint_every", "evaluate_every")


def parse(arguments: Sequence[str] | None = None) -> Namespace:
    """The options of a command line."""
    parser = argparse.ArgumentParser(
        "python -m clipsae.pretraining",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )

    def add(name: str, default: Any, help: str, **more: Any) -> None:
        parser.add_argument(f"--{name.replace('_', '-')}", default=default, help=help, **more)

    for name, (default, help) in OPTIONS.items():
        add(name, default, help, type=Path if isinstance(default, Path) else type(default))
    add("precision", "bf16", "bf16 is autocast", choices=["bf16", "fp32"])
    counts = "shares of scenes with one, two and three objects"
    add("counts", (0.7, 0.15, 0.15), counts, type=float, nargs=3)
    names = f"of the losses: caption, and each kind of class ({WEIGHTS})"
    add("weights", [], names, type=_weight, nargs="+", metavar="NAME=WEIGHT")
    cfg = parser.parse_args(arguments)
    for name in AT_LEAST_ONE:
        if getattr(cfg, name) < 1:
            parser.error(f"{name} must be at least 1")
    cfg.weights = WEIGHTS | dict(cfg.weights)
    return cfg


def _weight(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    if name not in WEIGHTS:
        raise ValueError(name)
    return name, float(value)


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


def build_optimizers(model: CLIP, cfg: Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices; AdamW for embeddings, norms, biases and projections."""
    groups: tuple[list[Tensor], list[Tensor]] = [], []
    for name, parameter in model.named_parameters():
        groups[0 if "resblocks" in name and parameter.ndim == 2 else 1].append(parameter)
    return [
        torch.optim.Muon(groups[0], lr=cfg.muon_lr, weight_decay=cfg.weight_decay),
        torch.optim.AdamW(groups[1], lr=cfg.adamw_lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def learning_rate_factor(step: int, cfg: Namespace) -> float:
    """Linear warm-up, constant, then a linear decay to zero over the last `cooldown` of steps.

    Until the decay begins nothing depends on `steps`: a run can be made longer.
    """
    warm = min(1.0, (step + 1) / max(1, cfg.warmup_steps))
    left = (cfg.steps - step) / max(1.0, cfg.cooldown * cfg.steps)
    return warm * min(1.0, left)


# --- data ---


def _fraction(step: int, steps: int) -> float:
    return min(1.0, step / steps) if steps > 0 else 1.0


def draw_batch(cfg: Namespace, step: int) -> tuple[Scenes, Tensor, dict[str, Tensor]]:
    """Scenes, images [B, 3, S, S] uint8 and patch labels of one step, a function of the step.

    The curriculum goes from one large object to both sizes and one to three objects.
    """
    f = _fraction(step, cfg.curriculum_steps)
    one, two, three = cfg.counts
    counts = (1 - f * (1 - one), f * two, f * three)
    index = step * cfg.batch_size + torch.arange(cfg.batch_size)
    scenes = sample_scenes(cfg.seed, _STREAM, index, Distribution(counts, large=1 - 0.5 * f))
    images, coverage = render(scenes)
    return scenes, images, patch_labels(scenes, patch_coverage(coverage, 8), _PATCH_COVERAGE)


def normalize(model: CLIP, images: Tensor) -> Tensor:
    """uint8 [B, 3, S, S] -> float32, with the model's own mean and standard deviation."""
    stats = open_clip.get_model_preprocess_cfg(model)
    mean, std = (255 * torch.tensor(stats[key])[:, None, None] for key in ("mean", "std"))
    return (images - mean) / std


@torch.no_grad()
def zero_shot_accuracy(model: CLIP, kind: str, n_images: int, seed: int = 0) -> float:
    """Accuracy on `n_images` test scenes of a kind, with open_clip's own classifier."""
    dataset = ScenesDataset(kind, "test", n_images, seed)
    model.eval()
    classifier = open_clip.build_zero_shot_classifier(
        model, tokenizer(), dataset.classnames, dataset.templates
    )
    right = 0
    for begin in range(0, n_images, 256):
        images, labels = dataset.images(range(begin, min(begin + 256, n_images)))
        logits = model.encode_image(normalize(model, images), normalize=True) @ classifier
        right += int((logits.argmax(1) == labels).sum())
    model.train()
    return right / n_images


# --- the loop ---


def save(folder: Path, model: CLIP, optimizers: list[torch.optim.Optimizer], step: int) -> None:
    """All that continuing needs (tensors and numbers, read with `weights_only`), and the weights
    as float16 safetensors, as open_clip's `pretrained=path` reads them."""
    aside = folder / "aside.tmp"
    states = [optimizer.state_dict() for optimizer in optimizers]
    torch.save({"model": model.state_dict(), "optimizers": states, "step": step}, aside)
    put_checkpoint(aside, folder / "pretrain.ckpt", step)
    half = {k: v.detach().half().contiguous() for k, v in model.state_dict().items()}
    save_file(half, aside)
    aside.replace(folder / "weights.safetensors")


def load_checkpoint(path: Path, model: CLIP, optimizers: list[torch.optim.Optimizer]) -> int:
    """Put a checkpoint's state in place and return the number of steps done."""
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return state["step"]


def training_step(
    cfg: Namespace, step: int, model: CLIP, optimizers: list[torch.optim.Optimizer]
) -> dict[str, Tensor]:
    """One step of both optimizers; returns the named losses before it, detached."""
    factor = learning_rate_factor(step, cfg)
    for optimizer, lr in zip(optimizers, (cfg.muon_lr, cfg.adamw_lr), strict=True):
        optimizer.param_groups[0]["lr"] = lr * factor
    weight = {**cfg.weights, "patch": cfg.patch_weight * (1 - _fraction(step, cfg.patch_steps))}
    scenes, images, labels = draw_batch(cfg, step)
    patches = None if weight["patch"] == 0 else labels
    inputs = normalize(model, images)
    with torch.autocast("cpu", torch.bfloat16, enabled=cfg.precision == "bf16"):
        losses = scene_losses(model, tokenizer(), inputs, scenes, patches, cfg.seed, step)
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    sum(weight[name] * value for name, value in losses.items()).backward()
    for optimizer in optimizers:
        optimizer.step()
    with torch.no_grad():
        model.logit_scale.clamp_(max=math.log(cfg.max_logit_scale))
    return {name: value.detach() for name, value in losses.items()}


def train(cfg: Namespace) -> CLIP:
    """Train to `cfg.steps`, continuing from `cfg.output/pretrain.ckpt` if it is there and whole.

    Every checkpoint also exports `cfg.output/weights.safetensors`.
    """
    cfg.output.mkdir(parents=True, exist_ok=True)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    model = build_model(cfg.seed)
    optimizers = build_optimizers(model, cfg)
    begun = whole_checkpoint(cfg.output / "pretrain.ckpt")
    first = load_checkpoint(begun, model, optimizers) if begun else 0
    if first:
        log.info("continuing at step %d of %d", first, cfg.steps)

    began = time.perf_counter()
    for step in range(first, cfg.steps):
        losses = training_step(cfg, step, model, optimizers)
        done = step + 1
        if done % cfg.log_every == 0:
            speed = cfg.log_every * cfg.batch_size / (time.perf_counter() - began)
            named = "  ".join(f"{name} {value.item():.3f}" for name, value in losses.items())
            log.info("step %d  %.0f images/s  %s", done, speed, named)
            began = time.perf_counter()
        if done % cfg.checkpoint_every == 0 or done == cfg.steps:
            save(cfg.output, model, optimizers, done)
        if done % cfg.evaluate_every == 0 or done == cfg.steps:
            accuracy = {k: zero_shot_accuracy(model, k, cfg.evaluate_images) for k in KINDS}
            named = "  ".join(f"{k} {100 * a:.1f}" for k, a in accuracy.items())
            log.info("step %d  zero-shot accuracy in %%:  %s", done, named)
            began = time.perf_counter()
    log.info("the weights are in %s", cfg.output / "weights.safetensors")
    return model


# --- the tokenizer's merges ---


def write_merges(words: Iterable[str], path: Path) -> None:
    """Write open_clip's bpe file with those of CLIP's merges that the words need.

    CLIP's vocabulary of 49,408 tokens would add 12 MB of embeddings to a model that knows some 150
    words. Byte pair encoding joins neighbouring pieces in a fixed order: the merges that a word
    goes through, kept in that order, split the word exactly as CLIP does.
    """
    full = SimpleTokenizer()
    used: set[tuple[str, str]] = set()
    for token in itertools.chain.from_iterable(map(full.pat.findall, words)):
        piece = [full.byte_encoder[b] for b in token.encode("utf-8")]
        piece[-1] += "</w>"
        while pairs := [p for p in itertools.pairwise(piece) if p in full.bpe_ranks]:
            pair = min(pairs, key=full.bpe_ranks.__getitem__)
            used.add(pair)
            joined: list[str] = []
            for part in piece:
                if joined and (joined[-1], part) == pair:
                    joined[-1] += part
                else:
                    joined.append(part)
            piece = joined
    merges = sorted(used, key=full.bpe_ranks.__getitem__)
    lines = ["#version: 0.2, CLIP's merges reduced", *(" ".join(merge) for merge in merges)]
    # Neither a file name nor a time in the header: the same words, the same bytes.
    path.write_bytes(gzip.compress("\n".join(lines).encode("utf-8"), mtime=0))
