"""SAELens: `cfg.json` and `sae_weights.safetensors`, from and to, without the library.

https://github.com/decoderesearch/SAELens: W_enc is [d, M], W_dec [M, d]; a config of version 6
names its architecture, one from before may name an activation function instead. Its listed
releases are read through the library, where it is installed: `saelens:RELEASE/SAE_ID`.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from clipsae.interop import sparsify
from clipsae.interop.files import Config, Tensors, names, read_config, read_weights
from clipsae.interop.plain import (
    GATE,
    NESTED_LOST,
    PURSUIT,
    TRAINING_LOST,
    Imported,
    Plain,
    write_files,
)
from clipsae.sae import SAE

NAME = "SAELens"
WEIGHTS = "sae_weights.safetensors"
ARCHITECTURES = (
    "standard",
    "topk",
    "abstopk",
    "jumprelu",
    "gated",
    "batchtopk",
    "matryoshka_batchtopk",
    PURSUIT,
)
_NAMES = {"relu": "standard", "batch_topk": "jumprelu", "abs_topk": "abstopk"}

_MATRYOSHKA = names(
    """
    matryoshka_widths include_outer_loss skip_final_matryoshka_width use_matryoshka_aux_loss
    detach_matryoshka_losses
    """
)

# Options of its trainings, versions 0 to 6, and of ViT-Prisma's, which grew out of it.
_UNUSED = names(
    """
    act_store_device activations_mixing_fraction adam_beta1 adam_beta2 autocast autocast_lm
    aux_loss_coefficient b_dec_init_method cached_activations_path checkpoint_path
    cls_token_only compile_llm compile_sae context_size d_out dataset_name dataset_path
    dataset_train_path dataset_trust_remote_code dataset_val_path dead_feature_threshold
    dead_feature_window decoder_heuristic_init decoder_init_norm decoder_orthogonal_init
    device dtype eval_batch_size_prompts eval_every_n_wandb_logs exclude_special_tokens
    expansion_factor feature_sampling_window finetuning_tokens from_pretrained_path
    hook_eval hook_layer hook_name hook_point hook_point_eval hook_point_layer image_size
    init_encoder_as_decoder_transpose initialization_method is_dataset_tokenized is_training
    jumprelu_bandwidth jumprelu_init_threshold jumprelu_sparsity_loss_mode
    jumprelu_ste_to_input jumprelu_tanh_scale l0_coefficient l0_warm_up_steps l1_coefficient
    l1_warm_up_steps layer_out_subtype layer_subtype llm_compilation_mode
    log_activations_store_to_wandb log_optimizer_state_to_wandb log_to_wandb logger lp_norm
    lr lr_decay_steps lr_end lr_scheduler_name lr_warm_up_steps max_grad_norm metadata
    min_explained_variance min_l0 model_class_name model_from_pretrained_kwargs model_kwargs
    model_name model_path mse_loss_normalization n_batches_in_buffer n_checkpoints
    n_eval_batches n_restart_cycles n_validation_runs neuronpedia_id normalize_sae_decoder
    num_epochs num_workers out_hook_point_layer pre_act_loss_coefficient prepend_bos resume
    return_out_only run_name sae_compilation_mode sae_lens_training_version sae_lens_version
    scale_sparsity_penalty_by_decoder_norm seed seqpos_slice
    sparsity_penalty_decoder_norm_lp_norm store_batch_size store_batch_size_prompts
    streaming target_l0 tokens_per_buffer total_training_images total_training_steps
    total_training_tokens train_batch_size train_batch_size_tokens training_tokens
    use_cached_activations use_ghost_grads use_patches_only use_sparse_activations verbose
    vit_model_cfg wandb_entity wandb_id wandb_log_frequency wandb_project
    """
)
_ONLY: dict[str, tuple[Any, ...]] = {
    "finetuning_method": ("scale", "decoder", "unrotated_decoder"),  # see `_finetuned`
    "gated_sae": (False,),  # PatchSAE's: parameters without a forward pass
    "hook_head_index": (),
    "hook_point_head_index": (),
    "is_transcoder": (False,),
    "noise_scale": (0,),
    "transcoder_with_skip_connection": (False,),
    "use_error_term": (False,),
}
_OF_TOKENS = names(
    """
    model_name hook_name hook_point block_layer module_name dataset_path class_token
    cls_token_only use_patches_only
    """
)


def read(folder: Path) -> Imported:
    """Read a folder of SAELens, or of sparsify, whose config has the same name.

    Raises:
        FileNotFoundError, ValueError: a file is missing or damaged, or an option that has no
            counterpart here.
    """
    weights = folder / WEIGHTS
    if not weights.is_file() and (folder / sparsify.WEIGHTS).is_file():
        return sparsify.read(folder)
    about = folder / "cfg.json"
    return convert(read_config(about), Tensors(read_weights(weights), weights), about)


def from_library(release: str, sae_id: str) -> Imported:
    """One of SAELens's listed releases, through the library.

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
    except Exception as error:  # its many loaders raise errors of many kinds
        raise ValueError(f"saelens:{release}/{sae_id}: SAELens cannot load it: {error}") from error
    return from_object(theirs)


