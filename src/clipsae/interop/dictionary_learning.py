"""dictionary_learning's folders: `ae.pt`, a pickled state_dict, and `config.json`.

https://github.com/saprmarks/dictionary_learning: the class in `trainer.dict_class` decides how
the tensors are named and what is computed.
"""

from pathlib import Path
from typing import Any

from clipsae.interop.files import Config, Tensors, names, read_config, read_weights
from clipsae.interop.plain import NESTED_LOST, Imported, Plain

# Names of W_enc, b_enc, W_dec, b_dec by class.
_MATRICES = ("W_enc.T", "b_enc", "W_dec", "b_dec")
_LINEAR = ("encoder.weight", "encoder.bias", "decoder.weight.T")
_NAMES = {
    "AutoEncoder": (*_LINEAR, "bias"),
    "AutoEncoderNew": (*_LINEAR, "decoder.bias"),
    "GatedAutoEncoder": ("encoder.weight", None, "decoder.weight.T", "decoder_bias"),
    "JumpReluAutoEncoder": _MATRICES,
    "AutoEncoderTopK": (*_LINEAR, "b_dec"),
    "BatchTopKSAE": (*_LINEAR, "b_dec"),
    "MatryoshkaBatchTopKSAE": _MATRICES,
}
_GATE = {"b_gate": "gate_bias", "b_mag": "mag_bias", "r_mag": "r_mag"}

_UNUSED = names(
    """
    anneal_end anneal_start auxk_alpha bandwidth compile_model decay_start device
    initial_sparsity_penalty k_anneal_steps l1_penalty l1_warmup_steps layer lm_name lp_norm lr
    n_sparsity_updates norm_factor p_end p_start resample_steps seed sparsity_function
    sparsity_penalty sparsity_queue_length sparsity_warmup_steps steps submodule_name target_l0
    threshold_beta threshold_start_step top_k_aux trainer_class wandb_name warmup_steps
    """
)


def read(folder: Path) -> Imported:
    """Read a folder.

    Raises:
        FileNotFoundError, ValueError: a file is missing, hostile or damaged; another class.
    """
    about = Config(read_config(folder / "config.json"), folder / "config.json")
    trainer = about.part("trainer")
    name = trainer.choice("dict_class", tuple(_NAMES))
    buffer = about.get("buffer")  # where the tokens came from
    if isinstance(buffer, dict):
        Config({"io": buffer.get("io")}, f"{about.where}: buffer").refuse_others(
            only={"io": ("in", "out")}
        )
    about.refuse_others()
    tensors = Tensors(read_weights(folder / "ae.pt"), folder / "ae.pt")
    parts = tensors.linear(*_NAMES[name])
    lost: list[str] = []
    m, d = parts["W_enc"].shape
    if name == "AutoEncoder":
        plain = Plain("relu", **parts)
    elif name == "AutoEncoderNew":
        plain = Plain("relu", **parts).shift_input(1)
    elif name == "GatedAutoEncoder":
        gate: dict[str, Any] = {ours: tensors.take(theirs, m) for ours, theirs in _GATE.items()}
        plain = Plain("gated", **parts, **gate).scale_codes_by_rows()
    elif name == "JumpReluAutoEncoder":
        plain = Plain("jumprelu", **parts, theta=tensors.take("threshold", m))
        plain.shift_input(1).scale_codes_by_rows()
    else:
        plain = Plain("batch_topk", **parts, k=trainer.whole("k"))
        if "k" in tensors:
            trainer.check_size("k", int(tensors.take("k").item()))
        if name == "AutoEncoderTopK":
            plain.rule = "topk"
            tensors.ignore("threshold")  # which its forward pass does not use
        else:
            plain.tau = tensors.take("threshold").item()
            if plain.tau < 0:
                lost.append(
                    "It was stopped before its threshold was first estimated: every positive score "
                    "passes, as it does there."
                )
        if name == "MatryoshkaBatchTopKSAE":
            trainer.known("group_fractions", "group_weights", "group_sizes")
            tensors.ignore("group_sizes")
            lost.append(NESTED_LOST)
    trainer.check_size("activation_dim", d)
    trainer.check_size("dict_size", m)
    reads = trainer.known("lm_name", "layer", "submodule_name")
    return plain.imported(
        "dictionary_learning", trainer, tensors, unused=_UNUSED, reads=reads, lost=lost
    )
