"""SAELens's training step, where it is installed (`pip install sae-lens`)."""

import importlib.util
from collections.abc import Callable

import torch

NAMES = {
    "relu": "standard",
    "jumprelu": "jumprelu",
    "gated": "gated",
    "topk": "topk",
    "batch_topk": "batchtopk",
}


def has(recipe: str) -> bool:
    """Whether there is such a variant to compare with."""
    return recipe in NAMES and importlib.util.find_spec("sae_lens") is not None


def step(recipe: str, d: int, latents: int, tokens: int) -> Callable[[], float]:
    """Its training step with Adam on random tokens [N, d]."""
    from sae_lens.registry import get_sae_training_class
    from sae_lens.saes.sae import TrainStepInput

    sae_class, config_class = get_sae_training_class(NAMES[recipe])
    options = {"k": 32} if "topk" in recipe else {}
    sae = sae_class(config_class(d_in=d, d_sae=latents, device="cpu", **options))
    x = torch.randn(tokens, d) + torch.randn(d)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-5)
    coefficients = dict.fromkeys(sae.get_coefficients(), 0.0001)

    def once() -> float:
        optimizer.zero_grad()
        out = sae.training_forward_pass(
            TrainStepInput(
                sae_in=x, coefficients=coefficients, dead_neuron_mask=None, n_training_steps=0,
                is_logging_step=False,
            )
        )  # fmt: skip
        out.loss.backward()
        optimizer.step()
        return out.loss.item()

    return once
