"""Top-n classification as released: a hook on open_clip's model, a whole forward pass for each
setting, and in each but no_sae the SAE encoded and decoded by dense products.

Eleven passes of the image tower and ten of the SAE for each image: `no_sae`, `on_M` (which also
counts) and `off_M`, then `on_n` and `off_n`. B images, T tokens, d width, M latents, C classes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clipsae.sae import SAE
from tests.benchmarks import plain

Key = tuple[str, int | None]


class PlainTopN:
    """The settings no_sae, on and off of one SAE.

    Args:
        model: open_clip's; the SAE reads and replaces the output of its image tower's `block`.
        classifier: [C, e].
        threshold: a (token, latent) pair counts if its code is larger.
    """

    def __init__(
        self,
        model: nn.Module,
        block: int,
        sae: SAE,
        classifier: Tensor,
        *,
        ns: Sequence[int],
        threshold: float,
    ) -> None:
        self.model = model
        self.block = model.visual.transformer.resblocks[block]
        self.parameters = {name.rsplit(".")[-1]: p for name, p in sae.state_dict().items()}
        self.options = sae.config
        self.latents = sae.latents
        self.classifier = classifier
        self.ns = ns
        self.threshold = threshold

    @torch.no_grad()
    def run(self, batches: Sequence[tuple[Tensor, Tensor]]) -> dict[Key, Tensor]:
        """Cosines [N, C] in each setting of batches of images [B, 3, S, S] and labels [B]."""
        found: dict[Key, list[Tensor]] = {}
        classes = 1 + int(max(labels.max() for _, labels in batches))
        on = {"device": self.classifier.device}
        counts = torch.zeros(classes, self.latents, dtype=torch.long, **on)
        sums = torch.zeros(classes, self.latents, dtype=torch.float64, **on)

        def add(key: Key, images: Tensor, mask: Any = None, count: Tensor | None = None) -> None:
            def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
                codes = plain.encode(self.parameters, output.flatten(0, 1), self.options)
                codes = codes.view(*output.shape[:2], -1)
                if count is not None:
                    counts.index_add_(0, count, (codes > self.threshold).sum(dim=1))
                    sums.index_add_(0, count, codes.double().sum(dim=1))
                codes = codes if mask is None else codes * mask[:, None, :]
                out = plain.decode(
                    self.parameters, codes.flatten(0, 1), output.flatten(0, 1), self.options
                )
                return out.view_as(output)

            handle = None if key[0] == "no_sae" else self.block.register_forward_hook(hook)
            embedding = self.model.encode_image(images, normalize=True)
            if handle is not None:
                handle.remove()
            found.setdefault(key, []).append(embedding @ self.classifier.T)

        for images, labels in batches:
            add(("no_sae", None), images)
            add(("on", self.latents), images, count=labels)
            add(("off", self.latents), images, torch.zeros(len(images), self.latents, **on))
        by_sum = sums.sort(dim=1, descending=True, stable=True).indices
        order = counts.gather(1, by_sum).sort(dim=1, descending=True, stable=True).indices
        ranking = by_sum.gather(1, order)
        for images, labels in batches:
            for n in self.ns:
                mask = torch.zeros(len(images), self.latents, **on)
                mask.scatter_(1, ranking[labels, :n], 1)
                add(("on", n), images, mask)
                add(("off", n), images, 1 - mask)
        return {key: torch.cat(parts) for key, parts in found.items()}
