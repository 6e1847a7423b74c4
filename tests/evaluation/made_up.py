"""Made-up codes as a pass yields them, and the sizes of a made-up SAE."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from clipsae.evaluation.floors import RandomDirections, untrained
from clipsae.evaluation.metrics import Options
from clipsae.evaluation.passes import Batch, pool_codes
from clipsae.sae import SparseCodes


def sizes(latents: int, d: int = 1) -> Any:
    """All that most measurements read of an SAE."""
    return SimpleNamespace(config={"d": d, "latents": latents})


def options(images: int = 1000, tokens: int = 1, **more: Any) -> Options:
    return Options(images, tokens, **more)


def batch_of(codes: Tensor, first: int = 0, sae: Any = None, **given: Any) -> Batch:
    """Images with codes [B, T, M] (or [B, M]: of one token each), at positions from `first` on.

    Args:
        sae: whose untrained twin there is; None: one that is never active.
        given: tokens [B, T, d] or [B, d], labels, embeddings, ...
    """
    codes = codes[:, None] if codes.ndim == 2 else codes
    tokens = given.pop("tokens", torch.zeros(len(codes), 1))
    tokens = tokens[:, None] if tokens.ndim == 2 else tokens
    tokens = tokens.expand(-1, codes.shape[1], -1)
    m = codes.shape[-1]
    silent: Any = SimpleNamespace(
        encode_sparse=lambda x: SparseCodes.from_dense(x.new_zeros(*x.shape[:-1], m))
    )
    twin = silent if sae is None else untrained(sae, tokens)
    floors = {"random": RandomDirections(tokens), "untrained": twin}
    once: Any = lambda key, make: make()  # noqa: E731
    stream = SimpleNamespace(dataset=None, floors=lambda of: floors, once=once)
    images = SimpleNamespace(stream=stream, once=once)
    batch = Batch(images, sizes(codes.shape[-1]), slice(None))
    at = torch.arange(first, first + len(codes))
    known = {"codes": codes, "sparse": SparseCodes.from_dense(codes), "indices": at}
    known |= {"tokens": tokens, "targets": tokens, "streams": tokens}
    known |= {"kept": None}
    known |= {"positions": at, "pooled": pool_codes(codes)}
    known["labels"] = torch.zeros(len(codes), dtype=torch.long)
    batch.__dict__.update(known | given)
    return batch
