"""SAELens's training step, where it is installed (`pip install sae-lens`)."""

import importlib.util

import torch

from tests.benchmarks.setup import Setup, Step

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


def step(recipe: str, setup: Setup) -> Step:
    """Its training step with Adam on random tokens [N, d].

    Its SAE is as it starts: what it costs does not depend on how many latents act.
    """
    from sae_lens.registry import get_sae_training_class
    from sae_lens.saes.sae import TrainStepInput

    sae_class, config_class = get_sae_training_class(NAMES[recipe])
    options = {"k": 32} if "topk" in recipe else {}
    d, sizes = setup.sizes.d, setup.sizes
    config = config_class(d_in=d, d_sae=sizes.latents, device=setup.device, **options)
    sae = sae_class(config)
    x = (torch.randn(sizes.tokens, d) + torch.randn(d)).to(setup.device)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-5)
    coefficients = dict.fromkeys(sae.get_coefficients(), 0.0001)

    about = TrainStepInput(
        sae_in=x,
        coefficients=coefficients,
        dead_neuron_mask=None,
        n_training_steps=0,
        is_logging_step=False,
    )

    def once() -> None:
        optimizer.zero_grad()
        with setup.precision():
            loss = sae.training_forward_pass(about).loss
        loss.backward()
        optimizer.step()

    return once
