"""MSAE's checkpoints: a pickle of weights and the tokens' mean and scale, and options in its name.

https://github.com/WolodjaZ/MSAE (Zaigrajew et al., 2025, arXiv 2502.20578): with x' = s (x - mean),
z = rule((x' - pre_bias) encoder + latent_bias), x_hat = (z decoder + pre_bias) / s + mean. The name
is LATENTS_D_ACTIVATION[_K][_UW or _RW]_TIED_NORMALISED_CAP_DATASET.pth. Training nests several k;
at inference it is a TopK SAE, whose k the name has.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipsae.interop.files import Config, Tensors, names
from clipsae.interop.plain import NEGATIVE_LOST, Imported, Plain

NAME = "MSAE"

_NAME = re.compile(
    r"(?P<latents>\d+)_(?P<d>\d+)_(?P<activation>[A-Za-z]+)(_(?P<k>\d+))?(_(UW|RW))?"
    r"_(?P<tied>True|False)_(?P<normalised>True|False)_(?P<cap>\d+(\.\d+)?)(_(?P<tokens>.+))?"
)
_UNUSED = names("best_val_fvu config epoch optimizer scheduler target_norm")


def holds(content: Mapping[str, Any]) -> bool:
    """Whether a file's content is one of these."""
    return {"model", "mean_center", "scaling_factor"} <= set(content)


def convert(content: Mapping[str, Any], path: Path) -> Imported:
    """From what a file holds.

    Raises:
        ValueError: it was renamed; another activation, tokens standardised one by one, capped
            codes; what is damaged.
    """
    said = _NAME.fullmatch(path.stem)
    if said is None:
        raise ValueError(
            f"{path}: MSAE keeps an SAE's options in its file's name: expected one such as "
            "6144_768_TopKReLU_64_RW_False_False_0.0_cc3m.pth"
        )
    named = Config(said.groupdict(), path)
    kind = named.choice("activation", ("ReLU", "TopK", "TopKReLU"))
    named.choice("normalised", ("False",))
    named.choice("cap", ("0", "0.0"))
    file = Config(content, path)
    tensors = Tensors(file.get("model"), path)
    decoder = "encoder.T" if said["tied"] == "True" else "decoder"
    plain = Plain("relu", **tensors.linear("encoder.T", "latent_bias", decoder, "pre_bias"))
    m, d = plain.latents, plain.d
    for name, size in (("latents", m), ("d", d)):
        if int(said[name]) != size:
            raise ValueError(f"{path}: the name says {name}={said[name]}: the weights have {size}")
    lost = []
    if kind != "ReLU":
        if said["k"] is None or not 1 <= int(said["k"]) <= m:
            raise ValueError(f"{path}: the name says k={said['k']}: expected 1 to {m}")
        plain.rule, plain.k = "topk", int(said["k"])
        lost.append(f"Its codes are those of k={plain.k}: MSAE also decodes all positive scores.")
    if kind == "TopK":
        lost.append(NEGATIVE_LOST)
    tensors.ignore("latents_activation_frequency")
    scale = file.number("scaling_factor")
    if scale <= 0:
        raise ValueError(f"{path}: scaling_factor={scale}: expected a number above 0")
    plain.scale_input(scale)
    plain.b_dec = plain.b_dec + _mean(file, d)
    reads = {"tokens": said["tokens"]} if said["tokens"] else {}
    return plain.imported(NAME, file, tensors, unused=_UNUSED, reads=reads, lost=lost)


def _mean(file: Config, d: int) -> Tensor:
    """[d], subtracted from tokens: 0 where the tokens were not centred."""
    value = file.get("mean_center", 0)
    if isinstance(value, Tensor) and value.numel() > 1:
        return Tensors({"mean_center": value.flatten()}, file.where).take("mean_center", d).double()
    if file.number("mean_center") != 0:
        raise ValueError(f"{file.where}: mean_center={value!r}: expected 0 or {d} numbers")
    return torch.zeros(d)
