"""The sparse autoencoder: an architecture, an activation, and what all variants share.

Letters: B images or tokens, T tokens of an image, d width, M latents, n latents kept.
"""

import inspect
import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from clipsae import rules
from clipsae.sae.base import Activation, Architecture, LossInputs, Objective, SAEOutput
from clipsae.sae.checks import near, not_negative, one_of, require, whole
from clipsae.sae.codes import SparseCodes
from clipsae.sae.dense import at_least_float32, row_parts
from clipsae.sae.engine import backend
from clipsae.sae.engine.cpu import BLOCK
from clipsae.sae.engine.reference import Chosen
from clipsae.sae.engine.switch import most_pairs, prefers_dense
from clipsae.sae.losses import (
    auxk_loss,
    dead_codes,
    relative_error,
    sparse_dead_codes,
    summed,
)
from clipsae.sae.nested import Nested
from clipsae.sae.normalization import LAYER_NORM_EPSILON, Moments, Normalization, own_mean
from clipsae.sae.registry import ACTIVATIONS, ARCHITECTURES, OBJECTIVES
from clipsae.sae.sparse_ops import Chooser, Dictionary, positions_above

FORMAT = "clipsae.sae"
VERSION = 4
RENAMED = {"l0": "l0_coefficient", "l1": "l1_coefficient", "normalize_input": "normalize"}
"""Options that have been renamed: the first two in version 2, the last in version 4."""
NORMALIZE_INPUT = {True: "unit", False: "none"}
"""`normalize` of the values of `normalize_input`."""
FREEZE = ("decoder", "encoder", "soft_decoder")
LEAST_COSINE = 0.8
"""Of a softly frozen decoder row with where it began."""


