"""The recipes of conf/model as SAEs, at a chosen density."""

from typing import Any

import torch
from torch import Tensor

from clipsae.sae import SAE


def options_of(model: str, latents: int) -> dict[str, Any]:
    """The SAE's options in conf/model/<model>.yaml, without its width."""
    # Here, as a process that measures memory needs neither.
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    import run
    from clipsae.tasks.build import sae_options

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(run.ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", [f"model={model}", "clip=vit_b_16", f"model.latents={latents}"])
    return sae_options(cfg)


def recipe(model: str, d: int, latents: int) -> SAE:
    """An SAE of conf/model/<model>.yaml, in training mode."""
    return SAE(d=d, **options_of(model, latents)).train()


@torch.no_grad()
def set_density(sae: SAE, x: Tensor, share: float | None) -> None:
    """Move biases or scales so that this share of scores is active, as after training.

    None: leave it as it starts.
    """
    if share is None:
        return
    some = x.flatten(0, -2)[:64]
    kept = max(1, int(share * sae.latents * len(some)))

    def border() -> Tensor:
        return sae.scores(some).flatten().topk(kept).values[-1]

    activation, architecture = sae.activation, sae.architecture
    if hasattr(activation, "b_gate"):
        activation.b_gate.sub_(border())
        activation.b_mag.sub_(border())
    elif hasattr(activation, "log_theta"):
        activation.log_theta.fill_(border().clamp(min=1e-6).log())
    elif hasattr(activation, "weights"):  # smaller scores have a larger support
        matrix = architecture.W_K if hasattr(architecture, "W_K") else architecture.W_enc
        start, low, high = matrix.clone(), -9.0, 9.0
        for _ in range(25):
            middle = (low + high) / 2
            matrix.copy_(start * 2**middle)
            scores = sae.scores(some)
            active = (scores > sae.threshold(scores)).float().mean()
            low, high = (middle, high) if active > share else (low, middle)
    elif hasattr(architecture, "b_enc"):
        architecture.b_enc.sub_(border())
    else:
        # No bias: a common direction of all tokens that most latents are against.
        mean = torch.nn.functional.normalize(x.flatten(0, -2).mean(dim=0), dim=0)
        toward = architecture.query(mean[None])[0]
        start, low, high = architecture.C.clone(), 0.0, 64.0
        for _ in range(25):
            middle = (low + high) / 2
            architecture.C.copy_(start - middle * start.std() * toward / toward.norm())
            active = (sae.scores(some) > 0).float().mean()
            low, high = (middle, high) if active > share else (low, middle)