def from_object(theirs: Any) -> Imported:
    """An SAE that SAELens has in memory."""
    return convert(theirs.cfg.to_dict(), Tensors(theirs.state_dict(), NAME), NAME)


def convert(
    cfg: Mapping[str, Any], tensors: Tensors, where: Path | str, unused: Iterable[str] = ()
) -> Imported:
    """From a config and the tensors beside it.

    Args:
        where: the config's file, for messages.
        unused: further options without effect on the codes.

    Raises:
        ValueError: an option or a tensor that is not understood, or does not fit.
    """
    config = Config(cfg, where)
    lost: list[str] = []
    about = cfg["metadata"] if isinstance(cfg.get("metadata"), dict) else cfg
    heads = {name: about.get(name) for name in ("hook_head_index", "hook_point_head_index")}
    Config(heads, where).refuse_others(only=_ONLY)
    architecture, k = _architecture(config)
    if architecture.endswith("batchtopk") and "topk_threshold" not in tensors:
        raise ValueError(f"{tensors.where} holds no topk_threshold: {architecture} encodes with it")
    b_enc = None if architecture in ("gated", PURSUIT) else "b_enc"
    W_enc = "W_dec" if architecture == PURSUIT else "W_enc.T"
    parts = tensors.linear(W_enc, b_enc, "W_dec", "b_dec")
    m, d = parts["W_enc"].shape
    for name, size in (("d_in", d), ("d_sae", m)):
        config.check_size(name, size)
    if cfg.get("is_transcoder") is None:  # ViT-Prisma's d_out is that of its transcoders
        config.check_size("d_out", d)
    if architecture in ("topk", "abstopk") and k > m:
        raise ValueError(f"{where}: k={k} is more than the {m} latents of the SAE")
    _finetuned(config, tensors, parts)
    if architecture == "standard":
        plain = Plain("relu", **parts)
    elif architecture in ("topk", "abstopk"):
        plain = Plain("topk" if architecture == "topk" else "abs_topk", **parts, k=k)
    elif architecture == PURSUIT:
        plain = _pursuit(config, parts)
    elif architecture == "gated":
        gate: dict[str, Any] = {name: tensors.take(name, m) for name in GATE}
        tensors.ignore("b_enc")  # ViT-Prisma's have one that no forward pass reads
        plain = Plain("gated", **parts, **gate)
    elif architecture == "jumprelu":
        log = "log_threshold" in tensors
        theta = tensors.take("log_threshold", m).exp() if log else tensors.take("threshold", m)
        plain = Plain("jumprelu", **parts, theta=theta)
    else:
        plain = Plain("batch_topk", **parts, k=k, tau=tensors.take("topk_threshold").item())
        lost.append("It is a checkpoint of the training: k counts in training, the threshold here.")
        config.known("topk_threshold_lr")
        if "matryoshka" in architecture:
            config.known(*_MATRYOSHKA)
            lost.append(NESTED_LOST)
    if not config.flag("apply_b_dec_to_input", True):
        if architecture == PURSUIT:  # which then does not add it either
            plain.b_dec = torch.zeros_like(plain.b_dec)
        else:
            plain.shift_input(1)
    if architecture.endswith("topk") and config.flag("rescale_acts_by_decoder_norm"):
        plain.scale_codes_by_rows()
    _normalisation(config, plain)
    # Before version 6 only the hook's name shows it.
    hook = config.get("hook_name", config.get("hook_point"))
    heads_shape = config.choice("reshape_activations", ("none", "hook_z"), "none")
    if heads_shape == "hook_z" or (isinstance(hook, str) and hook.endswith("_z")):
        lost.append("It reads an attention layer's heads side by side: flatten them before it.")
    reads = {name: about[name] for name in _OF_TOKENS if about.get(name) is not None}
    return plain.imported(
        NAME, config, tensors, unused=_UNUSED.union(unused), only=_ONLY, reads=reads, lost=lost
    )


def _architecture(config: Config) -> tuple[str, int]:
    """Its name, and k, 1 where it has none; before version 6 a topk was a standard SAE."""
    name = config.choice("architecture", ARCHITECTURES, "standard")
    function = "relu"
    for key in ("activation_fn", "activation_fn_str"):
        allowed = ("relu", "topk") if name in ("standard", "topk") else ("relu",)
        function = config.choice(key, allowed, function)
    options = config.part("activation_fn_kwargs")
    k: Any = 1
    if name.startswith(("topk", "abstopk")) or function == "topk":
        outside = name != "standard" or config.get("k") is not None
        if options.get("k") is None and outside:
            k = config.whole("k")
        else:
            k = options.whole("k")
            config.check_size("k", k)
        name = "topk" if name == "standard" else name
    elif name.endswith("batchtopk"):
        k = config.get("k")  # in training alone, where it may be a fraction
        k = max(1, round(k)) if isinstance(k, int | float) else 1
    options.refuse_others()
    return name, k