class SAE(nn.Module):
    """z = activation(scores(x)), x_hat = decode(z).

    In evaluation every variant is a threshold on its scores, z_m = f(s_m) if s_m > tau else 0.

    Args:
        d: width of the tokens.
        latents: M.
        architecture: a name in `ARCHITECTURES`: "linear", "attention", "matching_pursuit".
        activation: a name in `ACTIVATIONS`: "relu", "jumprelu", "gated", "topk", "batch_topk",
            "sparsemax", "abs_topk".
        normalize: what is done to tokens before they are encoded, and undone to the reconstruction
            (see `clipsae.sae.normalization`): "none"; "unit": divided by their norm;
            "layer_norm": of each token the mean of its d numbers is taken out, and it is divided by
            their deviation; "mean_std": the tokens' mean is taken out, and they are divided by
            their deviation; "whiten": their principal components are scaled towards equal variance,
            too.
        whitening: how far, from 0 (as "mean_std") to 1 (equal).
        position_mean: the mean that is taken out is that of each position of an image; with
            "none", too. Tokens are then whole images, [..., T, d].
        reconstruction_weight: of the reconstruction loss (see `clipsae.sae.losses`); the released
            Sparsemax SAE has 10.
        auxk: weight of the loss that lets dead latents reconstruct the residual; 0: none.
        auxk_k: latents of a token in that loss; None: d / 2. Not without auxk.
        dead_after: a latent is dead when it was silent for this many tokens.
        freeze: what the training leaves as it was initialised, for baselines ("Sanity Checks for
            Sparse Autoencoders", arXiv 2602.14111). "decoder", "encoder": its matrices
            (`Architecture.matrices`), not the biases and thresholds. "soft_decoder": after each
            step every decoder row is projected onto the cone of rows with a cosine of at least
            `LEAST_COSINE` with where it began (`start_rows`, part of the state of a training but
            not of the files of `save`).
        tokens: which of an image's the SAE is of, "all", "patches" or "cls": a record, by which
            others choose what they give it.
        max_norm_ratio: tokens whose norm is above this many times the median norm of the images
            that it is initialised from (registers, arXiv 2309.16588) are left out: they have no
            codes, no loss, and are their own reconstruction. The limit is `norm_limit`, saved with
            the weights. None: none are. Not with an objective that compares images, whose tokens
            would be incomplete.
        target_layer: the block after which the tokens are that it reconstructs (a transcoder,
            arXiv 2406.11944), counted as `clip.layer` is: a record, as `tokens`. `forward` is then
            given them, and losses, biases and AuxK's residual are of them. Architectures whose
            encoder subtracts the decoder's bias must not do so, and statistics of what is read
            cannot be undone on what is written. None: what it reads.
        options: those of the chosen architecture and activation, and of all `OBJECTIVES`; see their
            classes.

    Raises:
        ValueError: an invalid size, name or option; the message lists what exists.
    """

    tokens_since_fired: Tensor
    config: dict[str, Any]
    objectives: Sequence[Objective]

    def __init__(
        self,
        d: int,
        latents: int,
        architecture: str = "linear",
        activation: str = "relu",
        *,
        normalize: str = "none",
        whitening: float = 1.0,
        position_mean: bool = False,
        reconstruction_weight: float = 1.0,
        auxk: float = 0.0,
        auxk_k: int | None = None,
        dead_after: int = 10_000_000,
        freeze: str | None = None,
        tokens: str = "all",
        max_norm_ratio: float | None = None,
        target_layer: int | None = None,
        **options: Any,
    ) -> None:
        given = {k: v for k, v in locals().items() if k not in ("self", "options", "__class__")}
        super().__init__()
        whole("d", d)
        whole("latents", latents)
        whole("dead_after", dead_after)
        if auxk_k is not None:
            whole("auxk_k", auxk_k)
        not_negative("reconstruction_weight", reconstruction_weight)
        not_negative("auxk", auxk)
        require("tokens", tokens, rules.TOKENS)
        require("max_norm_ratio", max_norm_ratio, rules.NORM_RATIO)
        require("target_layer", target_layer, rules.or_null(rules.whole()))
        if auxk_k is not None and not auxk:
            raise ValueError(f"auxk_k={auxk_k} does nothing while auxk is 0: set both or neither")
        if auxk and not ARCHITECTURES[architecture].scores_all:
            raise ValueError(
                f"auxk={auxk} does nothing with architecture={architecture}, whose silent latents "
                "have no score to learn from: set it to 0"
            )
        architecture_options, activation_options, objective_options = _part_options(
            architecture, activation, options
        )
        self.d = d
        self.latents = latents
        self.normalize = normalize
        self.reconstruction_weight = reconstruction_weight
        self.auxk = auxk
        self.auxk_k = max(1, d // 2) if auxk_k is None else auxk_k
        self.dead_after = dead_after
        self.activation: Activation = ACTIVATIONS[activation](latents, **activation_options)
        self.architecture: Architecture = ARCHITECTURES[architecture](
            d, latents, self.activation.encoder_bias, **architecture_options
        )
        self.normalization = Normalization(d, normalize, whitening, position_mean)
        if target_layer is not None:
            self._check_transcoder(target_layer, architecture)
        self.register_buffer("tokens_since_fired", torch.zeros(latents, dtype=torch.int64))
        self.config = given | architecture_options | activation_options
        self.norm_limit: nn.Parameter | None = None
        if max_norm_ratio is not None:
            # A parameter, as buffers are copied and averaged in each step.
            self.norm_limit = nn.Parameter(torch.tensor(torch.inf), requires_grad=False)
        self.start_rows: nn.Parameter | None = None
        if freeze is not None:
            self._freeze(freeze)
        objectives: list[Objective] = []
        for name, values in objective_options.items():
            self.config |= values
            if _chosen(name, values):
                objectives.append(OBJECTIVES[name](latents, **values))
                objectives[-1].check(self.architecture, self.activation)
        if sum(isinstance(objective, Nested) for objective in objectives) > 1:
            raise ValueError(
                f"nested_k={self.config['nested_k']} and prefixes={self.config['prefixes']!r}: "
                "one of them at most can be in the place of the reconstruction loss"
            )
        self.objectives = cast("Sequence[Objective]", nn.ModuleList(objectives))
        if max_norm_ratio is not None and "embeddings" in self.needs:
            raise ValueError(
                f"max_norm_ratio={max_norm_ratio}: an objective of this SAE "
                "(monosemanticity) compares images by the codes of all their tokens: set one of "
                "them to its default"
            )
        self._silence: tuple[Any, int, int] = (None, 0, 0)  # see `_may_be_dead`
        self._many = False  # whether the last step had more codes than memory

    def _check_transcoder(self, target_layer: int, architecture: str) -> None:
        """Refuse what ties the tokens that are written to those that are read."""
        if getattr(self.architecture, "subtract_bias", False):
            how = "set subtract_bias=false" if architecture == "linear" else "use linear"
            raise ValueError(
                f"target_layer={target_layer} with architecture={architecture}: the decoder's bias "
                f"is of other tokens than those that are encoded: {how}"
            )
        if self.normalization.learned or self.normalize == "layer_norm":
            raise ValueError(
                f"target_layer={target_layer}: the statistics of normalize={self.normalize} and "
                "position_mean are of the tokens that are read, not of those that are "
                "reconstructed: use normalize=none or unit, without position_mean"
            )

    def _freeze(self, freeze: str) -> None:
        one_of("freeze", freeze, FREEZE)
        part = freeze.removeprefix("soft_")
        matrices = self.architecture.matrices(part)
        if not matrices or (freeze == "soft_decoder" and len(matrices) > 1):
            name = self.config["architecture"]
            raise ValueError(
                f"freeze={freeze!r}: architecture={name} has no matrix whose rows are those of the "
                f"{part}: choose another freeze, or a model with architecture=linear"
            )
        if freeze == "soft_decoder":
            # A parameter, as buffers are copied and averaged in each step.
            rows = matrices[0].detach().clone()
            self.start_rows = nn.Parameter(rows, requires_grad=False)
        else:
            for matrix in matrices:
                matrix.requires_grad_(False)

    # --- from tokens to codes and back ---

    def input_scale(self, x: Tensor, norm: Tensor | None = None) -> Tensor:
        """What `decode` needs of tokens [..., d] beside their codes: [..., 1], ||x|| with
        `normalize="unit"`, 1 for a token of norm 0, else ones; with "layer_norm" [..., 2], a
        token's deviation and its mean.

        Args:
            norm: ||x|| [...], where it is known.
        """
        if self.normalize == "layer_norm":
            deviation = at_least_float32(x).std(dim=-1, keepdim=True) + LAYER_NORM_EPSILON
            return torch.cat((deviation.to(x.dtype), own_mean(x)), dim=-1)
        if self.normalize != "unit":
            return torch.ones_like(x[..., :1])
        norm = self._norm(x) if norm is None else norm
        return torch.where(norm > 0, norm, 1).to(x.dtype)[..., None]

    def _scale(self, x: Tensor, norm: Tensor | None = None) -> Tensor:
        """Between y and what the architecture sees (`clipsae.sae.normalization`): the norms or
        deviations of tokens [..., d], or ones, [..., 1]; or the deviation [1]."""
        deviation = self.normalization.deviation
        return self.input_scale(x, norm)[..., :1] if deviation is None else deviation.to(x.dtype)

    def _encoded(self, x: Tensor) -> Tensor:
        """Tokens [..., d] as the architecture sees them."""
        return self.normalization(x) / self._scale(x)

    def _norm(self, x: Tensor) -> Tensor:
        """The norms [...] of tokens as they come."""
        return torch.linalg.vector_norm(at_least_float32(x), dim=-1)

    def kept(self, x: Tensor, norm: Tensor | None = None) -> Tensor | None:
        """Which of the tokens [..., d] have codes, BoolTensor [...]; None: all (see
        `max_norm_ratio`).

        Args:
            norm: ||x|| [...], where it is known.
        """
        if self.norm_limit is None:
            return None
        return (self._norm(x) if norm is None else norm) <= self.norm_limit

    def scores(self, x: Tensor, latents: Tensor | None = None) -> Tensor:
        """Tokens [..., d] -> scores [..., M], before the activation.

        Args:
            latents: only these: LongTensor [n], or [B, n], other ones for each image of x
                [B, T, d]. The result is [..., n].
        """
        self._check(x)
        return self.architecture.scores(self._encoded(x), latents)

    def threshold(self, scores: Tensor) -> Tensor:
        """Scores [..., M] -> tau: [..., 1] per token, [M] per latent, or a scalar."""
        return self.activation.threshold(scores)

    def apply_threshold(self, scores: Tensor, tau: Tensor, latents: Tensor | None = None) -> Tensor:
        """Scores [..., M], or [..., n] of `latents`, and tau -> codes of the same shape."""
        return self.activation.apply_threshold(scores, tau, latents)

    def encode(self, x: Tensor) -> Tensor:
        """Tokens [..., d] -> codes [..., M], as in evaluation."""
        codes, kept = self._encode(x), self.kept(x)
        return codes if kept is None else codes * kept[..., None]

    def _encode(self, x: Tensor) -> Tensor:
        """Codes of all tokens, those that are left out, too."""
        scores = self.scores(x)
        return self.apply_threshold(scores, self.threshold(scores))

    @torch.no_grad()
    def encode_sparse(self, x: Tensor) -> SparseCodes:
        """`encode` without gradients and zeros, positions ascending. Where few latents are active,
        only a few tokens' scores are in memory together."""
        codes, kept = self._encode_sparse(x), self.kept(x)
        if kept is None:
            return codes
        return codes.with_values(codes.values * kept.flatten()[codes.token.long()]).nonzero()

    def _encode_sparse(self, x: Tensor) -> SparseCodes:
        self._check(x)
        shape = (*x.shape[:-1], self.latents)
        dictionary = self._dictionary(x)
        if dictionary is None or not x.numel():
            return SparseCodes.from_dense(self._encode(x))
        thresholds: list[Tensor] = []

        def choose(scores: Tensor) -> Chosen:
            thresholds.append(self.threshold(scores))
            return positions_above(scores, thresholds[-1], self.activation.strength(scores))

        query = self.architecture.query(self._encoded(x).flatten(0, -2))
        scores = dictionary.find(query, choose)
        if isinstance(scores, Tensor):
            for part in scores.split(BLOCK):
                part.copy_(self.apply_threshold(part, self.threshold(part)))
            return SparseCodes.from_dense(scores.view(shape))
        tau = thresholds[0]
        if tau.ndim == 2:
            tau = scores.at_token(torch.cat(thresholds)[:, 0])
        elif tau.ndim == 1:
            tau = scores.at_latent(tau)
        values = self.activation.magnitude(scores.values, tau, scores.latent)
        return scores.with_values(values).view(*shape).nonzero()

    def decode(
        self,
        codes: Tensor | SparseCodes,
        scale: Tensor | float = 1.0,
        latents: Tensor | None = None,
    ) -> Tensor:
        """Codes [..., M] -> tokens [..., d]: scale * (codes @ decoder_rows + decoder_bias).

        Args:
            scale: `input_scale(x)`; it may be left out where `normalize` is neither "unit" nor
                "layer_norm".
            latents: the codes are dense [..., n] of these: LongTensor [n] or [B, n].
        """
        if isinstance(codes, SparseCodes) and (
            self._dictionary(codes.values) is None
            or len(codes.values) > most_pairs(codes.values, codes.tokens, codes.latents)
        ):
            codes = codes.dense()
        y = self.architecture(codes, latents)
        if self.normalize == "layer_norm" and isinstance(scale, Tensor):
            return y * scale[..., :1] + scale[..., 1:]
        y = y * scale
        if self.normalization.deviation is not None:
            y = y * self.normalization.deviation.to(y.dtype)
        return self.normalization.inverse(y)

    @property
    def nested(self) -> Nested | None:
        """The objective in the place of the reconstruction loss, if there is one."""
        return next((one for one in self.objectives if isinstance(one, Nested)), None)

    @property
    def needs(self) -> set[str]:
        """What a training batch must have beside its tokens: keywords of `forward`. A "target" it
        must have in eval mode, too."""
        needs = {name for objective in self.objectives for name in objective.needs}
        return needs if self.config["target_layer"] is None else needs | {"target"}

    def forward(
        self, tokens: Tensor, *, target: Tensor | None = None, embeddings: Tensor | None = None
    ) -> SAEOutput:
        """Tokens [B, T, d] or [B, d] -> reconstruction, codes and loss terms.

        In training mode codes have the variant's gradients, all loss terms are there, and
        statistics are updated; in eval mode it is `encode` and the reconstruction loss alone.

        Args:
            target: what is to be reconstructed, of the shape of the tokens; None: they
                themselves.
            embeddings: of the images [B, e], of unit length; where `needs` has them.

        Raises:
            ValueError: tokens of another width or dtype; something of `needs` that is missing.
        """
        self._check(tokens)
        if target is None and "target" in self.needs:
            raise ValueError("target=None: this SAE reconstructs other tokens: give them")
        if self.training:
            if embeddings is None and "embeddings" in self.needs:
                raise ValueError("embeddings=None: an objective of this SAE needs the images' own")
            return self._train_forward(tokens, target, embeddings)
        norm = self._norm(tokens)
        y, scale = self.normalization(tokens), self._scale(tokens, norm)
        scores = self.architecture.scores(y / scale)
        codes = self.apply_threshold(scores, self.threshold(scores))
        rebuilt = self.architecture(codes) * scale
        whole = self.normalization.inverse(rebuilt, of=tokens)
        goal, compared = (y, tokens) if target is None else (target, target)
        kept = self.kept(tokens, norm)
        norm = norm if target is None else self._norm(target)
        if kept is not None:
            codes = codes * kept[..., None]
            whole = torch.where(kept[..., None], whole, compared)
            rebuilt, goal, norm = rebuilt[kept], goal[kept], norm[kept]
        loss = self.reconstruction_weight * relative_error(rebuilt, goal, norm)
        return SAEOutput(whole, codes, {"reconstruction": loss}, kept)

    def _train_forward(
        self, batch: Tensor, target: Tensor | None, embeddings: Tensor | None
    ) -> SAEOutput:
        dictionary = self._dictionary(batch)
        output = partial(self._output, batch, target, embeddings, dictionary)
        if dictionary is None or backend(batch).waits:
            return output()[0]
        # How many codes there are is looked at when everything is queued that follows them, or at
        # once where there were too many in the step before.
        before = [buffer.clone() for buffer in self.buffers()]
        (device, version, longest), was = self._silence, self.tokens_since_fired._version
        out, overflows = output()
        if not overflows():
            return out
        for buffer, value in zip(self.buffers(), before, strict=True):
            buffer.copy_(value)
        self._silence = device, version + self.tokens_since_fired._version - was, longest
        self._many = True
        return output(lambda scores: None)[0]

    def _output(
        self,
        batch: Tensor,
        target: Tensor | None,
        embeddings: Tensor | None,
        dictionary: Dictionary | None,
        support: Chooser | None = None,
    ) -> tuple[SAEOutput, Callable[[], bool]]:
        """What training returns, and whether there were more codes than memory."""
        x = batch.flatten(0, -2)  # gradients of views would not be added up in place
        y = self.normalization(batch).flatten(0, -2)
        compared = x if target is None else target.flatten(0, -2)  # as it comes
        own = self._norm(x)
        goal, norm = (y, own) if target is None else (compared, self._norm(compared))
        kept, all_y = self.kept(x, own), y
        if kept is not None:
            rows = kept.nonzero()[:, 0]  # (A GPU is waited for.)
            x, own, y, goal, norm = x[rows], own[rows], y[rows], goal[rows], norm[rows]
            kept = kept.view(batch.shape[:-1])
        scale = self._scale(x, own)
        encoded = y / scale
        scores: Tensor | SparseCodes
        if dictionary is None:
            scores = self.architecture.scores(encoded)
        else:
            query = self.architecture.query(encoded)
            at_once = self.activation.across_tokens
            support = support or self.activation.support
            scores = dictionary.find(query, support, at_once=at_once, wait=False)
        overflows: Callable[[], bool] = lambda: False  # noqa: E731
        if isinstance(scores, SparseCodes):
            overflows = scores.overflows(self.world_size)
            if self._many:
                self._many = overflows()
                if self._many:
                    everything = batch, target, embeddings, dictionary
                    return self._output(*everything, lambda scores: None)
        codes = self.activation(scores)

        def decode(codes: Tensor | SparseCodes, frozen: bool = False) -> Tensor:
            if not frozen:
                return self.architecture(codes) * scale
            fixed = {name: p.detach() for name, p in self.architecture.named_parameters()}
            return torch.func.functional_call(self.architecture, fixed, (codes,)) * scale

        # Before the decoding: autograd goes the other way, and then adds the gradients of these
        # terms in the memory of the large one that is there already.
        inputs = LossInputs(
            y,
            scores,
            codes,
            max(1, len(y)),
            self.architecture,
            self.activation,
            encoded,
            self.dead,
            decode,
            shape=batch.shape[:-1],
            target=goal,
            embeddings=embeddings,
            norm=norm,
        )
        terms = self.activation.scaled_losses(inputs)
        for objective in self.objectives:
            terms |= objective.losses(inputs)
        if self.nested is None:
            rebuilt = decode(codes)
            loss = relative_error(rebuilt, goal, norm)
        else:
            rebuilt, loss = self.nested.reconstruct(codes, self.architecture, goal, scale, norm)
        all_rebuilt, all_codes = rebuilt, codes
        if kept is not None:
            all_rebuilt = all_y.index_copy(0, rows, rebuilt.to(all_y.dtype))
            all_codes = _among(codes, rows, kept.numel())
        # (Of whole images, as positions have means of their own.)
        whole = self.normalization.inverse(all_rebuilt.view(batch.shape), of=batch)
        if kept is not None:
            whole = torch.where(kept[..., None], whole, compared.view(batch.shape).to(whole.dtype))
        out = SAEOutput(
            whole,
            all_codes.view(*batch.shape[:-1], self.latents),
            {"reconstruction": self.reconstruction_weight * loss} | terms,
            kept,
        )
        self._count_silence(out.fired(), len(y))
        if self.auxk:
            aux: Tensor | SparseCodes | None = None
            strength = self.activation.auxk_scores
            # (Compiled code would be compiled again for each number that it compares.)
            if torch.compiler.is_compiling() or self._may_be_dead(len(y)):
                if dictionary is None:
                    assert isinstance(scores, Tensor)
                    aux = dead_codes(strength(scores), self.dead, self.auxk_k)
                else:
                    aux = sparse_dead_codes(dictionary, query, strength, self.dead, self.auxk_k)
            loss = at_least_float32(y.new_zeros(()))
            if aux is not None:
                left = at_least_float32(self.architecture.combine(aux)) * scale
                loss = auxk_loss(goal, rebuilt, left, self.dead.any(), self.world_size)
            out.losses["auxk"] = self.auxk * loss
        return out, overflows

    def _dictionary(self, like: Tensor) -> Dictionary | None:
        """The architecture's, where sparse codes can be faster."""
        return None if prefers_dense(like) else self.architecture.dictionary()

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
        """What `decode` adds, times its scale: [d], with `position_mean` [T, d], or None. In units
        of tokens, as all of the dictionary is; inside the architecture it is of normalised ones."""
        bias, mean = self.architecture.bias, self.normalization.mean
        if mean is None:
            return bias
        offset = mean.to(next(self.architecture.parameters()).dtype)
        return offset if bias is None else offset + self._contribution(bias)

    def decoder_rows(self, latents: Tensor | None = None) -> Tensor:
        """What each latent adds to the reconstruction: [M, d], or those of `latents`."""
        return self._contribution(self.architecture.decoder_rows(latents))

    def _contribution(self, rows: Tensor) -> Tensor:
        """Rows [..., d] of the architecture in units of tokens."""
        if self.normalization.deviation is not None:
            rows = rows * self.normalization.deviation.to(rows.dtype)
        return self.normalization.inverse(rows, shifted=False)

    @property
    def dead(self) -> Tensor:
        """BoolTensor [M]: silent for `dead_after` training tokens or more."""
        return self.tokens_since_fired >= self.dead_after

    def read_silence(self) -> None:
        """Read for how many tokens the latents have been silent. A training does it now and then:
        in between, AuxK knows without a wait for the device that none can be dead yet."""
        counter = self.tokens_since_fired
        self._silence = counter.device, counter._version, int(counter.max())

    def _may_be_dead(self, tokens: int) -> bool:
        """Whether there can be dead latents after a step on so many tokens: none is silent for
        longer than the longest when it was read, and what came since."""
        counter = self.tokens_since_fired
        device, version, longest = self._silence
        if (device, version + 1) == (counter.device, counter._version):  # the last step's
            self._silence = device, version + 1, longest + tokens * self.world_size
        else:
            self.read_silence()
        return self._silence[-1] >= self.dead_after

    @torch.no_grad()
    def _count_silence(self, fired: Tensor, tokens: int) -> None:
        fired = summed(fired, self.world_size)
        silence = torch.where(fired > 0, 0, self.tokens_since_fired + tokens * self.world_size)
        self.tokens_since_fired.copy_(silence)

    # --- around a training step ---

    @property
    def world_size(self) -> int:
        """Ranks of torch.distributed that one batch is spread over, in equal parts: BatchTopK, dead
        latents and AuxK's scale are those of the whole batch. (Running means are averaged by
        `clipsae.training.ranks`.)"""
        return self.activation.world_size

    @world_size.setter
    def world_size(self, size: int) -> None:
        self.activation.world_size = size

    @torch.no_grad()
    def initialize(self, tokens: Tensor, *, target: Tensor | None = None) -> None:
        """Set what starts from data: once, before the first step, with images [N, T, d].

        The statistics of `normalize` are those of these images where `normalization.fit` has not
        set them from more.

        Args:
            target: what is to be reconstructed of them, [N, T, d]; None: they themselves.
        """
        self._check(tokens)
        if not self.normalization.fitted:
            self.normalization.fit(Moments.of([tokens]))
        start = self._encoded(tokens) if target is None else target / self.input_scale(tokens)
        if self.norm_limit is not None:
            self.norm_limit.copy_(self.config["max_norm_ratio"] * self._norm(tokens).median())
            start = start[self.kept(tokens)][:, None]  # no longer images: each token by itself
        self.architecture.initialize(start)

    def before_step(self, step: int, max_steps: int) -> None:
        """Before each batch of a training that has taken `step` of its `max_steps` steps."""
        self.activation.before_step(step, max_steps)

    def after_backward(self) -> None:
        """After each backward pass, before clipping and the optimizer's step."""
        self.architecture.after_backward()

    @torch.no_grad()
    def estimate_statistics(self, x: Tensor) -> None:
        """What a training learns without a step, such as BatchTopK's threshold, from tokens
        [N, T, d]. In training mode afterwards."""
        self.train()
        objectives, self.objectives = self.objectives, cast("Sequence[Objective]", nn.ModuleList())
        self._train_forward(x, None, None)
        self.objectives = objectives

    @torch.no_grad()
    def after_step(self) -> None:
        """After each optimizer's step."""
        self.architecture.after_step()
        self.activation.after_step()
        for objective in self.objectives:
            objective.after_step()
        if self.config["freeze"] == "soft_decoder":
            if self.start_rows is None:
                raise RuntimeError(
                    "freeze='soft_decoder': an SAE's files do not hold the rows where its training "
                    "began, so it cannot be trained further: continue from a checkpoint"
                )
            (rows,) = self.architecture.matrices("decoder")
            for part, start in zip(row_parts(rows), row_parts(self.start_rows), strict=True):
                part.copy_(within_cone(part, start))

    # --- on disk ---

    def save(self, folder: Path | str) -> None:
        """Write `sae.safetensors` and `sae.json` into a folder: everything but `start_rows`, which
        only the training needs."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = self.state_dict()
        state.pop("start_rows", None)
        save_file(
            {name: tensor.contiguous() for name, tensor in state.items()},
            folder / "sae.safetensors",
        )
        about = {"format": FORMAT, "version": VERSION, "config": self.config}
        (folder / "sae.json").write_text(json.dumps(about, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path | str) -> "SAE":
        """Read what `save` wrote, bit for bit. In eval mode, on the CPU.

        Raises:
            FileNotFoundError: no SAE there.
            ValueError: written by a newer version, of a plugin that was not imported, or weights
                that do not fit the config.
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
        config = dict(about["config"])
        for old in ("l0", "l1") if about["version"] < 2 else ():
            if old in config:
                config[RENAMED[old]] = config.pop(old)
        if about["version"] < 4 and "normalize_input" in config:
            config["normalize"] = NORMALIZE_INPUT[config.pop("normalize_input")]
        for known in (ARCHITECTURES, ACTIVATIONS):
            name = config.get(known.kind)
            if isinstance(name, str) and name not in known:
                raise ValueError(
                    f"{folder}/sae.json: {known.kind}={name!r} does not exist here; it may be a "
                    "plugin's: give plugins=[file.py], or import the file first"
                )
        weights.pop("start_rows", None)  # earlier files have them
        with torch.device("meta"):
            sae = cls(**config)
        sae.start_rows = None
        try:
            sae.load_state_dict(weights, assign=True)
        except RuntimeError as error:
            wrong = str(error).splitlines()[1].strip()
            message = f"{folder}/sae.safetensors does not fit its config: {wrong}"
            raise ValueError(message) from error
        return sae.eval()


@torch.no_grad()
def within_cone(rows: Tensor, start: Tensor, cosine: float = LEAST_COSINE) -> Tensor:
    """The rows [n, d], those whose cosine with their row of `start` is below `cosine` replaced by
    the nearest of the same norm that has it; the others, and rows of norm 0, bit for bit as they
    are. With u = start / ||start|| and p the unit vector of the part of a row w orthogonal to u:
    ||w|| (c u + sqrt(1 - c^2) p). Where w = -||w|| u has no such part, the axis that u has least of
    takes its place.
    """
    w = at_least_float32(rows)
    u = nn.functional.normalize(at_least_float32(start), dim=-1)
    norm = torch.linalg.vector_norm(w, dim=-1, keepdim=True)
    along = (w * u).sum(dim=-1, keepdim=True)
    across = w - along * u
    least = u.abs().argmin(dim=-1, keepdim=True)
    axis = torch.zeros_like(u).scatter_(-1, least, 1)  # (`one_hot` waits for a GPU)
    axis = axis - (axis * u).sum(dim=-1, keepdim=True) * u
    tiny = torch.linalg.vector_norm(across, dim=-1, keepdim=True) <= 1e-6 * norm
    across = nn.functional.normalize(torch.where(tiny, axis, across), dim=-1)
    nearest = norm * nn.functional.normalize(cosine * u + math.sqrt(1 - cosine**2) * across, dim=-1)
    return torch.where((norm > 0) & (along < cosine * norm), nearest.to(rows.dtype), rows)


def _among(codes: Tensor | SparseCodes, rows: Tensor, n: int) -> Tensor | SparseCodes:
    """Codes [n', M] of the tokens `rows` [n'] among n: [n, M], zero elsewhere."""
    if isinstance(codes, SparseCodes):
        codes, m = codes.nonzero(), codes.latents  # without a GPU's padding
        return SparseCodes(codes.values, rows[codes.token.long()] * m + codes.latent, (n, m))
    return codes.new_zeros(n, codes.shape[1]).index_copy(0, rows, codes)


def _part_options(
    architecture: str, activation: str, given: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any], dict[str, dict[str, Any]]]:
    """All options of the architecture, the activation and each objective, as given or by
    default."""
    objectives = {name: OBJECTIVES.options(name) for name in OBJECTIVES}
    chosen = ARCHITECTURES.options(architecture), ACTIVATIONS.options(activation)
    parts = [*chosen, *objectives.values()]
    common = set(inspect.signature(SAE).parameters) - {"options"}
    names = [*common, *(name for part in parts for name in part)]
    doubled = {name for name in names if names.count(name) > 1}
    if doubled:
        raise ValueError(
            f"architecture={architecture} and activation={activation}: option '{min(doubled)}' is "
            "declared twice among them, the objectives and the SAE: choose another architecture or "
            "activation, or rename the option where it is yours"
        )
    unknown = min(set(given) - set(names), default=None)
    if unknown is not None:
        new, value = RENAMED.get(unknown), given[unknown]
        if new in names:
            now = NORMALIZE_INPUT[value] if isinstance(value, bool) else value
            raise ValueError(f"{unknown}={value!r}: this option is now {new}: {new}={now!r}")
        raise ValueError(
            f"{unknown}={value!r}: architecture={architecture} with activation={activation} has no "
            f"such option{near(unknown, names)}; it has {', '.join(sorted(names))}"
        )
    for options in parts:
        options.update((name, value) for name, value in given.items() if name in options)
        missing = [name for name, value in options.items() if value is inspect.Parameter.empty]
        if missing:
            raise ValueError(f"{missing[0]} has no default: give it a value")
    return *chosen, objectives


def _chosen(objective: str, options: dict[str, Any]) -> bool:
    """Whether an SAE with these options has the objective.

    Raises:
        ValueError: it has not, and one of its other options is set.
    """
    (first, default), *others = OBJECTIVES.options(objective).items()
    if options[first] != default:
        return True
    for name, value in others:
        if options[name] != value:
            raise ValueError(
                f"{name}={options[name]!r} does nothing while {first} is {default!r}: set both or "
                "neither"
            )
    return False
