"""dictionary_learning's folders: `ae.pt`, a pickled state_dict, and `config.json`.

https://github.com/saprmarks/dictionary_learning: the class in `trainer.dict_class` decides how
the tensors are named and what is computed.
"""

from pathlib import Path
from typing import Any

from clipsae.interop.known import DICTIONARY_LEARNING, refuse_others
from clipsae.interop.plain import Imported, Plain
from clipsae.interop.safely import Tensors, read_config, read_pickle, same_size, size

NAME = "dictionary_learning"
FILES = ("ae.pt", "config.json")
MARKS = ("ae.pt",)

CLASSES = (
    "AutoEncoder",
    "AutoEncoderNew",
    "GatedAutoEncoder",
    "JumpReluAutoEncoder",
    "AutoEncoderTopK",
    "BatchTopKSAE",
    "MatryoshkaBatchTopKSAE",
)
_OF_TOKENS = ("lm_name", "layer", "submodule_name")
_READ = ("dict_class", "activation_dim", "dict_size")
_READ_OF = {
    "AutoEncoderTopK": ("k",),
    "BatchTopKSAE": ("k",),
    "MatryoshkaBatchTopKSAE": ("k", "group_fractions", "group_weights", "group_sizes"),
}


def read(folder: Path) -> Imported:
    """Read a folder.

    Raises:
        FileNotFoundError, ValueError: a file is missing, hostile or damaged; another class.
    """
    about = folder / "config.json"
    config = read_config(about)
    trainer = config.get("trainer")
    if not isinstance(trainer, dict) or trainer.get("dict_class") not in CLASSES:
        found = trainer.get("dict_class") if isinstance(trainer, dict) else None
        raise ValueError(
            f"{about}: trainer.dict_class={found!r}: expected one of {', '.join(CLASSES)}"
        )
    refuse_others(config, ("trainer", "buffer"), {}, about)
    if isinstance(config.get("buffer"), dict):  # where the tokens came from
        io = {"io": config["buffer"].get("io")}
        refuse_others(io, (), {"io": ("in", "out")}, f"{about}: buffer")
    known = (*DICTIONARY_LEARNING, *_READ, *_READ_OF.get(trainer["dict_class"], ()))
    refuse_others(trainer, known, {}, f"{about}: trainer")
    tensors = Tensors(folder / "ae.pt", read_pickle(folder / "ae.pt"))
    lost: list[str] = []
    plain = _convert(trainer, tensors, lost)
    tensors.refuse_others()
    m, d = plain.W_enc.shape
    for name, found in (("activation_dim", d), ("dict_size", m)):
        same_size(trainer, name, found, f"{about}: trainer")
    reads = {name: trainer[name] for name in _OF_TOKENS if trainer.get(name) is not None}
    return Imported(plain.to_sae(), NAME, reads, tuple(lost))


def _convert(trainer: dict[str, Any], tensors: Tensors, lost: list[str]) -> Plain:
    name = trainer["dict_class"]
    if name in ("JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE"):
        d, m = tensors.shape("W_enc", 2)
        w_enc, w_dec = tensors.take("W_enc", d, m).T, tensors.take("W_dec", m, d)
        b_enc, b_dec = tensors.take("b_enc", m), tensors.take("b_dec", d)
    else:
        m, d = tensors.shape("encoder.weight", 2)
        w_enc, w_dec = tensors.take("encoder.weight", m, d), tensors.take("decoder.weight", d, m).T
        gated = name == "GatedAutoEncoder"
        b_enc = w_enc.new_zeros(m) if gated else tensors.take("encoder.bias", m)
        b_dec = tensors.take(_DECODER_BIAS.get(name, "b_dec"), d)
    parts: dict[str, Any] = {"W_enc": w_enc, "W_dec": w_dec, "b_enc": b_enc, "b_dec": b_dec}
    if name == "AutoEncoder":
        return Plain("relu", **parts)
    if name == "AutoEncoderNew":
        return Plain("relu", **parts).shift_input(1)
    if name == "GatedAutoEncoder":
        gate: dict[str, Any] = {n: tensors.take(_GATE[n], m) for n in _GATE}
        return Plain("gated", **parts, **gate).scale_codes_by_rows()
    if name == "JumpReluAutoEncoder":
        theta = tensors.take("threshold", m)
        return Plain("jumprelu", **parts, theta=theta).shift_input(1).scale_codes_by_rows()
    k = size(trainer, "k", "config.json: trainer")
    if "k" in tensors:
        same_size(trainer, "k", int(tensors.take("k").item()), "config.json: trainer")
    if name == "AutoEncoderTopK":
        # It keeps a threshold, too, for those who ask for it; its own forward pass does not.
        tensors.drop("threshold")
        return Plain("topk", **parts, k=k)
    tau = tensors.take("threshold").item()
    if tau < 0:
        lost.append(
            "It was stopped before its threshold was first estimated: every positive score passes, "
            "as it does there."
        )
    if name == "MatryoshkaBatchTopKSAE":
        tensors.drop("group_sizes")
        lost.append("The nested groups decide its training alone: here all latents are one group.")
    return Plain("batch_topk", **parts, k=k, tau=tau)


_DECODER_BIAS = {
    "AutoEncoder": "bias",
    "AutoEncoderNew": "decoder.bias",
    "GatedAutoEncoder": "decoder_bias",
}
_GATE = {"b_gate": "gate_bias", "b_mag": "mag_bias", "r_mag": "r_mag"}
