"""visaebench: folders with a config and weights, from and to, and its interface.

https://github.com/vraj130/visaebench: z = rule(relu(x W^T + b)), x_hat = z D (+ bias), with
rows per latent in both matrices; `topk`, `batchtopk` (>= its threshold) and `jumprelu`. Its seven
metrics ask for any object with `encode` and `decode`: `VisaebenchSAE` is one around any SAE.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from clipsae.interop.known import VISAEBENCH, refuse_others
from clipsae.interop.plain import Imported, Plain
from clipsae.interop.safely import (
    Tensors,
    read_config,
    read_pickle,
    read_safetensors,
    same_size,
    size,
)
from clipsae.sae import SAE

NAME = "visaebench"
WEIGHTS = ("sae.pt", "model.safetensors", "model.pt")
MARKS = ("config.json", "config.yaml", "config.yml")
FILES = (*MARKS, *WEIGHTS)

RULES = {"topk": "topk", "batchtopk": "batch_topk", "jumprelu": "jumprelu"}
_READ = (*("activation", "sae_type", "architecture", "k", "threshold", "input_dim", "hidden_dim"),)
_STANDARDISED = (
    "visaebench standardises tokens by a mean and a deviation that it saves beside its cache and "
    "not with the SAE: give it tokens treated alike."
)


def read(folder: Path) -> Imported:
    """Read a folder, with its own names of tensors or those of the library overcomplete.

    Raises:
        FileNotFoundError, ValueError: a file is missing, hostile or damaged; another activation.
    """
    about = next(folder / name for name in MARKS if (folder / name).is_file())
    config = read_config(about)
    there = [name for name in WEIGHTS if (folder / name).is_file()]
    if not there:
        raise FileNotFoundError(f"{folder} holds a {about.name}, and none of {', '.join(WEIGHTS)}")
    path = folder / there[0]
    load = read_safetensors if path.suffix == ".safetensors" else read_pickle
    tensors = Tensors(path, load(path))
    name = config.get("activation", config.get("sae_type", config.get("architecture", "topk")))
    rule = RULES.get(str(name).lower())
    if rule is None:
        raise ValueError(f"{about}: activation={name!r}: expected one of {', '.join(RULES)}")
    refuse_others(config, (*VISAEBENCH, *_READ), {}, about)
    lost = [_STANDARDISED]
    plain = _convert(rule, config, about, tensors, lost).shift_input(1)
    tensors.refuse_others()
    m, d = plain.W_enc.shape
    for name, found in (("input_dim", d), ("hidden_dim", m)):
        same_size(config, name, found, about)
    reads: dict[str, Any] = {
        key: config[key] for key in ("backbone", "layer", "dataset") if key in config
    }
    return Imported(plain.to_sae(), NAME, reads, tuple(lost))


def _convert(rule: str, config: dict, about: Path, tensors: Tensors, lost: list[str]) -> Plain:
    simple = "encoder.weight" in tensors
    prefix = "encoder." if simple else "encoder.final_block.0."
    m, d = tensors.shape(f"{prefix}weight", 2)
    w_dec = tensors.take("decoder.weight" if simple else "dictionary._weights", m, d)
    if "dictionary.multiplier" in tensors:
        # As visaebench does: an exponent, and none where it is 0.
        w_dec = w_dec * tensors.take("dictionary.multiplier").exp()
    plain = Plain(
        rule,
        W_enc=tensors.take(f"{prefix}weight", m, d),
        W_dec=w_dec,
        b_enc=tensors.take(f"{prefix}bias", m),
        b_dec=tensors.take("decoder.bias", d) if "decoder.bias" in tensors else torch.zeros(d),
    )
    if rule == "topk":
        plain.k = size(config, "k", about)
    elif rule == "batch_topk":
        plain.k = size(config, "k", about) if config.get("k") is not None else 1
        plain.tau = _threshold(config, about, tensors)
    else:
        given = [name for name in ("jump_thresholds", "thresholds") if name in tensors]
        if not given:
            lost.append("It has no thresholds: 0.01 for all, as visaebench takes them.")
        plain.theta = tensors.take(given[0], m) if given else torch.full((m,), 0.01)
    return plain


def _threshold(config: dict, about: Path, tensors: Tensors) -> float:
    """Below which a code is 0; there one that equals it passes, here only one above it."""
    value = config.get("threshold")
    if "_running_threshold" in tensors:
        running = tensors.take("_running_threshold").item()
        value = running if value is None else value
    value = 0.0 if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        raise ValueError(f"{about}: threshold={value!r}: expected a number")
    below = torch.nextafter(torch.tensor(float(value)), torch.tensor(-torch.inf))
    return max(below.item(), 0.0)


def write(sae: SAE, folder: Path) -> list[str]:
    """Write `config.json` and `model.safetensors`: there `load_sae(folder)` encodes and decodes as
    `sae` does, but for rounding.

    Returns:
        What could not be carried over, a sentence each.

    Raises:
        ValueError: sparsemax, gated, or normalised input, which have no counterpart in its files;
            `VisaebenchSAE` can be measured all the same.
    """
    plain = Plain.of(sae, NAME)
    if plain.rule == "gated" or plain.normalize:
        what = "activation=gated" if plain.rule == "gated" else "normalize_input=true"
        raise ValueError(
            f"{what} cannot be written for visaebench's files, which have no such thing: measure "
            "clipsae.interop.visaebench.VisaebenchSAE(sae) there instead"
        )
    plain.shift_input(-1)
    m, d = plain.W_enc.shape
    config = {"activation": "jumprelu", "input_dim": d, "hidden_dim": m}
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
        tensors["jump_thresholds"] = torch.zeros(m) if plain.theta is None else plain.theta
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: t.float().contiguous() for name, t in tensors.items()}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return [
        "Options of the training and counters of dead latents are left out.",
        "visaebench standardises tokens unless it is told not to: pass mean=torch.zeros(d), std=1.",
    ]


class VisaebenchSAE:
    """visaebench's interface around any SAE: `encode` [B, d] -> [B, M], `decode` [B, M] -> [B, d].

    Its metrics decode codes without the tokens that they came from, so that the norms of
    `normalize_input` must be in the codes: z ||x||. Pass visaebench `mean=torch.zeros(d), std=1`,
    as our SAEs read tokens as they are.

    Raises:
        ValueError: `normalize_input` with a decoder bias, which ||x|| multiplies, too.
    """

    def __init__(self, sae: SAE) -> None:
        if sae.normalize_input and sae.decoder_bias is not None:
            raise ValueError(
                "normalize_input=true with a decoder bias cannot be decoded from codes alone, as "
                "visaebench does: expected an SAE without one of them"
            )
        self.sae = sae.eval()

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        return self.sae.encode(x) * self.sae.input_scale(x)

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        return self.sae.decode(z)
