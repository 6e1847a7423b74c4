"""The SAEs of BatchTopK's authors: `config.json` and `sae.pt`, or `{"cfg", "state_dict"}`.

https://github.com/bartbussmann/BatchTopK and, with nested groups, matryoshka_sae beside it
(Bussmann et al., 2024, arXiv 2412.06410): z = rule((x - b_dec) W_enc), with b_enc for `vanilla`,
x_hat = z W_dec + b_dec; W_enc is [d, M], W_dec [M, d]. Their JumpReLU encodes x itself, with b_enc.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clipsae.interop.files import Config, Tensors, names, read_config, read_weights
from clipsae.interop.plain import NESTED_LOST, Imported, Plain

NAME = "BatchTopK"
WEIGHTS = "sae.pt"
RULES = {
    "vanilla": "relu",
    "topk": "topk",
    "batchtopk": "batch_topk",
    "global-matryoshka-topk": "batch_topk",
    "jumprelu": "jumprelu",
}

# Options of the training.
_UNUSED = names(
    """
    aux_penalty bandwidth batch_size beta1 beta2 checkpoint_freq device dtype l1_coeff
    l1_warmup_frac lr max_grad_norm model_batch_size n_batches_to_dead name num_batches_in_buffer
    num_tokens perf_log_freq pool_size quantile quantile_lr seed seq_len softmax_aux_penalty top_k
    top_k_aux wandb_project
    """
)
_ONLY = {"activation": ("relu",)}


def holds(cfg: Mapping[str, Any]) -> bool:
    """Whether a config is one of theirs."""
    return "sae_type" in cfg and "act_size" in cfg


def read(folder: Path) -> Imported:
    """Read a folder.

    Raises:
        FileNotFoundError, ValueError: as `convert`; a file is missing, hostile or damaged.
    """
    path = folder / WEIGHTS
    about = folder / "config.json"
    return convert(read_config(about), Tensors(read_weights(path), path), about)


def convert(cfg: Mapping[str, Any], tensors: Tensors, where: Path) -> Imported:
    """From a config and the tensors beside it.

    Raises:
        ValueError: another rule, one that depends on the batch; an option or a tensor that is not
            understood, or does not fit.
    """
    config = Config(cfg, where)
    kind = config.choice("sae_type", tuple(RULES))
    rule = RULES[kind]
    tied = config.flag("tied_weights")
    parts = tensors.linear("W_enc.T", "b_enc", "W_enc.T" if tied else "W_dec", "b_dec")
    if tied:
        tensors.ignore("W_dec")
    plain = Plain(rule, **parts)
    if "topk" in kind and plain.b_enc.any() and not config.flag("use_encoder_bias"):
        raise ValueError(
            f"{where}: sae_type={kind!r} adds b_enc with use_encoder_bias=true alone, and b_enc is "
            "not 0: one of them is wrong"
        )
    config.known("use_encoder_bias")
    if config.flag("input_unit_norm"):
        plain.normalize = "layer_norm"
    for name, size in (("act_size", plain.d), ("dict_size", plain.latents)):
        config.check_size(name, size)
    lost = []
    if "topk" in kind:
        plain.k = config.whole("top_k")
    if rule == "batch_topk":
        if "threshold" not in tensors:
            raise ValueError(
                f"{where}: sae_type={kind!r}: {tensors.where} holds no threshold, without which "
                "codes are chosen among a whole batch and depend on what else is in it"
            )
        plain.tau = tensors.take("threshold").item()
    elif rule == "jumprelu":
        plain.theta = tensors.take("jumprelu.log_threshold", plain.latents).exp()
        plain.shift_input(1)
    if "matryoshka" in kind:
        config.known("group_sizes")
        lost.append(NESTED_LOST)
    reads = config.known("model_name", "hook_point", "site", "layer", "dataset_path")
    return plain.imported(NAME, config, tensors, unused=_UNUSED, only=_ONLY, reads=reads, lost=lost)
