"""How fast a training's device is fed: images a second of each source as a training reads it,
through CLIP's prefix where it holds images, without a training step and with one."""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from clipsae.data.cache import Cache, ImageLayout, TokenLayout
from clipsae.data.datamodule import FeatureDataModule
from clipsae.sae import SAE
from tests.benchmarks.setup import Setup, clip_of, images, options_of
from tests.benchmarks.sources import BATCH, Ready, write_cache
from tests.benchmarks.steps import training_step

RECIPE = "topk"
STEPS = 81_920  # of the paper


def measure_feeding(setup: Setup, report: Callable[[str], None]) -> dict[str, Any]:
    """Images a second of each source, the best of several epochs. Caches are in the system's
    memory."""
    sizes, clip = setup.sizes, clip_of(setup)
    clip.precision = "fp32" if setup.precision == "float32" else "bf16-mixed"
    dataset = images(setup.images, sizes.cache_images, clip.image_size)
    sae = SAE(d=clip.width, **options_of(RECIPE, sizes.latents)).to(setup.device).train()
    step = training_step(sae, setup)
    rates: dict[str, dict[str, float]] = {}

    def measure(name: str, **options: Any) -> None:
        data = FeatureDataModule(clip, dataset, batch_size=BATCH, **options)
        loader = data._loader()

        def epoch(work: Callable[[torch.Tensor], object]) -> None:
            for tokens in loader:
                work(tokens)

        rates[name] = {}
        for kind, work in (("alone", torch.Tensor.size), ("step", step)):
            setup.seconds(partial(epoch, work))
            best = min(setup.seconds(partial(epoch, work)) for _ in range(sizes.rounds))
            rates[name][kind] = BATCH * len(loader) / best
        loader.close()
        report(f"{name}: " + ", ".join(f"{kind} {rate:,.0f}" for kind, rate in rates[name].items()))

    with tempfile.TemporaryDirectory() as name:
        layouts = {
            "tokens": TokenLayout(images=len(dataset), tokens=clip.tokens, width=clip.width),
            "images": ImageLayout(images=len(dataset), image_size=clip.image_size),
        }
        for kind, layout in layouts.items():
            folder = Path(name) / kind
            write_cache(folder, layout, Ready(clip.tokens, clip.width))
            measure(kind, cache=Cache(folder, kind=type(layout)))
    for workers in sizes.workers if setup.images is not None else ():
        measure(f"photos, {workers} workers", num_workers=workers)
    return {
        "clip": sizes.clip[0],
        "recipe": RECIPE,
        "batch": BATCH,
        "rates": rates,
        "steps": STEPS,
        "minutes": STEPS * BATCH / rates["tokens"]["step"] / 60,
    }
