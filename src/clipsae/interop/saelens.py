"""SAELens: `cfg.json` and `sae_weights.safetensors`, from and to, without the library.

https://github.com/decoderesearch/SAELens: W_enc is [d, M], W_dec [M, d]; a config of version 6
names its architecture, one from before may name an activation function instead. Releases of its
own list are read through the library, where it is installed: `saelens:RELEASE/SAE_ID`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from clipsae.interop.plain import Imported, Plain
from clipsae.interop.safely import Tensors, read_config, read_safetensors, size
from clipsae.sae import SAE

NAME = "SAELens"
FILES = ("cfg.json", "sae_weights.safetensors")
MARKS = ("cfg.json",)

ARCHITECTURES = ("standard", "topk", "jumprelu", "gated", "batchtopk", "matryoshka_batchtopk")

# What version 6 writes and what is made of it here; a key beyond these is said to be unknown.
_KNOWN = {
    *("architecture", "d_in", "d_sae", "dtype", "device", "metadata", "k"),
    *("apply_b_dec_to_input", "normalize_activations", "reshape_activations"),
    *("rescale_acts_by_decoder_norm", "finetuning_scaling_factor"),
}
_OF_TOKENS = ("model_name", "hook_name", "hook_point", "dataset_path", "hook_head_index")
_UNSCALED = {
    "expected_average_only_in": "It was trained on tokens scaled to a mean norm of sqrt(d), and "
    "does not save the factor: as in SAELens, tokens are encoded as they are.",
}
_RULES = {
    "relu": "standard",
    "topk": "topk",
    "jumprelu": "jumprelu",
    "batch_topk": "jumprelu",
    "gated": "gated",
}


def read(folder: Path) -> Imported:
    """Read a folder.

    Raises:
        FileNotFoundError, ValueError: a file is missing or damaged, or an architecture or a
            normalisation that has no counterpart here.
    """
    cfg = read_config(folder / "cfg.json")
    weights = folder / "sae_weights.safetensors"
    return convert(cfg, Tensors(weights, read_safetensors(weights)))


def from_library(release: str, sae_id: str) -> Imported:
    """One of SAELens's own list of releases, through the library.

    Raises:
        ValueError: the library is not installed, or cannot have it.
    """
    try:
        from sae_lens import SAE as Theirs
    except ImportError as error:
        raise ValueError(
            "saelens:RELEASE/SAE_ID needs SAELens: pip install 'clipsae[peers]', or give a folder "
            "with its cfg.json and sae_weights.safetensors"
        ) from error
    try:
        theirs = Theirs.from_pretrained(release, sae_id)
    except Exception as error:  # it raises whatever its many loaders do
        raise ValueError(f"saelens:{release}/{sae_id}: SAELens cannot have it: {error}") from error
    return from_object(theirs)


def from_object(theirs: Any) -> Imported:
    """An SAE that SAELens has in memory."""
    return convert(theirs.cfg.to_dict(), Tensors("SAELens", theirs.state_dict()))


def convert(cfg: Mapping[str, Any], tensors: Tensors) -> Imported:
    """From a `cfg.json` and the tensors beside it."""
    lost: list[str] = []
    metadata = cfg.get("metadata") if isinstance(cfg.get("metadata"), dict) else None
    architecture, k = _architecture(cfg, tensors)
    d, m = size(cfg, "d_in", "cfg.json"), size(cfg, "d_sae", "cfg.json")
    parts: dict[str, Any] = {
        "W_enc": tensors.take("W_enc", d, m).T,
        "W_dec": tensors.take("W_dec", m, d),
        "b_enc": torch.zeros(m) if architecture == "gated" else tensors.take("b_enc", m),
        "b_dec": tensors.take("b_dec", d),
    }
    _finetuned(cfg, tensors, parts)
    if architecture == "standard":
        plain = Plain("relu", **parts)
    elif architecture == "topk":
        plain = Plain("topk", **parts, k=k)
    elif architecture == "gated":
        gate: dict[str, Any] = {
            name: tensors.take(name, m) for name in ("b_gate", "b_mag", "r_mag")
        }
        plain = Plain("gated", **parts, **gate)
    elif architecture == "jumprelu":
        log = "log_threshold" in tensors
        theta = tensors.take("log_threshold", m).exp() if log else tensors.take("threshold", m)
        plain = Plain("jumprelu", **parts, theta=theta)
    else:
        plain = Plain("batch_topk", **parts, k=k, tau=tensors.take("topk_threshold").item())
        lost.append("It is a checkpoint of the training: k counts in training, the threshold here.")
    if not cfg.get("apply_b_dec_to_input", True):
        plain.shift_input(1)
    if cfg.get("rescale_acts_by_decoder_norm", False):
        plain.scale_codes_by_rows()
    _normalisation(cfg, plain, d, lost)
    if cfg.get("reshape_activations", "none") != "none":
        lost.append("It reads an attention layer's heads side by side: flatten them before it.")
    if metadata is not None and (unknown := sorted(set(cfg) - _KNOWN)):
        lost.append(f"{', '.join(unknown)} of cfg.json decide the training, or are not known here.")
    if left := tensors.left():
        lost.append(f"{', '.join(left)} are in the file, and not known here.")
    about = cfg if metadata is None else metadata
    reads = {name: about[name] for name in _OF_TOKENS if about.get(name) is not None}
    return Imported(plain.to_sae(), NAME, reads, tuple(lost))


def _architecture(cfg: Mapping[str, Any], tensors: Tensors) -> tuple[str, Any]:
    """Its name, and k where it has one; before version 6 a topk was a standard SAE."""
    name = cfg.get("architecture", "standard")
    function = cfg.get("activation_fn", cfg.get("activation_fn_str", "relu"))
    options = cfg.get("activation_fn_kwargs")
    if name == "standard" and function == "topk":
        if not isinstance(options, dict):
            options = {}
        return "topk", size(options, "k", "cfg.json: activation_fn_kwargs")
    if function != "relu":
        raise ValueError(f"cfg.json: activation_fn={function!r}: expected relu or topk")
    if name not in ARCHITECTURES:
        raise ValueError(
            f"cfg.json: architecture={name!r} has no counterpart here: expected one of "
            f"{', '.join(ARCHITECTURES)}"
        )
    if name in ("batchtopk", "matryoshka_batchtopk") and "topk_threshold" not in tensors:
        raise ValueError(f"{tensors.where} holds no topk_threshold, which {name} encodes with")
    if name == "topk":
        return name, size(cfg, "k", "cfg.json")
    k = cfg.get("k")  # of a batch: there it may be a fraction, here it is the training's alone
    return name, max(1, round(k)) if isinstance(k, int | float) else 1


def _finetuned(cfg: Mapping[str, Any], tensors: Tensors, parts: dict[str, torch.Tensor]) -> None:
    """A factor for each code before decoding, which some old SAEs have: into the decoder's rows."""
    if "scaling_factor" not in tensors:
        return
    factor = tensors.take("scaling_factor", len(parts["W_dec"]))
    if cfg.get("finetuning_scaling_factor"):
        parts["W_dec"] = parts["W_dec"] * factor[:, None]
    elif not torch.equal(factor, torch.ones_like(factor)):
        raise ValueError(
            f"{tensors.where} has a scaling_factor, which cfg.json's finetuning_scaling_factor "
            "denies: one of them is wrong"
        )


