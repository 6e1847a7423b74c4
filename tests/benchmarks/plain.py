"""Training steps and top-n classification in straightforward torch: dense products, full sorts."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from clipsae.sae import SAE

Parameters = dict[str, Tensor]
Key = tuple[str, int | None]


def step(
    sae: SAE, x: Tensor, precision: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> Callable[[], None]:
    """A training step of a copy of the SAE's parameters on tokens x [1, N, d]."""
    p = {n.rsplit(".")[-1]: nn.Parameter(v.detach().clone()) for n, v in sae.named_parameters()}
    x = x.flatten(0, -2)
    optimizer = torch.optim.Adam(p.values(), lr=1e-5)
    function = _FORMS[sae.config["activation"]]
    unit_rows, options = sae.architecture.unit_rows, sae.config
    del sae

    def once() -> None:
        optimizer.zero_grad()
        with precision():
            loss = function(p, x, options)
        loss.backward()
        if unit_rows:
            rows, gradient = p["W_dec"].data, p["W_dec"].grad
            gradient -= (gradient * rows).sum(1, keepdim=True) * rows
        optimizer.step()
        if unit_rows:
            p["W_dec"].data /= p["W_dec"].data.norm(dim=1, keepdim=True)

    return once


def error(x_hat: Tensor, x: Tensor) -> Tensor:
    return ((x_hat - x).square() / x.norm(dim=1, keepdim=True)).mean()


def scores(p: Parameters, x: Tensor, options: dict) -> Tensor:
    if options["normalize"] == "unit":
        x = x / x.norm(dim=1, keepdim=True)
    if "C" in p:
        return x @ (p["C"] @ p["W_K"]).T
    s = (x - p["b_dec"]) @ p["W_enc"].T
    return s + p["b_enc"] if "b_enc" in p else s


def decode(p: Parameters, z: Tensor, x: Tensor, options: dict) -> Tensor:
    out = z @ (p["C"] @ p["W_V"]) if "C" in p else z @ p["W_dec"] + p["b_dec"]
    return out * x.norm(dim=1, keepdim=True) if options["normalize"] == "unit" else out


def encode(p: Parameters, x: Tensor, options: dict) -> Tensor:
    """Codes [N, M] of tokens x [N, d] in evaluation."""
    return _CODES[options["activation"]](scores(p, x, options), p, options)


def relu(p: Parameters, x: Tensor, options: dict) -> Tensor:
    z = torch.relu(scores(p, x, options))
    weighted = z * (p["C"] @ p["W_V"]).norm(dim=1) if "C" in p else z
    loss = options["reconstruction_weight"] * error(decode(p, z, x, options), x)
    return loss + options["l1_coefficient"] * weighted.sum(1).mean()


def jumprelu(p: Parameters, x: Tensor, options: dict) -> Tensor:
    s, theta, eps = scores(p, x, options), p["theta"], options["bandwidth"]
    passes = (s > theta).float()
    near = (((s - theta) / eps).abs() < 0.5).float().detach()
    pull = near / eps * (theta - theta.detach())
    z = s * passes - theta.detach() * pull
    loss = options["reconstruction_weight"] * error(decode(p, z, x, options), x)
    active = (passes - pull).sum(1).mean()
    if options["target_l0"] is not None:
        active = (active / options["target_l0"] - 1).square()
    return loss + options["l0_coefficient"] * active


def gated(p: Parameters, x: Tensor, options: dict) -> Tensor:
    h = scores(p, x, options)
    pi = h + p["b_gate"]
    z = (pi > 0).float() * torch.relu(p["r_mag"].exp() * h + p["b_mag"])
    gate = torch.relu(pi)
    by_gate = gate @ p["W_dec"].detach() + p["b_dec"].detach()
    loss = options["reconstruction_weight"] * error(decode(p, z, x, options), x)
    return (
        loss
        + options["l1_coefficient"] * gate.sum(1).mean()
        + options["gate_weight"] * error(by_gate, x)
    )


def topk(p: Parameters, x: Tensor, options: dict) -> Tensor:
    z = topk_codes(scores(p, x, options), p, options)
    return options["reconstruction_weight"] * error(decode(p, z, x, options), x)


def topk_codes(s: Tensor, p: Parameters, options: dict) -> Tensor:
    s = torch.relu(s)
    values, indices = s.topk(options["k"], dim=1)
    return torch.zeros_like(s).scatter(1, indices, values)


def batch_topk(p: Parameters, x: Tensor, options: dict) -> Tensor:
    s = torch.relu(scores(p, x, options))
    values, indices = s.flatten().topk(options["k"] * len(x))
    z = torch.zeros_like(s).flatten().scatter(0, indices, values).view_as(s)
    return options["reconstruction_weight"] * error(decode(p, z, x, options), x)


def sparsemax(p: Parameters, x: Tensor, options: dict) -> Tensor:
    z = sparsemax_codes(scores(p, x, options), p, options)
    return options["reconstruction_weight"] * error(decode(p, z, x, options), x)


def sparsemax_codes(s: Tensor, p: Parameters, options: dict) -> Tensor:
    """As released: a full sort finds the support; z = s there."""
    ordered = s.detach().sort(dim=1, descending=True).values
    r = torch.arange(1, s.shape[1] + 1, device=s.device)
    sums = ordered.cumsum(1)
    size = (1 + r * ordered > sums).sum(1, keepdim=True)
    tau = (sums.gather(1, size - 1) - 1) / size
    return s * (s > tau)


_FORMS = {f.__name__: f for f in (relu, jumprelu, gated, topk, batch_topk, sparsemax)}
_CODES = {
    "relu": lambda s, p, options: torch.relu(s),
    "jumprelu": lambda s, p, options: s * (s > p["theta"]),
    "gated": lambda s, p, options: (
        torch.relu(p["r_mag"].exp() * s + p["b_mag"]) * (s > -p["b_gate"])
    ),
    "topk": topk_codes,
    "batch_topk": lambda s, p, options: torch.relu(s) * (s > p["inference_threshold"]),
    "sparsemax": sparsemax_codes,
}


class PlainTopN:
    """Top-n classification as released: a hook on open_clip's model, a whole forward pass for each
    setting (no_sae, on, off and n), and a dense SAE in each but no_sae.

    B images, T tokens, d width, M latents, C classes.

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
                codes = encode(self.parameters, output.flatten(0, 1), self.options)
                codes = codes.view(*output.shape[:2], -1)
                if count is not None:
                    counts.index_add_(0, count, (codes > self.threshold).sum(dim=1))
                    sums.index_add_(0, count, codes.double().sum(dim=1))
                codes = codes if mask is None else codes * mask[:, None, :]
                out = decode(
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
