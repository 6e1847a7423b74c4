"""Seed stability: does another seed find the same directions?

Mean max cosine as in Sharkey, Braun and Millidge (2022); the one-to-one matching as in Paulo and
Belrose, "Sparse Autoencoders Trained on the Same Data Learn Different Features" (2025). These are
functions of two finished dictionaries: nothing accumulates.

M latents of one dictionary, M' of the other, d width.
"""

import torch
from torch import Tensor, nn

METHODS = ("assignment", "greedy")
_BLOCK_ELEMENTS = 2**25
_ASSIGNMENT_ROWS = 16_384  # 2 GB of costs, minutes: cubic from there


def max_cosines(a: Tensor, b: Tensor) -> Tensor:
    """The largest cosine of each row of a [M, d] with any row of b [M', d]: float [M].

    NaN for rows of zeros in a; those of b are left out.
    """
    a, b = _checked(a, b)
    found = torch.full((len(a),), torch.nan, dtype=a.dtype, device=a.device)
    directed = a.any(dim=-1)
    found[directed] = _best(_unit(a[directed]), _unit(b[b.any(dim=-1)]))[0]
    return found


def mean_max_cosine(a: Tensor, b: Tensor) -> Tensor:
    """Mean over the rows of a [M, d] of the largest cosine with a row of b [M', d].

    Not symmetric, and several rows may share one partner; `matched_cosines` is one to one.
    """
    return max_cosines(a, b).nanmean(dtype=torch.float64)


def matched_cosines(a: Tensor, b: Tensor, method: str = "assignment") -> tuple[Tensor, Tensor]:
    """Pair the rows of two dictionaries one to one.

    Args:
        a: [M, d]; rows of zeros take no part.
        b: [M', d], the same.
        method: "assignment", the matching with the largest sum (needs SciPy; up to 16,384 rows,
            as it takes M x M' memory and cubic time); or "greedy", the largest cosine first, then
            the largest among what is left: in blocks, for any M. Its sum is at least half the
            best where cosines are not negative, and usually very near to it.

    Returns:
        cosines [P] and pairs LongTensor [P, 2] (row of a, row of b), by row of a; P is the number
        of rows of the smaller dictionary.

    Raises:
        ValueError: an unknown method, too many rows for an assignment, different widths.
    """
    a, b = _checked(a, b)
    rows_a, rows_b = (x.any(dim=-1).nonzero().squeeze(1) for x in (a, b))
    unit_a, unit_b = _unit(a[rows_a]), _unit(b[rows_b])
    if method == "assignment":
        of_a, of_b = _assign(unit_a, unit_b)
    elif method == "greedy":
        of_a, of_b = _greedy(unit_a, unit_b)
    else:
        raise ValueError(f"method={method!r}: expected one of {', '.join(METHODS)}")
    cosines = (unit_a[of_a] * unit_b[of_b]).sum(dim=-1)
    return cosines, torch.stack((rows_a[of_a], rows_b[of_b]), dim=1)


def _checked(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(
            f"dictionaries {tuple(a.shape)} and {tuple(b.shape)}: expected [M, d] and [M', d]"
        )
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return a.detach().to(dtype), b.detach().to(dtype)


def _unit(rows: Tensor) -> Tensor:
    return nn.functional.normalize(rows, dim=-1, eps=0)


def _best(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Largest cosine [m] of unit rows a [m, d] with b, and the row of b; NaN if b is empty."""
    if not len(b):
        return a.new_full((len(a),), torch.nan), a.new_zeros(len(a), dtype=torch.long)
    parts = [
        (part @ b.T).max(dim=1) for part in a.split(max(1, _BLOCK_ELEMENTS // len(b))) if len(part)
    ]
    if not parts:
        return a.new_zeros(0), a.new_zeros(0, dtype=torch.long)
    return torch.cat([p.values for p in parts]), torch.cat([p.indices for p in parts])


def _assign(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if max(len(a), len(b)) > _ASSIGNMENT_ROWS:
        raise ValueError(
            f"an assignment of {len(a)} and {len(b)} rows: expected at most {_ASSIGNMENT_ROWS}; "
            "use method='greedy'"
        )
    try:
        from scipy.optimize import linear_sum_assignment  # only this needs SciPy
    except ImportError as error:
        raise ValueError(
            "method='assignment' needs SciPy: install scipy, or use method='greedy'"
        ) from error
    rows, columns = linear_sum_assignment((a @ b.T).cpu().numpy(), maximize=True)
    return torch.from_numpy(rows).to(a.device), torch.from_numpy(columns).to(a.device)


def _greedy(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds of mutual best partners: each is what greedy choice would take, many at once."""
    left_a = torch.arange(len(a), device=a.device)
    left_b = torch.arange(len(b), device=a.device)
    pairs = []
    while len(left_a) and len(left_b):
        _, to_b = _best(a[left_a], b[left_b])
        _, to_a = _best(b[left_b], a[left_a])
        here = torch.arange(len(left_a), device=a.device)
        mutual = to_a[to_b] == here
        if not mutual.any():  # ties that rounding broke differently in the two products
            mutual[0] = True
        pairs.append(torch.stack((left_a[mutual], left_b[to_b[mutual]]), dim=1))
        keep_b = torch.ones_like(left_b, dtype=torch.bool)
        keep_b[to_b[mutual]] = False
        left_a, left_b = left_a[~mutual], left_b[keep_b]
    if not pairs:
        return left_a[:0], left_b[:0]
    found = torch.cat(pairs)
    ordered = found[found[:, 0].argsort()]
    return ordered[:, 0], ordered[:, 1]
