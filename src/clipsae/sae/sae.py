"""The sparse autoencoder: an architecture, an activation, and what all variants share.

Letters: B images or tokens, T tokens of an image, d width, M latents, n latents kept.
"""

import inspect
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from clipsae.sae.auxk import auxk_loss, auxk_loss_at
from clipsae.sae.base import Activation, Architecture, SAEOutput, SparseCodes, Step
from clipsae.sae.checks import boolean, near, not_negative, whole
from clipsae.sae.encoding import encode_by_blocks
from clipsae.sae.losses import at_least_float32, relative_error
from clipsae.sae.ranks import summed
from clipsae.sae.registry import ACTIVATIONS, ARCHITECTURES
from clipsae.sae.support import DENSE_FROM

FORMAT = "clipsae.sae"
VERSION = 1


class SAE(nn.Module):
    """z = activation(scores(x)), x_hat = decode(z).

    In evaluation every variant is a threshold on its scores, z_m = f(s_m) if s_m > tau else 0:
    `encode(x)` equals `gate(scores(x), threshold(scores(x)))`.

    Args:
        d: width of the tokens.
        latents: M.
        architecture: a name in `ARCHITECTURES`: "linear", "attention".
        activation: a name in `ACTIVATIONS`: "relu", "jumprelu", "gated", "topk", "batch_topk",
            "sparsemax".
        normalize_input: encode x / ||x||, and multiply the reconstruction, bias included, by ||x||.
        reconstruction_weight: of the reconstruction loss (see `clipsae.sae.losses`); the released
            Sparsemax SAE has 10.
        auxk: weight of the loss that lets dead latents reconstruct the residual; 0: none. Only
            where an activation holds back scores above 0.
        auxk_k: latents of a token in that loss; None: d / 2. Not without auxk.
        dead_after: a latent is dead when it was silent for this many tokens.
        options: those of the chosen architecture and activation; see their classes.

    Raises:
        ValueError: a size, a name or an option that cannot be; it names what exists.
    """

    tokens_since_fired: Tensor

    def __init__(
        self,
        d: int,
        latents: int,
        architecture: str = "linear",
        activation: str = "relu",
        *,
        normalize_input: bool = False,
        reconstruction_weight: float = 1.0,
        auxk: float = 0.0,
        auxk_k: int | None = None,
        dead_after: int = 10_000_000,
        **options: Any,
    ) -> None:
        super().__init__()
        whole("d", d)
        whole("latents", latents)
        whole("dead_after", dead_after)
        if auxk_k is not None:
            whole("auxk_k", auxk_k)
        boolean("normalize_input", normalize_input)
        not_negative("reconstruction_weight", reconstruction_weight)
        not_negative("auxk", auxk)
        if auxk_k is not None and not auxk:
            raise ValueError(f"auxk_k={auxk_k} does nothing while auxk is 0: set both or neither")
        if auxk and not ACTIVATIONS[activation].holds_back:
            raise ValueError(
                f"auxk={auxk} does nothing with activation={activation}, whose silent latents have "
                "no score above 0 to learn from: set it to 0. How many stay dead is measured as "
                "dead_fraction"
            )
        of_architecture, of_activation = _part_options(architecture, activation, options)
        self.d = d
        self.latents = latents
        self.normalize_input = normalize_input
        self.reconstruction_weight = reconstruction_weight
        self.auxk = auxk
        self.auxk_k = max(1, d // 2) if auxk_k is None else auxk_k
        self.dead_after = dead_after
        self.activation: Activation = ACTIVATIONS[activation](latents, **of_activation)
        self.architecture: Architecture = ARCHITECTURES[architecture](
            d, latents, self.activation.encoder_bias, **of_architecture
        )
        self.register_buffer("tokens_since_fired", torch.zeros(latents, dtype=torch.int64))
        self.config: dict[str, Any] = {
            "d": d,
            "latents": latents,
            "architecture": architecture,
            "activation": activation,
            "normalize_input": normalize_input,
            "reconstruction_weight": reconstruction_weight,
            "auxk": auxk,
            "auxk_k": auxk_k,
            "dead_after": dead_after,
            **of_architecture,
            **of_activation,
        }

    # --- from tokens to codes and back ---

    def input_scale(self, x: Tensor) -> Tensor:
        """||x|| of tokens [..., d] as [..., 1] with `normalize_input`, else ones; 1 for a token
        of norm 0."""
        if not self.normalize_input:
            return torch.ones_like(x[..., :1])
        norm = torch.linalg.vector_norm(at_least_float32(x), dim=-1, keepdim=True)
        return torch.where(norm > 0, norm, 1).to(x.dtype)

    def scores(self, x: Tensor, latents: Tensor | None = None) -> Tensor:
        """Tokens [..., d] -> scores [..., M], before the activation.

        Args:
            latents: only these: LongTensor [n], or [B, n], other ones for each image of x
                [B, T, d]. The result is [..., n].
        """
        self._check(x)
        return self.architecture.scores(x / self.input_scale(x), latents)

    def threshold(self, scores: Tensor) -> Tensor:
        """Scores [..., M] -> tau: [..., 1] per token, [M] per latent, or a scalar."""
        return self.activation.threshold(scores)

    def gate(self, scores: Tensor, tau: Tensor, latents: Tensor | None = None) -> Tensor:
        """Scores [..., M], or [..., n] of `latents`, and tau -> codes of the same shape."""
        return self.activation.gate(scores, tau, latents)

    def encode(self, x: Tensor) -> Tensor:
        """Tokens [..., d] -> codes [..., M], as in evaluation."""
        scores = self.scores(x)
        return self.gate(scores, self.threshold(scores))

    def encode_held(self, x: Tensor) -> Tensor | SparseCodes:
        """`encode`, without gradients: codes [..., M], or the sparse form of them where few
        latents act."""
        self._check(x)
        dictionary = self.architecture.dictionary()
        if dictionary is None or not self._knows_supports(x):
            return self.encode(x)
        query = self.architecture.query((x / self.input_scale(x)).flatten(0, -2))
        shape = (*x.shape[:-1], self.latents)
        codes, support = encode_by_blocks(query, dictionary, self.activation)
        return codes.view(shape) if support is None else SparseCodes(codes, support, shape)

    def decode_held(self, held: Tensor | SparseCodes, scale: Tensor | float = 1.0) -> Tensor:
        """`decode` of what `encode_held` returned."""
        if isinstance(held, Tensor):
            return self.decode(held, scale)
        tokens = self.architecture.decode_at(held.values, held.support)
        return tokens.view(*held.shape[:-1], self.d) * scale

    def decode(
        self, codes: Tensor, scale: Tensor | float = 1.0, latents: Tensor | None = None
    ) -> Tensor:
        """Codes [..., M] -> tokens [..., d]: scale * (codes @ decoder_rows + decoder_bias).

        Args:
            scale: `input_scale(x)`, where inputs were normalised.
            latents: the codes are [..., n] of these: LongTensor [n] or [B, n].
        """
        return self.architecture.decode(codes, latents) * scale

    def forward(self, x: Tensor) -> SAEOutput:
        """Tokens [B, T, d] or [B, d] -> reconstruction, codes and loss terms.

        In training mode the activation's training form, all loss terms, and the statistics that
        the variant keeps; in eval mode `encode`, and the reconstruction loss alone.
        """
        self._check(x)
        scale = self.input_scale(x)
        if not self.training:
            scores = self.architecture.scores(x / scale)
            codes = self.gate(scores, self.threshold(scores))
            reconstruction = self.decode(codes, scale)
            return SAEOutput(reconstruction, codes, self._reconstruction_loss(reconstruction, x))
        return self._train_forward(x, scale)

    def _train_forward(self, x: Tensor, scale: Tensor) -> SAEOutput:
        shape, unit = (*x.shape[:-1], self.latents), x / scale
        by_dictionary = self._knows_supports(x)
        support = None
        if by_dictionary:
            query = self.architecture.query(unit.flatten(0, -2))
            dictionary = self.architecture.dictionary()
            assert dictionary is not None
            scores, support = dictionary.find(
                query, self.activation.support, together=self.activation.across_tokens
            )
        else:
            scores = self.architecture.scores(unit)
        if support is None:
            # (From a dictionary, tokens in one row: gradients of views are not added up in place.)
            codes = self.activation(scores)
            held = codes.view(shape)
        else:
            codes = self.activation(scores, support)
            held = SparseCodes(codes, support, shape)

        def decode(codes: Tensor, frozen: bool = False) -> Tensor:
            if not by_dictionary:
                how = self.architecture.decode_frozen if frozen else self.architecture.decode
                return how(codes)
            codes = codes if support is not None else codes.flatten(0, -2)
            return self.architecture.decode_at(codes, support, frozen).view(x.shape)

        step = Step(
            x=x,
            scale=scale,
            scores=scores,
            codes=codes,
            latents=None if support is None else support.latent,
            tokens=max(1, x.numel() // self.d),
            decode_frozen=partial(decode, frozen=True),
            architecture=self.architecture,
            relative_error=lambda other: relative_error(other, x),
        )
        # Before the decoding: autograd goes back the other way, and then adds what these terms send
        # to the codes in the memory of the large gradient that is there already.
        terms = self.activation.losses(step)
        reconstruction = decode(codes) * scale
        losses = self._reconstruction_loss(reconstruction, x) | terms
        out = SAEOutput(reconstruction, held, losses)
        self._count_silence(out.fired(), x.numel() // self.d)
        if self.auxk:
            rest = self.dead, self.auxk_k, self.architecture, self.ranks
            if by_dictionary:
                loss = auxk_loss_at(
                    x, reconstruction, scale, query, self.activation.candidates, *rest
                )
            else:
                candidates = self.activation.candidates(scores)
                loss = auxk_loss(x, reconstruction, scale, candidates, *rest)
            losses["auxk"] = self.auxk * loss
        return out

    def _knows_supports(self, x: Tensor) -> bool:
        """Whether there is a dictionary, on a device where sparse products can be faster."""
        if torch.compiler.is_compiling() or x.device.type not in DENSE_FROM:
            return False
        return self.architecture.dictionary() is not None

    def _reconstruction_loss(self, reconstruction: Tensor, x: Tensor) -> dict[str, Tensor]:
        loss = relative_error(reconstruction, x)
        return {"reconstruction": self.reconstruction_weight * loss}

    def _check(self, x: Tensor) -> None:
        if x.ndim < 2 or x.shape[-1] != self.d or not x.is_floating_point():
            raise ValueError(
                f"tokens of shape {tuple(x.shape)} and {x.dtype}: expected floating point numbers "
                f"[..., {self.d}]"
            )
        dtype = next(self.architecture.parameters()).dtype
        if x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(
                f"tokens are {x.dtype} and the SAE is {dtype}: cast one of them, sae.to(x.dtype)"
            )

    # --- the dictionary ---

    @property
    def decoder_bias(self) -> Tensor | None:
        """What `decode` adds to any codes, times its scale: [d], or None."""
        return self.architecture.bias

    def decoder_rows(self, latents: Tensor | None = None) -> Tensor:
        """What each latent adds to the reconstruction: [M, d], or those of `latents`."""
        return self.architecture.decoder_rows(latents)

    @property
    def dead(self) -> Tensor:
        """BoolTensor [M]: silent for `dead_after` training tokens or more."""
        return self.tokens_since_fired >= self.dead_after

    @torch.no_grad()
    def _count_silence(self, fired: Tensor, tokens: int) -> None:
        fired = summed(fired, self.ranks)
        silence = torch.where(fired > 0, 0, self.tokens_since_fired + tokens * self.ranks)
        self.tokens_since_fired.copy_(silence)

    # --- around a training step ---

    @property
    def ranks(self) -> int:
        """Processes that a training batch is spread over."""
        return self.activation.ranks

    def share_batches(self, ranks: int) -> None:
        """Say that the batches of so many processes of torch.distributed are one batch, of which
        each has an equal part: BatchTopK then chooses among all tokens, latents are dead that are
        silent everywhere, and AuxK's scale is that of all. (Running means are averaged by
        `clipsae.training.ranks`.)"""
        self.activation.ranks = ranks

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Once, before the first step: what starts from data, with images [N, T, d]."""
        self._check(x)
        self.architecture.initialize(x / self.input_scale(x))

    def after_backward(self) -> None:
        """After each backward pass, before clipping and the optimizer's step."""
        self.architecture.after_backward()

    def after_step(self) -> None:
        """After each optimizer's step."""
        self.architecture.after_step()

    # --- on disk ---

    def save(self, folder: Path | str) -> None:
        """Write `sae.safetensors` and `sae.json` into a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: tensor.contiguous() for name, tensor in self.state_dict().items()},
            folder / "sae.safetensors",
        )
        about = {"format": FORMAT, "version": VERSION, "config": self.config}
        (folder / "sae.json").write_text(json.dumps(about, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path | str) -> "SAE":
        """Read what `save` wrote: the same codes, thresholds and all. In eval mode, on the CPU.

        Raises:
            FileNotFoundError: no SAE there.
            ValueError: written by a newer version, or weights that do not fit the config.
        """
        folder = Path(folder)
        if not (folder / "sae.json").is_file():
            raise FileNotFoundError(f"{folder} holds no SAE: expected sae.json, sae.safetensors")
        about = json.loads((folder / "sae.json").read_text())
        if about.get("format") != FORMAT or about.get("version", 0) > VERSION:
            raise ValueError(
                f"{folder}/sae.json: format {about.get('format')!r} version "
                f"{about.get('version')!r}: expected {FORMAT!r}, up to {VERSION}"
            )
        weights = load_file(folder / "sae.safetensors")
        with torch.device("meta"):
            sae = cls(**about["config"])
        expected = {name: tensor.shape for name, tensor in sae.state_dict().items()}
        found = {name: tensor.shape for name, tensor in weights.items()}
        if expected != found:
            wrong = sorted(set(expected.items()) ^ set(found.items()), key=str)[0]
            raise ValueError(f"{folder}/sae.safetensors does not fit its config: {wrong}")
        sae.load_state_dict(weights, assign=True)
        return sae.eval()


def _part_options(
    architecture: str, activation: str, given: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """All options of the architecture and of the activation, as given or by default."""
    parts = ARCHITECTURES.options(architecture), ACTIVATIONS.options(activation)
    common = [
        p.name
        for p in inspect.signature(SAE.__init__).parameters.values()
        if p.kind != p.VAR_KEYWORD
    ]
    names = [*common, *parts[0], *parts[1]]
    doubled = {name for name in names if names.count(name) > 1}
    if doubled:
        raise ValueError(
            f"architecture={architecture} and activation={activation}: option '{min(doubled)}' is "
            "declared twice among them and the SAE; rename one"
        )
    unknown = sorted(set(given) - set(names))
    if unknown:
        known = sorted(set(names) - {"self"})
        raise ValueError(
            f"{unknown[0]}={given[unknown[0]]!r}: architecture={architecture} with "
            f"activation={activation} has no such option{near(unknown[0], known)}; it has "
            f"{', '.join(known)}"
        )
    for options in parts:
        options.update((name, value) for name, value in given.items() if name in options)
        missing = [name for name, value in options.items() if value is inspect.Parameter.empty]
        if missing:
            raise ValueError(f"{missing[0]} has no default: give it a value")
    return parts
