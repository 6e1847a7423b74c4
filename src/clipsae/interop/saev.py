"""saev's checkpoints: one file, a line of JSON and a pickled state_dict after it.

https://github.com/OSU-NLP-Group/saev, the layout of `saev.nn.dump`. Its versions differ in what
they encode: the first (no `schema` in the line) relu((x - b_dec) W_enc + b_enc), those from schema
2 on rule(x W_enc + b_enc), and schema 1 either; x_hat = z W_dec + b_dec in all of them. W_enc is
[d, M], W_dec [M, d].
"""

import json
from pathlib import Path

from clipsae.interop.files import Config, Tensors, names, read_weights
from clipsae.interop.plain import NEGATIVE_LOST, Imported, Plain

NAME = "saev"

# Options of its training, and what describes the file.
_UNUSED = names(
    """
    commit exp_factor ghost_grads kind l1_coeff lib momentum n_reinit_samples normalize_w_dec
    reinit_blend reinit_enc_dec_tranpose remove_parallel_grads seed sparsity sparsity_coeff
    use_ghost_grads aux
    """
)
_SCALED = (
    "saev's loader may subtract a mean from tokens and divide them by a norm (scale_mean, "
    "scale_norm), which its file does not hold: give it tokens treated alike."
)


def header_of(path: Path) -> bytes:
    """The line that a file begins with, if it is one of these; nothing of other files, which are
    zip archives or pickles."""
    with path.open("rb") as file:
        return b"{" + file.readline() if file.read(1) == b"{" else b""


def read(path: Path, header: bytes) -> Imported:
    """Read a file.

    Raises:
        FileNotFoundError, ValueError: it is damaged or hostile; another activation, one that
            depends on the batch, or a version that cannot be told.
    """
    try:
        content = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} begins with {{, and its first line is not JSON: {error}"
        ) from error
    about = Config(content, path)
    schema = about.get("schema", 0)
    if schema not in range(6) or isinstance(schema, bool):
        raise ValueError(f"{path}: schema={schema!r}: expected none or 1 to 5, as saev has written")
    config = about.part("cfg") if schema else about
    tensors = Tensors(read_weights(path, skip=len(header)), path)
    parts = tensors.linear("W_enc.T", "b_enc", "W_dec", "b_dec")
    m, d = parts["W_enc"].shape
    for name, size in (("d_vit", d), ("d_model", d), ("d_sae", m)):
        config.check_size(name, size)
    lost = [_SCALED]
    kind, options = _activation(about, config) if schema else ("Relu", config)
    if kind == "Relu":
        plain = Plain("relu", **parts)
    elif kind == "TopK":
        plain = Plain("topk", **parts, k=options.whole("top_k"))
        lost.append(NEGATIVE_LOST)
    else:
        if "activation.threshold" not in tensors:
            raise ValueError(
                f"{path} holds no activation.threshold: its version of BatchTopK chooses codes "
                "among a whole batch, so that they depend on what else is in it"
            )
        tau = tensors.take("activation.threshold").item()
        plain = Plain("batch_topk", **parts, k=options.whole("top_k"), tau=tau)
    if schema == 1 and kind == "Relu" and about.get("cls") == "Relu" and plain.b_dec.any():
        raise ValueError(
            f"{path}: schema=1, cls='Relu': some versions of saev that wrote this subtract b_dec "
            "before they encode, and others do not: write it as SAELens's files, whose "
            "apply_b_dec_to_input says which"
        )
    if schema:
        plain.shift_input(1)
    else:
        lost.append(
            "b_dec is subtracted from tokens, as in its training: later saev leaves it out."
        )
    options.refuse_others(_UNUSED)
    about.refuse_others(_UNUSED | {"cls"})
    return plain.imported(NAME, config, tensors, unused=_UNUSED, lost=lost)


def _activation(about: Config, config: Config) -> tuple[str, Config]:
    """Its class's name, and its options: in schema 1 they may be among the SAE's own."""
    if config.get("activation") is None:
        return about.choice("cls", ("Relu", "TopK", "BatchTopK")), config
    found = config.part("activation")
    kind = found.choice("cls", ("Relu", "TopK", "BatchTopK"))
    options = found.part("params")
    found.refuse_others()
    return kind, options
