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

from clipsae.interop import sparsify
from clipsae.interop.known import SAELENS, Harmless, names, refuse_others
from clipsae.interop.plain import Imported, Plain
from clipsae.interop.safely import Tensors, flag, read_config, read_safetensors, same_size, size
from clipsae.sae import SAE

NAME = "SAELens"
FILES = ("cfg.json", "sae_weights.safetensors")
MARKS = ("cfg.json",)

ARCHITECTURES = ("standard", "topk", "jumprelu", "gated", "batchtopk", "matryoshka_batchtopk")

# What is read; with some architectures alone: what is read or decides their training.
_READ = names(
    """
    architecture d_in d_out d_sae activation_fn activation_fn_str activation_fn_kwargs
    apply_b_dec_to_input normalize_activations reshape_activations finetuning_scaling_factor
    """
)
_TOPK = names("k rescale_acts_by_decoder_norm")
_BATCH = _TOPK | {"topk_threshold_lr"}
_READ_OF = {
    "topk": _TOPK,
    "batchtopk": _BATCH,
    "matryoshka_batchtopk": _BATCH
    | names(
        """
        matryoshka_widths include_outer_loss skip_final_matryoshka_width use_matryoshka_aux_loss
        detach_matryoshka_losses
        """
    ),
}
_HARMLESS: Harmless = {
    "finetuning_method": ("scale", "decoder", "unrotated_decoder"),  # see `_finetuned`
    "gated_sae": (False,),  # PatchSAE's: parameters without a forward pass
    "hook_head_index": (),
    "hook_point_head_index": (),
    "is_transcoder": (False,),
    "noise_scale": (0,),
    "transcoder_with_skip_connection": (False,),
    "use_error_term": (False,),
}
_OF_TOKENS = (
    *("model_name", "hook_name", "hook_point", "block_layer", "module_name", "dataset_path"),
    *("class_token", "cls_token_only", "use_patches_only"),
)
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
        FileNotFoundError, ValueError: a file is missing or damaged, or an option that has no
            counterpart here.
    """
    weights = folder / "sae_weights.safetensors"
    if not weights.is_file() and (folder / sparsify.WEIGHTS).is_file():
        return sparsify.read(folder)
    about = folder / "cfg.json"
    cfg = read_config(about)
    return convert(cfg, Tensors(weights, read_safetensors(weights)), about)


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
    return convert(theirs.cfg.to_dict(), Tensors(NAME, theirs.state_dict()), NAME)


def convert(
    cfg: Mapping[str, Any], tensors: Tensors, where: Path | str, known: frozenset[str] = SAELENS
) -> Imported:
    """From a config and the tensors beside it.

    Args:
        where: the config's file, for messages.
        known: options of the training.

    Raises:
        ValueError: an option or a tensor that is not understood, or does not fit.
    """
    lost: list[str] = []
    metadata = cfg.get("metadata") if isinstance(cfg.get("metadata"), dict) else None
    about = cfg if metadata is None else metadata
    architecture, k = _architecture(cfg, tensors, where)
    refuse_others(cfg, known | _READ | _READ_OF.get(architecture, frozenset()), _HARMLESS, where)
    heads = {name: about.get(name) for name in ("hook_head_index", "hook_point_head_index")}
    refuse_others(heads, (), _HARMLESS, where)
    d, m = tensors.shape("W_enc", 2)
    for name, found in (("d_in", d), ("d_out", d), ("d_sae", m)):
        same_size(cfg, name, found, where)
    if k is not None and architecture == "topk" and k > m:
        raise ValueError(f"{where}: k={k} is more than the {m} latents that there are")
    parts: dict[str, Any] = {
        "W_enc": tensors.take("W_enc", d, m).T,
        "W_dec": tensors.take("W_dec", m, d),
        "b_enc": torch.zeros(m) if architecture == "gated" else tensors.take("b_enc", m),
        "b_dec": tensors.take("b_dec", d),
    }
    _finetuned(cfg, tensors, parts, where)
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
    tensors.refuse_others()
    if not flag(cfg, "apply_b_dec_to_input", True, where):
        plain.shift_input(1)
    if flag(cfg, "rescale_acts_by_decoder_norm", False, where):
        plain.scale_codes_by_rows()
    _normalisation(cfg, plain, d, where)
    if _reads_heads(cfg, where):
        lost.append("It reads an attention layer's heads side by side: flatten them before it.")
    reads = {name: about[name] for name in _OF_TOKENS if about.get(name) is not None}
    return Imported(plain.to_sae(), NAME, reads, tuple(lost))


def _architecture(cfg: Mapping[str, Any], tensors: Tensors, where: Path | str) -> tuple[str, Any]:
    """Its name, and k where it has one; before version 6 a topk was a standard SAE."""
    name = "standard" if cfg.get("architecture") is None else cfg["architecture"]
    if name not in ARCHITECTURES:
        raise ValueError(
            f"{where}: architecture={name!r} has no counterpart here: expected one of "
            f"{', '.join(ARCHITECTURES)}"
        )
    function = "relu"
    for key in ("activation_fn", "activation_fn_str"):
        function = function if cfg.get(key) is None else cfg[key]
        allowed = ("relu", "topk") if name in ("standard", "topk") else ("relu",)
        if function not in allowed:
            raise ValueError(f"{where}: {key}={function!r}: expected {' or '.join(allowed)}")
    options = {} if cfg.get("activation_fn_kwargs") is None else cfg["activation_fn_kwargs"]
    if not isinstance(options, dict):
        raise ValueError(f"{where}: activation_fn_kwargs={options!r}: expected names and values")
    if name == "standard" and function == "topk":
        name = "topk"
    of_options = f"{where}: activation_fn_kwargs"
    refuse_others(options, ("k",) if name == "topk" else (), {}, of_options)
    if name in ("batchtopk", "matryoshka_batchtopk"):
        if "topk_threshold" not in tensors:
            raise ValueError(f"{tensors.where} holds no topk_threshold, which {name} encodes with")
        k = cfg.get("k")  # of a batch: there it may be a fraction, here it is the training's alone
        return name, max(1, round(k)) if isinstance(k, int | float) else 1
    if name != "topk":
        return name, None
    if options.get("k") is None:
        return name, size(cfg, "k", where if cfg.get("architecture") == "topk" else of_options)
    k = size(options, "k", of_options)
    same_size(cfg, "k", k, where)
    return name, k


def _finetuned(
    cfg: Mapping[str, Any], tensors: Tensors, parts: dict[str, Any], where: Path | str
) -> None:
    """A factor for each code before decoding, which some old SAEs have: into the decoder's rows."""
    scaled = flag(cfg, "finetuning_scaling_factor", False, where)
    scaled = scaled or cfg.get("finetuning_method") == "scale"
    name = "scaling_factor" if "scaling_factor" in tensors else "finetuning_scaling_factor"
    if not scaled and name not in tensors:
        return
    factor = tensors.take(name, len(parts["W_dec"]))
    if scaled:
        parts["W_dec"] = parts["W_dec"] * factor[:, None]
    elif not torch.equal(factor, torch.ones_like(factor)):
        raise ValueError(
            f"{tensors.where} has a {name}, which the config's finetuning_scaling_factor denies: "
            "one of them is wrong"
        )


