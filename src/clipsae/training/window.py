"""Sums over the tokens since the last reset: one division at the end, no mean of means."""

import torch
from torch import Tensor
from torchmetrics import Metric

from clipsae.sae import SAEOutput


class TokenSums(Metric):
    """Loss terms, reconstruction quality and sparsity over all tokens since the last reset.

    All sums are float64 where the device has it; nothing is read back to the host before
    `compute`. Under DDP the sums are reduced, so the result is that of one process.

    Args:
        d: width of the tokens.
        latents: number of latents M, to count how often each is active; None: not counted.
    """

    full_state_update = False

    def __init__(self, d: int, latents: int | None = None) -> None:
        super().__init__(sync_on_compute=True)
        for name in ("tokens", "squared_error", "squared_norm", "active"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        if latents is not None:
            self.add_state("fired", torch.zeros(latents, dtype=torch.int64), dist_reduce_fx="sum")
        self.latents = latents
        self.add_state("token_sum", torch.zeros(d, dtype=torch.float64), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(self, x: Tensor, out: SAEOutput) -> None:
        """Add a batch.

        Args:
            x: tokens [..., d].
            out: what the SAE made of them.
        """
        flat = x.reshape(-1, x.shape[-1]).float()
        reconstruction = out.reconstruction.reshape_as(flat)
        if out.kept is not None:
            kept = out.kept.flatten()
            flat, reconstruction = flat[kept], reconstruction[kept]
            self._add_sum("left_out")
            self.left_out += (~kept).sum()
        n = flat.shape[0]
        error = reconstruction.float() - flat
        self.tokens += n
        self.squared_error += error.square().sum(dtype=torch.float64)
        self.squared_norm += flat.square().sum(dtype=torch.float64)
        self.token_sum += flat.sum(0, dtype=torch.float64)
        fired = out.fired()
        self.active += fired.sum()
        if self.latents is not None:
            self.fired += fired
        for name, term in out.losses.items():
            state = f"loss_{name}"
            self._add_sum(state)
            setattr(self, state, getattr(self, state) + term.detach().double() * n)

    def _add_sum(self, state: str) -> None:
        """Make room for what only some SAEs have, such as a named term; known from their first
        step."""
        if state not in self._defaults:
            zero = torch.zeros((), dtype=torch.float64, device=self.tokens.device)
            self.add_state(state, zero, dist_reduce_fx="sum")

    def sums(self) -> dict[str, Tensor]:
        """The sums of all ranks since the last reset, for `restore`; to be called on every rank."""
        with self.sync_context():
            return {name: getattr(self, name).clone() for name in self._defaults}

    def restore(self, sums: dict[str, Tensor]) -> None:
        """Go on from what `sums` returned."""
        for name, value in sums.items():
            self._add_sum(name)
            setattr(self, name, value.to(self.tokens.device))

    def compute(self) -> dict[str, Tensor]:
        """`loss`, `loss/<term>`, `fvu`, `explained_variance` (1 - fvu), `l0` (mean number of
        active latents per token); where the SAE leaves out some, `left_out`, their share."""
        total = self.squared_norm - self.token_sum.square().sum() / self.tokens
        fvu = self.squared_error / total
        terms = {
            name.removeprefix("loss_"): getattr(self, name) / self.tokens
            for name in self._defaults
            if name.startswith("loss_")
        }
        more = {}
        if "left_out" in self._defaults:
            more["left_out"] = self.left_out / (self.tokens + self.left_out)
        return {
            "loss": torch.stack(list(terms.values())).sum() if terms else fvu * 0,
            **{f"loss/{name}": value for name, value in terms.items()},
            "fvu": fvu,
            "explained_variance": 1 - fvu,
            "l0": self.active / self.tokens,
            **more,
        }