def _normalisation(cfg: Mapping[str, Any], plain: Plain, d: int, lost: list[str]) -> None:
    name = cfg.get("normalize_activations")
    name = {True: "expected_average_only_in", False: "none", None: "none"}.get(name, name)
    if name == "constant_norm_rescale":
        plain.scale_input(d**0.5).normalize = True
    elif name in _UNSCALED:
        lost.append(_UNSCALED[name])
    elif name != "none":
        raise ValueError(
            f"cfg.json: normalize_activations={name!r} has no counterpart here: expected none, "
            "constant_norm_rescale or expected_average_only_in"
        )


def write(sae: SAE, folder: Path, metadata: Mapping[str, Any] | None = None) -> list[str]:
    """Write `cfg.json` and `sae_weights.safetensors`: there `SAE.load_from_disk(folder)` encodes
    and decodes as `sae` does, but for rounding.

    BatchTopK becomes JumpReLU with its threshold, ReLU "standard", attention the two matrices
    that it is the product of; `normalize_input` is `constant_norm_rescale` there.

    Args:
        metadata: model_name, hook_name, ...: what is known of the tokens.

    Returns:
        What could not be carried over, a sentence each.

    Raises:
        ValueError: sparsemax, which has no counterpart there.
    """
    plain = Plain.of(sae, NAME)
    m, d = plain.W_enc.shape
    lost = ["Options of the training and counters of dead latents are left out."]
    cfg: dict[str, Any] = {
        "architecture": _RULES[plain.rule],
        "d_in": d,
        "d_sae": m,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        # From 6.0 on a config is taken as it is.
        "metadata": {"sae_lens_version": "6.0.0", "trained_with": "clipsae", **(metadata or {})},
    }
    if plain.normalize:
        plain.scale_input(d**-0.5)
        cfg["normalize_activations"] = "constant_norm_rescale"
        lost.append("There a token of norm 0 gives NaN; here it gives codes of 0.")
    tensors = {"W_enc": plain.W_enc.T, "W_dec": plain.W_dec, "b_dec": plain.b_dec}
    if plain.rule == "gated":
        tensors |= {"b_gate": plain.b_gate, "b_mag": plain.b_mag, "r_mag": plain.r_mag}
    else:
        tensors["b_enc"] = plain.b_enc
    if plain.rule == "topk":
        cfg |= {"k": plain.k, "rescale_acts_by_decoder_norm": False}
    elif plain.rule == "jumprelu":
        tensors["threshold"] = plain.theta
    elif plain.rule == "batch_topk":
        tensors["threshold"] = torch.full((m,), plain.tau, dtype=torch.float64)
        lost.append(f"k={plain.k} is the training's: there it is a JumpReLU with one threshold.")
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: t.float().contiguous() for name, t in tensors.items()},
        folder / "sae_weights.safetensors",
    )
    (folder / "cfg.json").write_text(json.dumps(cfg, indent=2) + "\n")
    return lost
