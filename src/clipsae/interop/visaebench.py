"""visaebench: folders with a config and weights, from and to, and its interface.

https://github.com/vraj130/visaebench: z = rule(relu(x W^T + b)), x_hat = z D (+ bias), with
rows per latent in both matrices; `topk`, `batchtopk` (>= its threshold) and `jumprelu`. Its seven
metrics ask for any object with `encode` and `decode`: `VisaebenchSAE` is one around any SAE.
"""

from pathlib import Path

import torch
from torch import Tensor

from clipsae.interop.files import Config, Tensors, names, read_config, read_weights
from clipsae.interop.plain import (
    PURSUIT,
    TRAINING_LOST,
    Imported,
    Plain,
    just_below,
    write_files,
)
from clipsae.sae import SAE

NAME = "visaebench"
CONFIGS = ("config.json", "config.yaml", "config.yml")
WEIGHTS = ("sae.pt", "model.safetensors", "model.pt")
RULES = {"topk": "topk", "batchtopk": "batch_topk", "jumprelu": "jumprelu"}

# Its options without effect on the codes, and overcomplete's.
_UNUSED = names(
    """
    backbone batch_size dataset device dtype epochs expansion_factor layer learning_rate lr
    model model_name name num_epochs seed steps activation sae_type architecture k threshold
    """
)
_STANDARDISED = (
    "visaebench standardises tokens by a mean and a deviation that it saves beside its cache and "
    "not with the SAE: give it tokens treated alike."
)


def read(folder: Path) -> Imported:
    """Read a folder, with visaebench's names of tensors or overcomplete's.

    Raises:
        FileNotFoundError, ValueError: a file is missing, hostile or damaged; another activation.
    """
    about = next(folder / name for name in CONFIGS if (folder / name).is_file())
    config = Config(read_config(about), about)
    path = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{folder} holds a {about.name}, and none of {', '.join(WEIGHTS)}")
    tensors = Tensors(read_weights(path), path)
    name = config.get("activation", config.get("sae_type", config.get("architecture", "topk")))
    rule = RULES.get(str(name).lower())
    if rule is None:
        raise ValueError(f"{about}: activation={name!r}: expected one of {', '.join(RULES)}")
    lost = [_STANDARDISED]
    simple = "encoder.weight" in tensors
    prefix = "encoder." if simple else "encoder.final_block.0."
    parts = tensors.linear(
        f"{prefix}weight",
        f"{prefix}bias",
        "decoder.weight" if simple else "dictionary._weights",
        "decoder.bias" if "decoder.bias" in tensors else None,
    )
    m, d = parts["W_enc"].shape
    if "dictionary.multiplier" in tensors:
        # As visaebench does: an exponent, and none where it is 0.
        parts["W_dec"] = parts["W_dec"] * tensors.take("dictionary.multiplier").exp()
    plain = Plain(rule, **parts).shift_input(1)
    if rule == "topk":
        plain.k = config.whole("k")
    elif rule == "batch_topk":
        plain.k = config.whole("k") if config.get("k") is not None else 1
        plain.tau = _threshold(config, tensors)
    else:
        given = [name for name in ("jump_thresholds", "thresholds") if name in tensors]
        if not given:
            lost.append("It has no thresholds: 0.01 for all, as visaebench takes them.")
        plain.theta = tensors.take(given[0], m) if given else torch.full((m,), 0.01)
    config.check_size("input_dim", d)
    config.check_size("hidden_dim", m)
    reads = config.known("backbone", "layer", "dataset")
    return plain.imported(NAME, config, tensors, unused=_UNUSED, reads=reads, lost=lost)


def _threshold(config: Config, tensors: Tensors) -> float:
    """Below which a code is 0; there one that equals it passes, here only one above it."""
    running = "_running_threshold" in tensors
    value = tensors.take("_running_threshold").item() if running else 0.0
    if config.get("threshold") is not None:
        value = config.number("threshold")
    return max(just_below(torch.tensor(value)).item(), 0.0)


def write(sae: SAE, folder: Path) -> list[str]:
    """Write `config.json` and `model.safetensors`: there `load_sae(folder)` encodes and decodes as
    `sae` does, but for rounding.

    Returns:
        What could not be carried over, a sentence each.

    Raises:
        ValueError: sparsemax, gated, AbsTopK, matching pursuit, `normalize="unit"`, "layer_norm" or
            means of positions, which have no counterpart in its files; but for the last two
            `VisaebenchSAE` can be measured all the same.
    """
    plain = Plain.of(sae, NAME)
    if plain.rule in ("gated", "abs_topk", PURSUIT) or plain.normalize != "none":
        what = plain.rule if plain.normalize == "none" else f"normalize={plain.normalize}"
        raise ValueError(
            f"{what} cannot be written for visaebench's files, which have no counterpart: measure "
            "clipsae.interop.visaebench.VisaebenchSAE(sae) there instead"
        )
    plain.shift_input(-1)
    config = {"activation": "jumprelu", "input_dim": plain.d, "hidden_dim": plain.latents}
    tensors = {
        "encoder.weight": plain.W_enc,
        "encoder.bias": plain.b_enc,
        "decoder.weight": plain.W_dec,
        "decoder.bias": plain.b_dec,
    }
    if plain.rule == "topk":
        config |= {"activation": "topk", "k": plain.k}
    elif plain.rule == "batch_topk":
        tau = torch.tensor(plain.tau, dtype=torch.float32)
        above = torch.nextafter(tau, torch.tensor(torch.inf)).item()
        config |= {"activation": "batchtopk", "k": plain.k, "threshold": above}
    else:
        theta = torch.zeros(plain.latents) if plain.theta is None else plain.theta
        tensors["jump_thresholds"] = theta
    write_files(folder, "model.safetensors", tensors, "config.json", config)
    return [
        TRAINING_LOST,
        "visaebench standardises tokens by default: pass mean=torch.zeros(d), std=1.",
    ]


class VisaebenchSAE:
    """visaebench's interface around any SAE: `encode` [B, d] -> [B, M], `decode` [B, M] -> [B, d].

    Its metrics decode codes without the tokens that they came from, so that the norms of
    `normalize="unit"` must be in the codes: z ||x||. Pass visaebench `mean=torch.zeros(d), std=1`,
    as our SAEs read tokens as they are.

    Raises:
        ValueError: `normalize="unit"` with a decoder bias, which ||x|| multiplies, too, and
            "layer_norm", whose means are not in the codes; means of positions, as its tokens have
            none.
    """

    def __init__(self, sae: SAE) -> None:
        if sae.normalization.position_mean:
            raise ValueError(
                "position_mean=true cannot be measured by visaebench, whose tokens have no "
                "position: train with position_mean=false"
            )
        own_mean = sae.normalize == "layer_norm"
        if own_mean or (sae.normalize == "unit" and sae.decoder_bias is not None):
            raise ValueError(
                f"normalize={sae.normalize} with a decoder bias or means of tokens cannot be "
                "decoded from codes alone, as visaebench does: expected an SAE without one of them"
            )
        self.sae = sae.eval()

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        return self.sae.encode(x) * self.sae.input_scale(x)

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        return self.sae.decode(z)
