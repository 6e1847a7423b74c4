"""Passes over images: top-n classification beside the plain protocol, and what more settings and
SAEs cost."""

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from clipsae.clip import FrozenCLIP
from clipsae.data.loader import image_batches
from clipsae.evaluation import Evaluation, evaluate
from clipsae.sae import SAE
from clipsae.training.density import set_density
from tests.benchmarks.plain import PlainTopN
from tests.benchmarks.setup import Setup, clip_of, images, options_of

BATCH = 8
DENSITY = 0.021  # of the Sparsemax SAE: a trained one's
ROUNDS = 3  # of ours; the plain protocol is run once
MORE_NS = 8


def measure_evaluation(setup: Setup, report: Callable[[str], None]) -> dict[str, Any]:
    """Seconds per image of both, the cost of another n and another SAE, and equal predictions."""
    sizes = setup.sizes
    clip = clip_of(setup)
    dataset = images(setup.images, sizes.images, clip.image_size)
    generator = torch.Generator().manual_seed(setup.seed)
    classifier = normalize(torch.randn(1000, clip.embed_dim, generator=generator), dim=1)
    classifier = classifier.to(setup.device)
    sparsemax, topk = (_sae(name, clip, dataset, setup) for name in ("sparsemax", "topk"))
    ns = sizes.ns
    more = (*ns, *range(ns[-1] + 1, ns[-1] + 1 + MORE_NS))

    def run(
        saes: dict[str, SAE],
        settings: Sequence[str] = ("no_sae", "on", "off"),
        ns: Sequence[int] = ns,
    ) -> Evaluation:
        return evaluate(
            clip, saes, dataset, classifier,
            ns=ns, settings=settings, count_threshold=0.0, metrics=(), batch_size=BATCH,
        )  # fmt: skip

    one = {"sparsemax": sparsemax}
    runs = {
        "ours": partial(run, one),
        "no_sae": partial(run, one, ("no_sae",)),
        "self": partial(run, one, ("no_sae", "on", "off", "self")),
        "more": partial(run, one, ns=more),
        "two": partial(run, {**one, "topk": topk}),
    }
    found = run(one)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(min(ROUNDS, sizes.rounds)):
        for name, step in runs.items():
            times[name].append(setup.seconds(step) / sizes.images)
    ours = {name: statistics.median(seconds) for name, seconds in times.items()}
    report(
        "ours: "
        + ", ".join(f"{name} {seconds:.3f}" for name, seconds in ours.items())
        + " s an image"
    )

    plain = PlainTopN(
        clip.model, clip.blocks + clip.layer, sparsemax, classifier, ns=ns, threshold=0.0
    )
    start = setup.clock()
    expected = plain.run([(clip.normalize(x), y) for x, y in _batches(dataset, setup)])
    seconds = (setup.clock() - start) / sizes.images
    report(f"plain: {seconds:.3f} s an image")
    same = [
        torch.equal(cosines.argmax(dim=1).cpu(), found.predictions[_key(key)].cpu())
        for key, cosines in expected.items()
    ]
    return {
        "clip": sizes.clip[0],
        "images": sizes.images,
        "photos": setup.images is not None,
        "latents": sizes.latents,
        "ns": list(ns),
        "active": _active(clip, sparsemax, dataset),
        "settings": len(same),
        "equal_settings": sum(same),
        "ours": ours["ours"],
        "plain": seconds,
        "ratio": seconds / ours["ours"],
        "no_sae": ours["no_sae"],
        "self": ours["self"] - ours["ours"],
        "another_n": (ours["more"] - ours["ours"]) / MORE_NS,
        "another_sae": ours["two"] - ours["ours"],
        "rounds": times,
    }


def _active(clip: FrozenCLIP, sae: SAE, dataset: Any) -> float:
    """Mean number of active latents per token."""
    found = evaluate(clip, {"sae": sae}, dataset, metrics=["sparsity"], batch_size=BATCH)
    return next(row["value"] for row in found.metrics if row["metric"] == "l0")


def _key(key: tuple[str, int | None]) -> tuple[str | None, str, int | None]:
    return (None if key[0] == "no_sae" else "sparsemax", *key)


def _batches(dataset: Any, setup: Setup) -> list[tuple[Tensor, Tensor]]:
    found = image_batches(dataset, BATCH)
    return [(x.to(setup.device), y.to(setup.device)) for x, y, _ in found]


@torch.no_grad()
def _sae(name: str, clip: FrozenCLIP, dataset: Any, setup: Setup) -> SAE:
    torch.manual_seed(setup.seed)
    sae = SAE(d=clip.width, **options_of(name, setup.sizes.latents)).to(setup.device)
    x = clip.prefix(clip.normalize(_batches(dataset, setup)[0][0]))
    sae.train().initialize(x)
    if name == "sparsemax":
        set_density(sae, x, DENSITY)
    return sae.eval()
