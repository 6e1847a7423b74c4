"""overcomplete's SAEs: whole objects that `torch.save` has pickled, of which only the attributes
are read.

https://github.com/KempnerInstitute/overcomplete: z = rule(relu(x W^T + b)), x_hat = z D, with a row
per latent in both matrices; MpSAE has D alone, and finds z by matching pursuit. An object's class
is the rule; the dictionary of one in training mode is normalised as the library's `eval()` does. A
state_dict alone has neither k nor a threshold; beside visaebench's config it is read by
`visaebench`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipsae.interop.files import Config, Inert, Tensors, names
from clipsae.interop.plain import PURSUIT, Imported, Plain, just_below

NAME = "overcomplete"
RULES = {
    "SAE": "relu",
    "TopKSAE": "topk",
    "RATopKSAE": "topk",
    "BatchTopKSAE": "batch_topk",
    "JumpSAE": "jumprelu",
    "RAJumpSAE": "jumprelu",
    "MpSAE": PURSUIT,
}
_MODULES = {
    "base": "SAE",
    "topk_sae": "TopKSAE",
    "batchtopk_sae": "BatchTopKSAE",
    "jump_sae": "JumpSAE",
    "rasae": "RATopKSAE RAJumpSAE",
    "mp_sae": "MpSAE",
    "omp_sae": "OMPSAE",
    "qsae": "QSAE",
    "dictionary": "DictionaryLayer normalize_l2 normalize_max_l2 normalize_l1 normalize_max_l1 "
    "normalize_identity",
    "archetypal_dictionary": "RelaxedArchetypalDictionary",
    "modules": "MLPEncoder TieableEncoder IdentityEncoder",
    "kernels": "rectangle_kernel gaussian_kernel triangular_kernel cosine_kernel "
    "epanechnikov_kernel quartic_kernel silverman_kernel cauchy_kernel",
}
# What such a pickle may name.
CLASSES = (
    *(
        f"overcomplete.sae.{module}.{name}"
        for module, of in _MODULES.items()
        for name in of.split()
    ),
    *(
        f"torch.nn.modules.{name}"
        for name in (
            "container.Sequential",
            "container.ModuleList",
            "linear.Linear",
            "linear.Identity",
            "activation.ReLU",
            "batchnorm.BatchNorm1d",
            "normalization.LayerNorm",
        )
    ),
)
# Attributes of its modules without effect on the codes.
_UNUSED = names(
    """
    training nb_concepts top_k device fitted encoder dictionary bandwidth kernel_fn
    threshold_momentum dropout
    in_dimensions nb_candidates input_size n_components hidden_dim nb_blocks hidden_activation
    output_activation norm_layer residual tied_to in_features out_features num_features eps momentum
    affine track_running_stats inplace
    """
)

_NORMS: dict[Any, Callable[[Tensor], Tensor]] = {
    "normalize_l2": lambda D: D / (D.norm(dim=1, keepdim=True) + 1e-8),
    "normalize_l1": lambda D: D / (D.norm(p=1, dim=1, keepdim=True) + 1e-8),
    "normalize_max_l2": lambda D: D / D.norm(dim=1).amax(),
    "normalize_max_l1": lambda D: D / D.norm(p=1, dim=1).amax(),
    "normalize_identity": lambda D: D,
}


def convert(sae: Inert, path: Path) -> Imported:
    """From an object.

    Raises:
        ValueError: a class, an encoder or a normalisation that has no counterpart here; what is
            damaged or hostile.
    """
    kind = type(sae).__name__
    rule = RULES.get(kind)
    if rule is None:
        raise ValueError(
            f"{path} holds overcomplete's {kind}, which has no counterpart here: expected one of "
            f"{', '.join(RULES)}"
        )
    whole = _Module(sae, path)
    D = _dictionary(whole.child("dictionary"))
    W, b = D, torch.zeros(len(D))
    if rule == PURSUIT:
        whole.child("encoder").expect("IdentityEncoder").refuse_others()
    else:
        W, b = _encoder(whole.child("encoder"), D)
    plain = Plain(rule, W, D, b, torch.zeros(D.shape[1]))
    config, lost = whole.attributes, []
    if rule == PURSUIT:
        plain.k = config.whole("k")
        lost.append(
            "Where no row has a positive product with what is left over, there a code is negative, "
            "and here the steps end."
        )
    elif rule == "topk":
        plain.k = config.whole("top_k")
    elif rule == "batch_topk":
        plain.k, plain.tau = 1, just_below(torch.tensor(config.number("running_threshold"))).item()
        lost.append("Its k counts the codes of a whole batch: here its threshold counts.")
    elif rule == "jumprelu":
        plain.theta = just_below(whole.tensors.take("thresholds", plain.latents).exp())
    return plain.imported(NAME, config, whole.tensors, unused=_UNUSED, lost=lost)


class _Module:
    """One pickled module: its attributes, and its own parameters and buffers.

    Args:
        module: an `Inert` of a module.
        where: the file and what it is in it, for messages.

    Raises:
        ValueError: it is none.
    """

    def __init__(self, module: Any, where: Path | str) -> None:
        held = vars(module) if isinstance(module, Inert) else {}
        parts: list[Any] = [held.get(f"_{part}") for part in ("parameters", "buffers", "modules")]
        if not all(isinstance(part, dict) for part in parts):
            raise ValueError(f"{where}: expected a module of overcomplete or torch")
        parameters, buffers, self._children = parts
        self.names = list(self._children)
        own = {name: t for name, t in {**parameters, **buffers}.items() if t is not None}
        self.kind, self.where = type(module).__name__, where
        self.tensors = Tensors(own, where)
        self.fused = held.get("_fused_dictionary")
        self.attributes = Config(
            {n: v for n, v in held.items() if not str(n).startswith("_")}, where
        )

    def child(self, name: str) -> "_Module":
        """One of its modules."""
        return _Module(self._children.get(name), f"{self.where}: {name}")

    def expect(self, *kinds: str) -> "_Module":
        """Itself, if it is of one of these classes."""
        if self.kind not in kinds:
            raise ValueError(
                f"{self.where}={self.kind!r} has no counterpart here: expected {' or '.join(kinds)}"
            )
        return self

    def take(self, name: str, *shape: int) -> Tensor:
        """A parameter or buffer of this shape, float64."""
        return self.tensors.take(name, *shape).double()

    def refuse_others(self) -> None:
        """Refuse what was not read of it."""
        self.attributes.refuse_others(_UNUSED)
        self.tensors.refuse_others()


def _dictionary(layer: _Module) -> Tensor:
    """[M, d], as the library's `eval()` fixes it, at once or before it was saved."""
    layer.expect("DictionaryLayer", "RelaxedArchetypalDictionary")
    shape = layer.tensors.matrix_shape
    if not layer.attributes.flag("training", True):
        fixed = Tensors({"_fused_dictionary": layer.fused}, layer.where)
        return fixed.take("_fused_dictionary", *fixed.matrix_shape("_fused_dictionary"))
    if layer.kind == "DictionaryLayer":
        D = layer.take("_weights", *shape("_weights"))
        function = layer.attributes.get("normalization")
        name = getattr(function, "__name__", function)
        if name not in _NORMS:
            raise ValueError(
                f"{layer.where}: normalization={name!r} has no counterpart here: expected one of "
                f"{', '.join(_NORMS)}"
            )
        D = _NORMS[name](D)
    else:
        (m, points), (_, d) = shape("W"), shape("C")
        W, relax = layer.take("W", m, points).relu(), layer.take("Relax", m, d)
        norm = relax.norm(dim=1, keepdim=True).clamp(min=1e-30)
        relax = relax * (layer.attributes.number("delta") / norm).clamp(max=1)
        D = W / (W.sum(dim=1, keepdim=True) + 1e-8) @ layer.take("C", points, d) + relax
    D = D * layer.take("multiplier").exp()
    layer.refuse_others()
    return D


