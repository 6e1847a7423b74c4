"""Seed stability: does another seed find the same directions?

Mean max cosine as in Sharkey, Braun and Millidge (2022): a function of two finished dictionaries.
"""

import torch
from torch import Tensor, nn

from clipsae.sae.dense import without_tf32

_BLOCK_ELEMENTS = 2**25


@without_tf32()
def max_cosines(a: Tensor, b: Tensor) -> Tensor:
    """The largest cosine of each row of a [M, d] with any row of b [M', d]: float [M].

    NaN for rows of zeros in a; those of b are left out.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(
            f"dictionaries {tuple(a.shape)} and {tuple(b.shape)}: expected [M, d] and [M', d]"
        )
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    a, b = (nn.functional.normalize(x.detach().to(dtype), dim=-1, eps=0) for x in (a, b))
    b = b[~b.isnan().any(dim=-1)]  # 0/0 where there is no direction
    if not len(b):
        return a.new_full((len(a),), torch.nan)
    return torch.cat([(part @ b.T).amax(dim=1) for part in a.split(_BLOCK_ELEMENTS // len(b) + 1)])


def mean_max_cosine(a: Tensor, b: Tensor) -> Tensor:
    """Mean over the rows of a [M, d] of the largest cosine with a row of b [M', d].

    Not symmetric, and several rows may share one partner.
    """
    return max_cosines(a, b).nanmean(dtype=torch.float64)
