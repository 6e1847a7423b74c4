"""What the GPU tests check, as functions of a device and of sizes: `tests/sae/test_gpu_checks.py`
runs them on a CPU at toy sizes.

N tokens, M latents, p pairs of a token and a latent, d width.
"""

import contextlib
import copy
from typing import Any

import torch
from torch import Tensor

from clipsae.clip import FrozenCLIP
from clipsae.data.scenes import ScenesDataset
from clipsae.evaluation import Evaluation, evaluate
from clipsae.sae import SAE, SparseCodes
from clipsae.sae.engine import backend
from clipsae.sae.engine.gpu import PaddedCodes, Rows
from clipsae.sae.engine.reference import Reference
from run import ROOT
from tests.benchmarks.setup import Setup, options_of, prepared, switched
from tests.benchmarks.steps import training_step
from tests.waits import no_waits

RECIPES = sorted(path.stem for path in (ROOT / "conf" / "model").glob("[!_]*.yaml"))
SHARE = 0.004  # of active pairs, where a recipe's k does not decide it
ROOM = 3.0  # memory for codes, of what they take
CHANGES: dict[str, dict[str, Any]] = {
    # So wide that a rounded score at its edge does not decide the threshold's gradient.
    "jumprelu": {"bandwidth": 0.1},
    "topk": {"auxk": 0.1, "auxk_k": 16, "dead_after": 1},
    "batch_topk": {"auxk": 0.1, "auxk_k": 16, "dead_after": 1, "threshold_start_step": 1},
}


def built(recipe: str, setup: Setup, **changes: Any) -> tuple[SAE, Tensor]:
    """An SAE in training mode whose share of active latents is a trained one's, and tokens
    [1, N, d]."""
    options = options_of(recipe, setup.sizes.latents) | CHANGES.get(recipe, {}) | changes
    return prepared(options, None if "k" in options else SHARE, setup)


def room(sae: SAE) -> float:
    """From which share of pairs on dense products are used where sparse ones are tested."""
    return ROOM * max(SHARE, sae.config.get("k", 0) / sae.latents)


# --- numbers ---


def right_steps(recipe: str, setup: Setup) -> dict[str, Tensor]:
    """What `two_steps` returns, in dense products in float64 on the CPU."""
    sae, x = built(recipe, setup)
    sae, x = sae.cpu().double(), x.cpu().double()
    with switched("cpu", 0):
        return _two_steps(sae, x, setup, False)


