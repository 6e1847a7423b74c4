"""Seed stability: does another seed find the same directions?

Mean max cosine as in Sharkey, Braun and Millidge (2022), and one to one, by the assignment of rows
that has the largest sum of cosines: functions of two finished dictionaries.
"""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from clipsae.sae.dense import without_tf32

_BLOCK_ELEMENTS = 2**25


@without_tf32()
def max_cosines(a: Tensor, b: Tensor) -> Tensor:
    """The largest cosine of each row of a [M, d] with any row of b [M', d]: float [M].

    NaN for rows of zeros in a; those of b are left out.
    """
    _check(a, b)
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    a, b = (nn.functional.normalize(x.detach().to(dtype), dim=-1, eps=0) for x in (a, b))
    b = b[~b.isnan().any(dim=-1)]  # 0/0 where there is no direction
    if not len(b):
        return a.new_full((len(a),), torch.nan)
    return torch.cat([(part @ b.T).amax(dim=1) for part in a.split(_BLOCK_ELEMENTS // len(b) + 1)])


def _check(a: Tensor, b: Tensor) -> None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(
            f"dictionaries {tuple(a.shape)} and {tuple(b.shape)}: expected [M, d] and [M', d]"
        )


def mean_max_cosine(a: Tensor, b: Tensor) -> Tensor:
    """Mean over the rows of a [M, d] of the largest cosine with a row of b [M', d].

    Not symmetric, and several rows may share one partner.
    """
    return max_cosines(a, b).nanmean(dtype=torch.float64)


# Rows up to which the assignment is exact: half a minute, and 0.5 GB of cosines in float64.
EXACT_ROWS = 8192
# Of the auction: how far the mean cosine may be below the largest one.
EPSILON = 1e-3
_PRICED = 8192  # rows that bid at a time
_SCALE = 5  # epsilon falls by this factor from one round to the next


@without_tf32()
def matched_cosine(
    a: Tensor, b: Tensor, *, epsilon: float = EPSILON, exact_rows: int = EXACT_ROWS
) -> Tensor:
    """Mean cosine of rows of a [M, d] and b [M', d] that are matched one to one, so that the sum of
    the cosines is the largest: a float64 scalar.

    Rows of zeros have no direction and are left out; the mean is over min(M, M') pairs of the rest,
    NaN where there are none. Symmetric. Never above the exact value, and below `mean_max_cosine`
    of the smaller dictionary's rows.

    Up to `exact_rows` rows the assignment is exact (scipy's Hungarian algorithm). Above, it is an
    auction with epsilon scaling (Bertsekas, "The auction algorithm", 1988), whose mean is at most
    `epsilon` below the exact one (times M' / M where M < M'). It computes cosines in blocks and
    keeps prices and partners alone, O(M) beside the dictionaries. On one core it took 42 s for
    random dictionaries of 8,192 x 768 and 64 s for clustered ones, 4e-5 below the exact value; time
    grows at least with the square of M: half an hour or more at 49,152 (extrapolated).

    Raises:
        ValueError: dictionaries that do not fit, or epsilon that is not positive.
    """
    _check(a, b)
    if not epsilon > 0:
        raise ValueError(f"epsilon={epsilon}: must be above 0")
    a, b = (nn.functional.normalize(x.detach().float(), dim=-1, eps=0) for x in (a, b))
    a, b = (x[x.isfinite().all(dim=-1)] for x in (a, b))
    if len(a) > len(b):
        a, b = b, a
    if not len(a):
        return torch.tensor(torch.nan, dtype=torch.float64)
    if len(b) <= max(exact_rows, 1):
        cosines = (a.double() @ b.double().T).cpu()
        rows, columns = linear_sum_assignment(cosines.numpy(), maximize=True)
        return cosines[torch.from_numpy(rows), torch.from_numpy(columns)].mean()
    partner = _auction(a, b, epsilon)
    return (a.double() * b[partner[: len(a)]].double()).sum(dim=1).mean()


def _auction(a: Tensor, b: Tensor, epsilon: float) -> Tensor:
    """A partner in b [M', d] for each row of a [M, d], M <= M', each at most once: LongTensor [M].

    Rows without a partner bid for the row of b whose cosine less its price is largest; the price
    rises to where the bidder would as soon have the second best, and by epsilon. With all rows
    content to within epsilon, the sum is at most M epsilon below the best one (where M = M').
    """
    n = len(b)
    # With as many rows on both sides: fewer are filled up with rows that have a cosine of 0 to all.
    a = torch.cat((a, a.new_zeros(n - len(a), a.shape[1])))
    prices = torch.zeros(n, dtype=torch.float64, device=b.device)
    step = max(epsilon, 0.1)
    while True:
        partner = torch.full((n,), -1, device=b.device)
        owner = torch.full((n,), -1, device=b.device)
        while len(waiting := (partner < 0).nonzero()[:, 0][:_PRICED]):
            best, raised = _bids(a[waiting], b, prices, step)
            # Of several bids for a row the highest counts, of equal ones the first.
            order = raised.argsort(descending=True, stable=True)
            order = order[best[order].argsort(stable=True)]
            first = torch.ones_like(order, dtype=torch.bool)
            first[1:] = best[order].diff() != 0
            won, winners = best[order[first]], waiting[order[first]]
            losers = owner[won]
            partner[losers[losers >= 0]] = -1
            owner[won], partner[winners] = winners, won
            prices[won] = raised[order[first]]
        if step <= epsilon:
            return partner
        step = max(epsilon, step / _SCALE)


def _bids(a: Tensor, b: Tensor, prices: Tensor, step: float) -> tuple[Tensor, Tensor]:
    """Of each row of a [w, d] the row of b it bids for, and the price: [w] each."""
    best, raised = [], []
    for part in a.split(_BLOCK_ELEMENTS // len(b) + 1):
        value, at = ((part @ b.T).double() - prices).topk(2, dim=1)
        best.append(at[:, 0])
        raised.append(prices[at[:, 0]] + value[:, 0] - value[:, 1] + step)
    return torch.cat(best), torch.cat(raised)
