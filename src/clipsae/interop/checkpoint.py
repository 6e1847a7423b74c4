"""One pickled file. Its content tells whose it is; `{"cfg", "state_dict"}` is PatchSAE's, the
Sparsemax SAE's, BatchTopK's, and those of early SAELens and ViT-Prisma, from which the first two
grew.

`cfg` is a dictionary or an object of the training code's config class, of which only the
attributes are read. Sources: https://github.com/dynamical-inference/patchsae,
https://github.com/qyj-bkjx/Sparsemax-SAE, https://github.com/decoderesearch/SAELens,
https://github.com/Prisma-Multimodal/ViT-Prisma. A config must say which activation it is of, or be
of a training that has ReLU alone. But for the Sparsemax SAE they are one form, z = rule((x - b_dec)
W_enc + b_enc), x_hat = z W_dec + b_dec, and PatchSAE has no option of it. (PatchSAE's evaluation
adds a constant of 0.105 to every element of x_hat, which is no part of the SAE.)
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from clipsae.interop import batchtopk, clipscope, msae, overcomplete, saelens, saev
from clipsae.interop.files import Config, Inert, Tensors, names, read_config, read_weights
from clipsae.interop.plain import Imported, assemble

SUFFIXES = (".pt", ".pth", ".ckpt")
PRISMA = "ViT-Prisma"
WEIGHTS = "weights.pt"

_EXPECTED = (
    "expected a file of PatchSAE, the Sparsemax SAE, BatchTopK, early SAELens or ViT-Prisma "
    "({'cfg', 'state_dict'}), of saev, MSAE or clipscope, or a whole SAE of overcomplete"
)

# A config with one of the first says which activation it has; one with one of the others is of a
# training that has ReLU alone.
_OF_ACTIVATIONS = names("architecture activation_fn activation_fn_str")
_OF_RELU = names("block_layer class_token l1_coefficient use_ghost_grads")

# What trainings save beside the SAE, to go on from.
_OF_TRAINING = names(
    """
    optimizer optimizer_state_dict scheduler scheduler_state_dict lr_scheduler epoch step
    global_step n_training_steps n_training_tokens wandb_id
    """
)

CLASSES = (
    *overcomplete.CLASSES,
    *(
        f"{module}.{name}"
        for module in ("src.sae_training.config", "sae_training.config")
        for name in ("ViTSAERunnerConfig", "Config", "LanguageModelSAERunnerConfig")
    ),
    "sae_lens.training.config.LanguageModelSAERunnerConfig",
    "vit_prisma.sae.config.VisionModelSAERunnerConfig",
    "vit_prisma.configs.HookedViTConfig.HookedViTConfig",
)

# Options of PatchSAE's training, and of the Sparsemax SAE's.
_PATCHSAE = names(
    """
    b_dec_init_method batch_size block_layer cached_activations_path checkpoint_path class_token
    create_dataloader custom_clip_ckpt_path dataset_path dead_feature_estimation_method
    dead_feature_threshold dead_feature_window debug_numerics device dtype expansion_factor
    feature_reinit_scale feature_sampling_method feature_sampling_window from_pretrained_path
    ghost_grad_exp_clamp_max image_height image_key image_width l1_coefficient label_key
    log_to_wandb lr lr_scheduler_name lr_warm_up_steps max_batch_size_for_vit_forward_pass
    model_name module_name mse_cls_coefficient n_batches_in_store n_checkpoints norm_eps
    resample_batches run_name seed store_size total_training_tokens use_cached_activations
    use_ghost_grads wandb_entity wandb_log_frequency wandb_project
    """
)


def read(path: Path) -> Imported:
    """Read one file, of the library that its content tells; the Sparsemax SAE if it holds
    `concept`.

    Raises:
        FileNotFoundError, ValueError: none there, or none of these, or a hostile one; an option
            that is not understood.
    """
    header = saev.header_of(path)
    if header:
        return saev.read(path, header)
    content = read_weights(path, CLASSES)
    if isinstance(content, Inert):
        return overcomplete.convert(content, path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}: {_EXPECTED}")
    for library in (msae, clipscope):
        if library.holds(content):
            return library.convert(content, path)
    if "state_dict" not in content:
        raise ValueError(f"{path} holds no 'state_dict': {_EXPECTED}")
    file = Config(content, path)
    cfg = file.get("config", {})
    cfg = _attributes(file.get("cfg", cfg))
    tensors = Tensors(file.get("state_dict"), path)
    file.refuse_others(_OF_TRAINING)
    if not isinstance(cfg, dict):
        raise ValueError(f"{path}: cfg is a {type(cfg).__name__}: expected names and values")
    cfg = {str(name): _attributes(value) for name, value in cfg.items()}
    if "concept" in tensors:
        return _sparsemax(Config(cfg, path), tensors)
    if batchtopk.holds(cfg):
        return batchtopk.convert(cfg, tensors, path)
    if not _OF_ACTIVATIONS & set(cfg) and not _OF_RELU & set(cfg):
        raise ValueError(
            f"{path}: its cfg does not say which activation makes the codes: expected one of "
            f"{', '.join(sorted(_OF_ACTIVATIONS))}, or an option of a training that has ReLU alone "
            f"({', '.join(sorted(_OF_RELU))}): add what it is to its cfg"
        )
    found = saelens.convert(cfg, tensors, path, _PATCHSAE)
    if set(cfg) <= _PATCHSAE | {"d_in", "d_sae", "gated_sae"}:
        return replace(found, format="PatchSAE")
    return replace(found, format=PRISMA) if is_prisma(cfg) else found


def is_prisma(cfg: Mapping[str, Any]) -> bool:
    """Whether a config is ViT-Prisma's."""
    return "vit_model_cfg" in cfg or cfg.get("model_class_name") == "HookedViT"


