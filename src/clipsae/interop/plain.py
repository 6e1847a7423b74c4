"""The form that all libraries share: one encoder matrix, one decoder matrix, biases, a rule.

    z = rule((x - b_dec) W_enc^T + b_enc)        x_hat = z W_dec + b_dec

Every importer brings what it read into this form, and every exporter starts from it. What other
libraries do otherwise is folded into the weights, exactly but for rounding (computed in float64).
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from clipsae.interop.files import Config, Tensors
from clipsae.sae import SAE
from clipsae.sae.normalization import Normalization

RULES = ("relu", "jumprelu", "gated", "topk", "abs_topk", "batch_topk")
PURSUIT = "matching_pursuit"
WITH_K = ("topk", "abs_topk", "batch_topk", PURSUIT)
GATE = ("b_gate", "b_mag", "r_mag")
STOPS = ("residual_threshold", "stop_on_repeat")
TRAINING_LOST = "Options of the training and counters of dead latents are left out."

NESTED_LOST = "The nested groups matter in its training alone: here there is one group."
# Of a TopK without a ReLU.
NEGATIVE_LOST = (
    "A token with fewer than k positive scores has negative codes there, and fewer codes here."
)


@dataclass(frozen=True)
class Imported:
    """An SAE from elsewhere.

    Attributes:
        sae: in eval mode, on the CPU.
        format: whose it was: "SAELens", ...
        reads: what it says of the tokens it was trained on (model, layer, ...), as it says it.
        lost: what could not be carried over, a sentence each.
    """

    sae: SAE
    format: str
    reads: dict[str, Any] = field(default_factory=dict)
    lost: tuple[str, ...] = ()


@dataclass
class Plain:
    """A linear SAE, or matching pursuit. Attributes of other rules are None.

    Attributes:
        rule: the activation's name, one of `RULES`, or `PURSUIT`, whose codes are those of
            `clipsae.sae.matching_pursuit`: W_enc and b_enc are then unused.
        W_enc, W_dec: [M, d], a row per latent.
        b_enc: [M]; unused by "gated".
        b_dec: [d].
        k: of "topk", "abs_topk", "batch_topk" and `PURSUIT`.
        residual_threshold, stop_on_repeat: of `PURSUIT`.
        tau: the threshold of "batch_topk" at inference.
        theta: [M], the thresholds of "jumprelu"; 0 or less is 0, as no negative code is let pass.
        b_gate, b_mag, r_mag: [M], of "gated".
        normalize: "unit": x / ||x|| is encoded, and x_hat is multiplied by ||x||; "layer_norm": as
            `clipsae.sae.normalization` has it; "none".
    """

    rule: str
    W_enc: Tensor
    W_dec: Tensor
    b_enc: Tensor
    b_dec: Tensor
    k: Any = None
    tau: Any = None
    theta: Any = None
    b_gate: Any = None
    b_mag: Any = None
    r_mag: Any = None
    normalize: str = "none"
    residual_threshold: float = 0.0
    stop_on_repeat: bool = False

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.detach().double())

    @property
    def latents(self) -> int:
        return len(self.W_enc)

    @property
    def d(self) -> int:
        return self.W_enc.shape[1]

    # --- what other libraries do otherwise ---

    def shift_input(self, by: float) -> "Plain":
        """Move `by` times W_enc b_dec into the biases: +1 for a source that encodes x itself and
        not x - b_dec, -1 for such a target."""
        shift = by * (self.W_enc @ self.b_dec)
        self.b_enc = self.b_enc + shift
        if self.rule == "gated":
            self.b_gate = self.b_gate + shift
            self.b_mag = self.b_mag + self.r_mag.exp() * shift
        return self

    def scale_codes_by_rows(self) -> "Plain":
        """Of a source that multiplies each code by its decoder row's norm, and divides before
        decoding: rows of norm 1."""
        norm = torch.linalg.vector_norm(self.W_dec, dim=1)
        norm = torch.where(norm > 0, norm, 1)
        self.W_enc, self.W_dec = self.W_enc * norm[:, None], self.W_dec / norm[:, None]
        for name in ("b_enc", "theta", "b_gate", "b_mag"):
            if getattr(self, name) is not None:
                setattr(self, name, getattr(self, name) * norm)
        return self

    def scale_input(self, factor: float | Tensor) -> "Plain":
        """Of a source that encodes `factor` times x and divides x_hat by it."""
        self.W_enc, self.W_dec = self.W_enc * factor, self.W_dec / factor
        self.b_dec = self.b_dec / factor
        return self

    def fold(self, normalization: Normalization) -> "Plain":
        """Of an SAE that encodes u = (x - mean) W / s and returns s u_hat W^-1 + mean.

        In the form of this class: ((x - mean) W / s - b_dec) W_enc^T is (x - b) (W_enc W / s)^T
        with b = mean + s b_dec W^-1 (W is symmetric), and x_hat is z (s W_dec W^-1) + b.
        """
        if normalization.deviation is not None:
            self.scale_input(1 / normalization.deviation.detach().cpu().double())
        if normalization.whitening is not None and normalization.coloring is not None:
            self.W_enc = self.W_enc @ normalization.whitening.detach().cpu().double().T
            coloring = normalization.coloring.detach().cpu().double()
            self.W_dec, self.b_dec = self.W_dec @ coloring, self.b_dec @ coloring
        if normalization.mean is not None:
            self.b_dec = self.b_dec + normalization.mean.detach().cpu().double()
        return self

    # --- from and to an SAE ---

    def imported(
        self,
        format: str,
        config: Config,
        tensors: Tensors,
        *,
        unused: Iterable[str],
        only: Mapping[str, tuple[Any, ...]] | None = None,
        reads: dict[str, Any] | None = None,
        lost: Iterable[str] = (),
    ) -> Imported:
        """The SAE, after a check that all of its files was read: `unused` and `only` of
        `Config.refuse_others`, `reads` and `lost` of `Imported`.

        Raises:
            ValueError: an option or a tensor that is not known, or an invalid k.
        """
        config.refuse_others(unused, only)
        tensors.refuse_others()
        return Imported(self.to_sae(), format, reads or {}, tuple(lost))

    def to_sae(self) -> SAE:
        """In eval mode, on the CPU, float32.

        Raises:
            ValueError: an invalid k.
        """
        options: dict[str, Any] = {"d": self.d, "latents": self.latents, "activation": self.rule}
        options |= {"normalize": self.normalize, "unit_decoder": False, "bias_init": "zero"}
        names = ["W_enc", "W_dec", "b_dec", *(["b_enc"] if self.rule != "gated" else [])]
        if self.rule == PURSUIT:
            names = ["W_dec", "b_dec"]
            options |= {"architecture": PURSUIT, "activation": "relu", "l1_coefficient": 0.0}
            options |= {name: getattr(self, name) for name in STOPS}
            del options["unit_decoder"]
        tensors = {f"architecture.{name}": getattr(self, name) for name in names}
        if self.rule in WITH_K:
            options["k"] = self.k
        if self.rule == "batch_topk":
            tensors["activation.inference_threshold"] = torch.tensor(max(self.tau, 0.0))
        if self.rule == "jumprelu":
            tensors["activation.theta"] = self.theta.clamp(min=0)
        if self.rule == "gated":
            tensors |= {f"activation.{name}": getattr(self, name) for name in GATE}
        return assemble(options, tensors)

    @classmethod
    def of(cls, sae: SAE, target: str) -> "Plain":
        """Of an SAE whose scores are linear in x and whose rule other libraries have.

        The attention architecture is linear, too: W_enc = C W_K W_Q^T / scale, W_dec = C W_V. The
        mean, deviation and whitening of `normalize` are folded into the matrices and b_dec. An
        activation of a plugin is JumpReLU where its codes are the scores above thresholds
        that are the same for all tokens.

        Args:
            target: the library, for messages.

        Raises:
            ValueError: an activation that is none of these, such as sparsemax; an architecture of a
                plugin; matching pursuit of scaled tokens; means of positions; an SAE that leaves
                out tokens or reconstructs other ones.
        """
        for name in ("max_norm_ratio", "target_layer"):
            if sae.config[name] is not None:
                raise ValueError(
                    f"{name}={sae.config[name]} cannot be written for {target}, which has no such "
                    "option: expected an SAE that reconstructs every token that it reads"
                )
        rule, architecture = sae.config["activation"], sae.config["architecture"]
        if sae.normalization.position_mean:
            raise ValueError(
                f"position_mean=true cannot be written for {target}, where a token's codes do not "
                "depend on its position in the image: train with position_mean=false"
            )
        if architecture == PURSUIT and rule == "relu":
            rule = PURSUIT
            if sae.normalize not in ("none", "layer_norm"):
                raise ValueError(
                    f"normalize={sae.normalize} of matching pursuit cannot be written for "
                    f"{target}: its steps are of scaled tokens, as no matrix of unscaled ones can "
                    "make them: train with normalize=none or layer_norm"
                )
        theta = None
        if rule not in (*RULES, PURSUIT):
            rule, theta = "jumprelu", _fixed_thresholds(sae, target)
        state = {n.partition(".")[2]: t.detach().cpu() for n, t in sae.state_dict().items()}
        if architecture == "linear":
            W_enc, W_dec, b_dec = state["W_enc"], state["W_dec"], state["b_dec"]
        elif architecture == "attention":
            C, W_K, W_V = (state[name].double() for name in ("C", "W_K", "W_V"))
            query = W_K @ state["W_Q"].double().T if "W_Q" in state else W_K
            W_enc = C @ query / sae.architecture.scale
            W_dec, b_dec = C @ W_V, torch.zeros(sae.d)
        elif rule == PURSUIT:
            W_enc = W_dec = state["W_dec"]
            b_dec = state["b_dec"]
        else:
            raise ValueError(
                f"architecture={architecture} cannot be written for {target}: expected linear, "
                "attention, or matching_pursuit with activation=relu"
            )
        theta = state.get("theta", theta)
        tau = state.get("inference_threshold")
        own: dict[str, Any] = {name: state.get(name) for name in GATE}
        if rule == PURSUIT:
            own |= {name: sae.config[name] for name in STOPS}
        plain = cls(
            rule,
            W_enc,
            W_dec,
            state.get("b_enc", torch.zeros(sae.latents)),
            b_dec,
            k=sae.config.get("k"),
            tau=None if tau is None else tau.item(),
            theta=theta,
            **own,
            normalize=sae.normalize if sae.normalize in ("unit", "layer_norm") else "none",
        )
        if not sae.config.get("subtract_bias", True):
            plain.shift_input(1)  # while b_dec is that of what is encoded
        return plain.fold(sae.normalization)


@torch.no_grad()
def _fixed_thresholds(sae: SAE, target: str) -> Tensor:
    """[M] of an activation that is none of `RULES`, found from its codes of a range of scores.

    Raises:
        ValueError: its thresholds differ between tokens, or its codes are not the scores.
    """
    like = next(sae.parameters())
    scores = torch.linspace(-8, 8, 257, dtype=like.dtype, device=like.device)[:, None]
    scores = scores.expand(-1, sae.latents).contiguous()
    tau = sae.threshold(scores)
    why = "its codes are not the scores that pass a threshold"
    if tau.ndim > 1:
        why = "its threshold depends on all of a token's scores"
    elif torch.equal(sae.apply_threshold(scores, tau), torch.relu(scores) * (scores > tau)):
        return tau.detach().cpu().double().expand(sae.latents)
    raise ValueError(
        f"activation={sae.config['activation']} cannot be written for {target}: {why}, and "
        f"{target} has no such rule: expected one of {', '.join(RULES)}, or one with a threshold "
        "for each latent"
    )


def just_below(thresholds: Tensor) -> Tensor:
    """The next smaller float32 of each: for a source in which a code that equals its threshold
    passes, where here only one above it does."""
    return torch.nextafter(thresholds.float(), torch.tensor(-torch.inf))


def assemble(options: dict[str, Any], tensors: dict[str, Tensor]) -> SAE:
    """An SAE of these options and tensors, float32; counters start at 0.

    Raises:
        ValueError: invalid options, or tensors that do not fit them.
    """
    with torch.device("meta"):
        sae = SAE(**options)
    missing = {name for name, _ in sae.named_parameters()} - set(tensors)
    state = {name: torch.zeros(t.shape, dtype=t.dtype) for name, t in sae.state_dict().items()}
    for name, tensor in tensors.items():
        if name not in state or state[name].shape != tensor.shape:
            raise ValueError(f"{name} of shape {list(tensor.shape)} does not fit the SAE")
        state[name] = tensor.to(state[name].dtype).contiguous()
    if missing:
        raise ValueError(f"{min(missing)} is missing")
    sae.load_state_dict(state, assign=True)
    return sae.eval()


def write_files(
    folder: Path, weights: str, tensors: Mapping[str, Tensor], about: str, config: Mapping[str, Any]
) -> None:
    """Write tensors as float32 safetensors and a config as JSON, under these names."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({n: t.float().contiguous() for n, t in tensors.items()}, folder / weights)
    (folder / about).write_text(json.dumps(config, indent=2) + "\n")
