"""Every recipe of conf/model at a size for tests, and tokens for it."""

from functools import cache

import pytest
import torch
from hydra import compose, initialize_config_dir

from clipsae.sae import SAE, engine
from clipsae.sae.engine.switch import DENSE_FROM
from clipsae.sae.normalization import Moments
from clipsae.tasks.build import sae_options
from run import ROOT  # (and the resolvers that the configs use)

MODELS = ROOT / "conf" / "model"
D, M = 12, 40
TRAINED = sorted(p.stem for p in MODELS.glob("[!_]*.yaml") if "fit:" not in p.read_text())
# With what is frozen, or how tokens are normalised, behind a "+".
RECIPES = [*TRAINED, "topk+decoder", "sparsemax+encoder", "relu+soft_decoder", "topk+whiten"]


@cache
def _composed(recipe: str) -> dict:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return sae_options(compose("config", [f"model={recipe}", "~recipe"]))


def options_of(recipe: str, **changes) -> dict:
    """The SAE's options of conf/model/<recipe>.yaml, at the tests' size; "topk+decoder": with
    freeze="decoder", "topk+whiten": with normalize="whiten"."""
    recipe, _, more = recipe.partition("+")
    way = {"normalize": more} if more == "whiten" else {"freeze": more or None}
    options = dict(_composed(recipe)) | way
    small = {"latents": M, "k": 4, "dead_after": 30, "threshold_start_step": 2}
    options.update({k: v for k, v in small.items() if k in options})
    return {**options, **changes}


def build(recipe: str, d: int = D, seed: int = 0, **changes) -> SAE:
    """An SAE of a recipe whose parameters are all away from their special starting points."""
    torch.manual_seed(seed)
    sae = SAE(d=d, **options_of(recipe, **changes))
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if name.rsplit(".")[-1] in ("b_enc", "b_dec", "b_gate", "b_mag", "r_mag", "theta"):
                parameter += 0.1 * torch.randn_like(parameter)
    sae.activation.after_step()
    if sae.normalization.learned and not sae.normalization.position_mean:
        sae.normalization.fit(
            Moments.of([tokens(40, 5, d, seed=8) * torch.arange(1, d + 1) / d + 1])
        )
    return sae


def tokens(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random tokens [*shape] of varying norms."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    norms = 0.5 + 2 * torch.rand(*shape[:-1], 1, generator=generator, dtype=torch.float64)
    return (x * norms).to(dtype)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "recipe" in metafunc.fixturenames:
        metafunc.parametrize("recipe", RECIPES)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU's kernels in Triton's interpreter, with rows of more than one chunk, and lists that
    are too short for some."""
    from triton.runtime import interpreter

    from clipsae.sae.engine import gpu

    monkeypatch.setattr(gpu, "BLOCK", 32)
    monkeypatch.setattr(gpu, "ROOM", 8)
    # Half of the interpreter's time goes into replacing Triton's functions at each call, again
    # within a kernel: here once for each function that it calls.
    patch_lang = interpreter._patch_lang
    patched: dict = {}
    depth = [0]

    class Scope:
        def __init__(self, function) -> None:
            depth[0] += 1
            if function not in patched:
                patched[function] = patch_lang(function)

        def restore(self) -> None:
            depth[0] -= 1
            while not depth[0] and patched:
                patched.popitem()[1].restore()

    monkeypatch.setattr(interpreter, "_patch_lang", Scope)


@pytest.fixture
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU uses the GPU's operations, and never dense products."""
    monkeypatch.setitem(engine.BACKENDS, "cpu", engine.BACKENDS["cuda"])
    monkeypatch.setitem(DENSE_FROM, "cpu", {1: 1.0, 2: 1.0})