def read_prisma(folder: Path) -> Imported:
    """Read a folder of ViT-Prisma: `config.json`, and `weights.pt` or the only other pickle.

    Raises:
        FileNotFoundError, ValueError: as `read`.
    """
    about, path = folder / "config.json", folder / WEIGHTS
    others = sorted(folder.glob("*.pt"))
    if not path.is_file() and len(others) == 1:
        path = others[0]
    content = read_weights(path, CLASSES)
    state = content.get("state_dict", content) if isinstance(content, dict) else content
    found = saelens.convert(read_config(about), Tensors(state, path), about)
    return replace(found, format=PRISMA)


def _attributes(value: Any) -> Any:
    return vars(value) if isinstance(value, Inert) else value


def _sparsemax(config: Config, tensors: Tensors) -> Imported:
    """The Sparsemax SAE's release (arXiv 2604.14925): `concept` [M, d] is C, `k` [d, d] is W_K and
    `v` [d, d] is W_V, all multiplied from the right; the query is x / ||x||, the scale is 1, and
    codes are the scores on the support of their sparsemax."""
    latents, d = tensors.matrix_shape("concept")
    sae = assemble(
        {
            "d": d,
            "latents": latents,
            "architecture": "attention",
            "activation": "sparsemax",
            "normalize": "unit",
            "reconstruction_weight": 10.0,
            "query": "identity",
            "scale": 1.0,
            "weights": "scores",
            "max_activation_frequency": 0.1,
        },
        {
            "architecture.C": tensors.take("concept", latents, d),
            "architecture.W_K": tensors.take("k", d, d),
            "architecture.W_V": tensors.take("v", d, d),
        },
    )
    lost = [
        "The release also suppresses latents that were active on more than 10 % of the tokens seen "
        "since it was started; it does not save which, so that its codes depend on the order of "
        "the images, and here none is suppressed."
    ]
    # Parameters of the code it grew out of, which its forward pass never reads.
    names = ("W_enc", "b_enc", "W_dec", "b_dec", "r_mag", "b_mag", "log_threshold")
    unused = [name for name in names if name in tensors]
    tensors.ignore(*unused)
    if unused:
        lost.append(f"{', '.join(unused)} are in the file, but its code never reads them.")
    reads = config.known("model_name", "block_layer", "module_name", "dataset_path", "class_token")
    config.refuse_others(_PATCHSAE | {"d_in", "d_sae"}, {"gated_sae": (False,)})
    tensors.refuse_others()
    return Imported(sae, "Sparsemax SAE's release", reads, tuple(lost))
