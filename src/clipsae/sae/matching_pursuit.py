"""Matching pursuit: codes by k greedy steps, each of which explains what the ones before left over.

Costa et al., "From Flat to Hierarchical: Extracting Sparse Representations with Matching Pursuit",
2025 (arXiv 2506.03093). With W the rows of W_dec, of norm 1, and r = x - b_dec, k times:

    i = argmax_m r W_m      c = relu(r W_i)      z_i <- z_i + c      r <- r - c W_i

Gradients flow through the residuals, not through the choice. There is no encoder. SAELens ends a
token's steps early by two rules, which are options here.
"""

import torch
from torch import Tensor, nn

from clipsae.sae.checks import boolean, not_negative, whole
from clipsae.sae.linear import Linear
from clipsae.sae.registry import ARCHITECTURES
from clipsae.sae.sparse_ops import Dictionary

GRAM = 8192  # latents up to which the products of all rows with each other are made


@ARCHITECTURES.register("matching_pursuit")
class MatchingPursuit(Linear):
    """Scores that are codes already, at most k of a token above 0 and the others 0: with the
    activation "relu" (and no penalty), whose threshold is 0, they are the codes.

    A step takes k products of tokens and dictionary, of which gradients need none; where M is small
    one product of the dictionary with itself and k sums. A latent that is chosen again adds to its
    code. Codes are computed densely.

    Args:
        d: width of the tokens.
        latents: M.
        encoder_bias: unused; there is no encoder.
        k: greedy steps, 1 to M.
        residual_threshold: a token's steps end when the norm of its residual is below; 0: never.
        stop_on_repeat: they end with the first that chooses a latent again.
        bias_init: of b_dec, as in `Linear`.
    """

    scores_all = False

    def __init__(
        self,
        d: int,
        latents: int,
        encoder_bias: bool = True,
        *,
        k: int = 32,
        residual_threshold: float = 0.0,
        stop_on_repeat: bool = False,
        bias_init: str = "images",
    ) -> None:
        super().__init__(d, latents, False, bias_init=bias_init)
        whole("k", k, most=latents, most_name="latents")
        not_negative("residual_threshold", residual_threshold)
        boolean("stop_on_repeat", stop_on_repeat)
        self.k = k
        self.residual_threshold = residual_threshold
        self.stop_on_repeat = stop_on_repeat
        del self.W_enc

    def dictionary(self) -> Dictionary | None:
        return None

    def scores(self, x: Tensor, latents: Tensor | None = None) -> Tensor:
        residual = (x - self.b_dec).flatten(0, -2)
        chosen = self.choose(residual.detach())
        codes, goes_on = [], torch.ones_like(chosen[:, :1], dtype=torch.bool)
        for t, rows in enumerate(nn.functional.embedding(chosen, self.W_dec).unbind(dim=1)):
            code = torch.relu((residual * rows).sum(dim=-1, keepdim=True))
            if self.residual_threshold or self.stop_on_repeat:
                code = code * goes_on
            residual = residual - code * rows
            codes.append(code)
            if self.residual_threshold:
                norm = torch.linalg.vector_norm(residual.detach(), dim=-1, keepdim=True)
                goes_on = goes_on & (norm >= self.residual_threshold)
            if self.stop_on_repeat:
                again = chosen[:, :t] == chosen[:, t : t + 1]
                goes_on = goes_on & ~again.any(dim=-1, keepdim=True)
        scores = residual.new_zeros(len(chosen), len(self.W_dec))
        scores = scores.scatter_add(1, chosen, torch.cat(codes, dim=1).to(scores.dtype))
        scores = scores.view(*x.shape[:-1], len(self.W_dec))
        if latents is None:
            return scores
        if latents.ndim == 1:
            return scores[..., latents]
        return scores.gather(-1, latents[:, None].expand(-1, x.shape[1], -1))

    @torch.no_grad()
    def choose(self, x: Tensor) -> Tensor:
        """The latents of the k steps, LongTensor [N, k], of centred tokens [N, d]; of fewer, where
        those of all tokens have ended by a repeat."""
        m, rows = len(self.W_dec), self.W_dec.detach().to(x.dtype)
        # Products of x with all rows, less those of the chosen rows with all.
        gram = rows @ rows.T if m <= min(GRAM, self.k * len(x)) else None
        scores, chosen = x @ rows.T, list[Tensor]()
        ended = torch.zeros(len(x), 1, dtype=torch.bool, device=x.device)
        for t in range(self.k):
            code, latent = scores.max(dim=-1, keepdim=True)
            if self.stop_on_repeat:
                for earlier in chosen:
                    ended |= earlier == latent
            chosen.append(latent)
            if t + 1 == self.k or (self.stop_on_repeat and bool(ended.all())):
                break
            step = torch.relu(code)
            if gram is not None:
                scores -= step * gram[latent[:, 0]]
            else:
                x = x - step * rows[latent[:, 0]]
                scores = x @ rows.T
        return torch.cat(chosen, dim=1)

    def matrices(self, part: str) -> list[nn.Parameter]:
        return [self.W_dec]