def _encoder(encoder: _Module, D: Tensor) -> tuple[Tensor, Tensor]:
    """W [M, d] and b [M] of the scores; batch normalisation is folded into them."""
    m, d = D.shape
    if encoder.expect("MLPEncoder", "TieableEncoder").kind == "TieableEncoder":
        tied = "weight" not in encoder.tensors
        W = D if tied else encoder.take("weight", m, d)
        b = encoder.take("bias", m) if "bias" in encoder.tensors else torch.zeros(m)
        encoder.refuse_others()
        return W, b
    if encoder.child("mlp_blocks").names:
        raise ValueError(f"{encoder.where}: hidden layers have no counterpart here: expected none")
    encoder.child("final_activation").expect("ReLU")
    linear = encoder.child("final_block").child("0").expect("Linear")
    norm = encoder.child("final_block").child("1").expect("Identity", "BatchNorm1d")
    W, b = linear.take("weight", m, d), linear.take("bias", m)
    if norm.kind == "BatchNorm1d":
        scale = (
            norm.take("weight", m)
            / (norm.take("running_var", m) + norm.attributes.number("eps")).sqrt()
        )
        W = W * scale[:, None]
        b = (b - norm.take("running_mean", m)) * scale + norm.take("bias", m)
        norm.tensors.ignore("num_batches_tracked")
    for part in (encoder, linear, norm):
        part.refuse_others()
    return W, b