def two_steps(
    recipe: str, setup: Setup, *, sparse: bool, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Two training steps' codes, reconstruction, losses, gradients (of both), and statistics."""
    sae, x = built(recipe, setup)
    sae, x = sae.to(dtype), x.to(dtype)
    with switched(setup.device, room(sae) if sparse else 0):
        return _two_steps(sae, x, setup, sparse)


def _two_steps(sae: SAE, x: Tensor, setup: Setup, sparse: bool) -> dict[str, Tensor]:
    for tokens in (x, x.flip(1)):
        with setup.autocast() if x.dtype == torch.float32 else contextlib.nullcontext():
            out = sae(tokens)
        sparse = sparse and sae.architecture.dictionary() is not None
        assert isinstance(out.encoded, SparseCodes) == sparse
        out.loss.backward()
        sae.after_backward()
    gradients = {f"gradient of {n}": p.grad for n, p in sae.named_parameters()}
    results = {"codes": out.codes, "reconstruction": out.reconstruction, **out.losses}
    found = results | gradients | dict(sae.named_buffers())
    return {name: value.detach().cpu() for name, value in found.items() if value is not None}


def errors(found: dict[str, Tensor], right: dict[str, Tensor]) -> dict[str, float]:
    """`relative` of each. A gradient that is missing is one of 0."""
    zeros = {name: torch.zeros_like(value) for name, value in right.items()}
    assert set(found) <= set(right)
    return {name: relative((zeros | found)[name], right[name]) for name in right}


def relative(found: Tensor, right: Tensor) -> float:
    """The norm of the difference over that of what is right; 0 where both are 0."""
    found, right = found.cpu().double(), right.cpu().double()
    norm = right.norm().item()
    return (found - right).norm().item() / (norm or 1.0)


def wrong_pairs(scores: Tensor, k: int) -> dict[str, int]:
    """How many pairs each way of choosing them, of the device's engine, has in place of the
    formula's, for scores [N, M] in float32 or float64."""
    on, wide = backend(scores), scores.cpu().double()
    n, m = scores.shape
    border = scores[:, : 2 * k].double().amax(dim=1, keepdim=True)
    capped = torch.arange(m, device=scores.device) % 7 == 0
    all_of = lambda values: min(k * n, int((values > 0).sum()))  # noqa: E731
    pairs = {
        "above": (on.above(scores, border), Reference.above(wide, border.cpu())),
        "largest": (on.largest(scores, k), Reference.largest(wide, k)),
        "largest of all": (
            on.largest_of_all(scores, k * n, lambda values: k * n),
            Reference.largest_of_all(wide, k * n, all_of),
        ),
        "sparsemax": (on.sparsemax(scores.clone()), Reference.sparsemax(wide.clone())),
        "sparsemax, some capped": (
            on.sparsemax(scores.clone(), capped),
            Reference.sparsemax(wide.clone(), capped.cpu()),
        ),
    }
    return {
        name: len(set(_positions(found)) ^ set(right.tolist()))
        for name, (found, right) in pairs.items()
    }


def _positions(chosen: Any) -> list[int]:
    if isinstance(chosen, Rows):
        chosen = chosen.pack()
    assert isinstance(chosen, PaddedCodes)
    return chosen.exact().positions.tolist()


def product_errors(scores: Tensor, k: int, d: int) -> dict[str, float]:
    """Each product with the codes of scores [N, M] against dense ones in float64 on the CPU."""
    on = backend(scores)
    codes = on.largest(scores, k).pack()
    generator = torch.Generator().manual_seed(1)
    sizes = {"rows": codes.latents, "x": codes.tokens}
    rows, x = (torch.randn(size, d, generator=generator) for size in sizes.values())
    z = codes.dense().cpu().double()
    on_device = rows.to(scores), x.to(scores)
    positions = codes.positions.cpu()
    return {
        "mix": relative(on.mix(codes, on_device[0]), z @ rows.double()),
        "accumulate": relative(on.accumulate(codes, on_device[1]), z.T @ x.double()),
        "sample": relative(
            on.sample(codes, on_device[1], on_device[0]),
            (x.double() @ rows.double().T).flatten()[positions],
        ),
        "sums of latents": relative(codes.sum_tokens(codes.values), z.sum(0)),
        "sums of tokens": relative(codes.sum_latents(codes.values), z.sum(1)),
    }


def random_scores(n: int, m: int, device: str, seed: int = 0) -> Tensor:
    """[N, M] in float32, the same for every device; sparsemax keeps few of a row, and in the last
    row nearly all."""
    scores = 3 * torch.randn(n, m, generator=torch.Generator().manual_seed(seed))
    scores[-1] /= 3e6
    return scores.to(device)


# --- training ---


def states(recipe: str, setup: Setup, *, steps: int, sparse: bool) -> dict[str, Tensor]:
    """Weights and statistics after some steps with Adam."""
    sae, x = built(recipe, setup)
    step = training_step(sae, setup)
    with switched(setup.device, room(sae) if sparse else 0):
        for i in range(steps):
            step(x.roll(i, dims=1))
    return {name: value.cpu() for name, value in sae.state_dict().items()}


def differing(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that are not the same, bit for bit."""
    return [name for name in first if not torch.equal(first[name], second[name])]


def steps_without_a_wait(recipe: str, setup: Setup, *, steps: int, sparse: bool) -> None:
    """Training steps whose host never waits.

    Raises:
        RuntimeError: it does.
    """
    sae, x = built(recipe, setup, **({"dead_after": 10**9} if "topk" in recipe else {}))
    step = training_step(sae, setup)
    with switched(setup.device, room(sae) if sparse else 0):
        step(x)  # reads what the SAE began with, compiles, and makes Adam's state
        with no_waits(setup.device):
            for _ in range(steps):
                step(x)


# --- evaluation ---


def evaluations(device: str, *, latents: int, images: int) -> tuple[Evaluation, Evaluation]:
    """The same evaluation of two SAEs on the built-in CLIP and its scenes: on the CPU, on a
    device."""
    clip = FrozenCLIP.load("clipsae-tiny", "builtin")
    dataset = ScenesDataset(kind="shape", split="test", size=images)
    pixels = dataset.images(range(min(32, images)))[0]
    torch.manual_seed(0)
    saes = {
        "topk": SAE(clip.width, latents, "linear", "topk", k=8),
        "sparsemax": SAE(clip.width, latents, "attention", "sparsemax"),
    }
    for sae in saes.values():
        sae.train().initialize(clip.prefix(clip.normalize(pixels)))
        sae.eval()
    classifier = torch.randn(len(dataset.classnames), clip.embed_dim)

    def run(on: str) -> Evaluation:
        return evaluate(
            clip.to(on),
            {name: copy.deepcopy(sae).to(on) for name, sae in saes.items()},
            dataset,
            classifier.to(on),
            count_threshold=0.0,
            batch_size=32,
        )

    return run("cpu"), run(device)


def agreement(first: Evaluation, second: Evaluation) -> dict[str, float]:
    """The share of equal predictions, and the largest relative difference of a metric."""
    assert first.predictions.keys() == second.predictions.keys()
    same = [
        (prediction.cpu() == second.predictions[key].cpu()).float().mean().item()
        for key, prediction in first.predictions.items()
    ]
    pairs = [
        (one["value"], two["value"])
        for one, two in zip(first.metrics, second.metrics, strict=True)
        if one["value"] == one["value"]  # not NaN
    ]
    return {
        "equal predictions": sum(same) / len(same),
        "metrics": max(abs(one - two) / max(abs(one), 1e-3) for one, two in pairs),
    }