def _normalisation(cfg: Mapping[str, Any], plain: Plain, d: int, where: Path | str) -> None:
    name = cfg.get("normalize_activations")
    if isinstance(name, bool | None):  # as the first versions had it
        name = "expected_average_only_in" if name else "none"
    if name == "constant_norm_rescale":
        plain.scale_input(d**0.5).normalize = True
    elif name == "expected_average_only_in":
        raise ValueError(
            f"{where}: normalize_activations={name!r}: its tokens were scaled to a mean norm of "
            "sqrt(d), by a factor that is not saved: fold it into the weights with SAELens's "
            "fold_activation_norm_scaling_factor, and save it again"
        )
    elif name != "none":
        raise ValueError(
            f"{where}: normalize_activations={name!r} has no counterpart here: expected none or "
            "constant_norm_rescale"
        )


def _reads_heads(cfg: Mapping[str, Any], where: Path | str) -> bool:
    shape = cfg.get("reshape_activations")
    if shape not in (None, "none", "hook_z"):
        raise ValueError(f"{where}: reshape_activations={shape!r}: expected none or hook_z")
    # Before version 6 its name alone told.
    hook = cfg.get("hook_name", cfg.get("hook_point"))
    return shape == "hook_z" or (isinstance(hook, str) and hook.endswith("_z"))


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
