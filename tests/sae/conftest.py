"""Every recipe of conf/model at a size for tests, and tokens for it."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from clipsae.sae import SAE

MODELS = Path(__file__).resolve().parents[2] / "conf" / "model"
# Keys of the training and the evaluation.
NOT_THE_SAES = {
    "name",
    "learning_rate",
    "betas",
    "warmup_steps",
    "decay",
    "initial_images",
    "compile",
    "count_threshold",
}
D, M = 12, 40


def options_of(recipe: str, **changes) -> dict:
    """The SAE's options in conf/model/<recipe>.yaml, at the tests' size."""
    options = OmegaConf.to_container(OmegaConf.load(MODELS / f"{recipe}.yaml"))
    options = {k: v for k, v in options.items() if k not in NOT_THE_SAES}
    small = {"latents": M, "k": 4, "dead_after": 30, "threshold_start_step": 2}
    options.update({k: v for k, v in small.items() if k in options})
    return {**options, **changes}


def build(recipe: str, d: int = D, seed: int = 0, **changes) -> SAE:
    """An SAE of a recipe whose parameters are all away from their special starting points."""
    torch.manual_seed(seed)
    sae = SAE(d=d, **options_of(recipe, **changes))
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if name.rsplit(".")[-1] in ("b_enc", "b_dec", "b_gate", "b_mag", "r_mag", "log_theta"):
                parameter += 0.1 * torch.randn_like(parameter)
    return sae


def tokens(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random tokens [*shape] of varying norms."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    norms = 0.5 + 2 * torch.rand(*shape[:-1], 1, generator=generator, dtype=torch.float64)
    return (x * norms).to(dtype)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "recipe" in metafunc.fixturenames:
        metafunc.parametrize("recipe", sorted(path.stem for path in MODELS.glob("*.yaml")))