def _pursuit(config: Config, parts: dict[str, Any]) -> Plain:
    """Matching pursuit, whose steps end early by default, and are d at most."""
    plain = Plain(PURSUIT, **parts, k=parts["W_dec"].shape[1], residual_threshold=1e-2)
    if config.get("max_iterations") is not None:
        plain.k = config.whole("max_iterations")
    if config.get("residual_threshold") is not None:
        plain.residual_threshold = max(config.number("residual_threshold"), 0.0)
    plain.stop_on_repeat = config.flag("stop_on_duplicate_support", True)
    return plain


def _finetuned(config: Config, tensors: Tensors, parts: dict[str, Any]) -> None:
    """A factor for each code before decoding, which some old SAEs have: into the decoder's rows."""
    scaled = config.flag("finetuning_scaling_factor")
    scaled = scaled or config.options.get("finetuning_method") == "scale"
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


def _normalisation(config: Config, plain: Plain) -> None:
    allowed = ("none", "layer_norm", "constant_norm_rescale")[: 2 if plain.rule == PURSUIT else 3]
    name = config.get("normalize_activations", False)
    if isinstance(name, bool):  # as the first versions had it
        name = "expected_average_only_in" if name else "none"
    if name in allowed[2:]:
        plain.scale_input(plain.d**0.5).normalize = "unit"
    elif name == "layer_norm":
        plain.normalize = name
    elif name == "expected_average_only_in":
        raise ValueError(
            f"{config.where}: normalize_activations={name!r}: its tokens were scaled to a mean "
            "norm of sqrt(d), by a factor that is not saved: fold it into the weights with "
            "SAELens's fold_activation_norm_scaling_factor, and save it again"
        )
    else:
        config.choice("normalize_activations", allowed, "none")


def write(sae: SAE, folder: Path, metadata: Mapping[str, Any] | None = None) -> list[str]:
    """Write `cfg.json` and `sae_weights.safetensors`: there `SAE.load_from_disk(folder)` encodes
    and decodes as `sae` does, but for rounding.

    BatchTopK becomes JumpReLU with its threshold, ReLU "standard", AbsTopK "abstopk", attention the
    two matrices that it is the product of; `normalize="unit"` is `constant_norm_rescale` there,
    "layer_norm" has its name; means, deviations and whitening are folded into the matrices.

    Args:
        metadata: model_name, hook_name, ...: what is known of the tokens.

    Returns:
        What could not be carried over, a sentence each.

    Raises:
        ValueError: sparsemax, means of positions or matching pursuit of scaled tokens, which have
            no counterpart there.
    """
    plain = Plain.of(sae, NAME)
    lost = [TRAINING_LOST]
    cfg: dict[str, Any] = {
        "architecture": _NAMES.get(plain.rule, plain.rule),
        "d_in": plain.d,
        "d_sae": plain.latents,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        # From 6.0 on a config is taken as it is.
        "metadata": {"sae_lens_version": "6.0.0", "trained_with": "clipsae", **(metadata or {})},
    }
    if plain.normalize == "layer_norm":
        cfg["normalize_activations"] = "layer_norm"
    elif plain.normalize == "unit":
        plain.scale_input(plain.d**-0.5)
        cfg["normalize_activations"] = "constant_norm_rescale"
        lost.append("There a token of norm 0 gives NaN; here it gives codes of 0.")
    names = GATE if plain.rule == "gated" else ("b_enc",)
    tensors = {name: getattr(plain, name) for name in ("W_dec", "b_dec", *names)}
    tensors["W_enc"] = plain.W_enc.T
    if plain.rule == PURSUIT:
        tensors = {name: tensors[name] for name in ("W_dec", "b_dec")}
        cfg |= {
            "max_iterations": plain.k,
            "residual_threshold": plain.residual_threshold,
            "stop_on_duplicate_support": plain.stop_on_repeat,
        }
    elif plain.rule in ("topk", "abs_topk"):
        cfg |= {"k": plain.k, "rescale_acts_by_decoder_norm": False}
    elif plain.rule == "jumprelu":
        tensors["threshold"] = plain.theta
    elif plain.rule == "batch_topk":
        tensors["threshold"] = torch.full((plain.latents,), plain.tau, dtype=torch.float64)
        lost.append(f"k={plain.k} applies in training: there it is a JumpReLU with one threshold.")
    write_files(folder, WEIGHTS, tensors, "cfg.json", cfg)
    return lost
