"""A sample of codes held sparse: what the metrics keep that need the codes themselves.

N rows (tokens, patches or images), M latents.
"""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


@dataclass(frozen=True)
class SparseRows:
    """Codes [N, M] without their zeros, row by row.

    Attributes:
        counts: LongTensor [N], entries of each row.
        columns: LongTensor [nnz], their latents, ascending within a row.
        values: float32 [nnz]; negative ones are possible.
        width: M.
    """

    counts: Tensor
    columns: Tensor
    values: Tensor
    width: int

    @classmethod
    def from_dense(cls, codes: Tensor) -> "SparseRows":
        """From codes [..., M] of any float dtype; what is not float32 is made so."""
        codes = codes.detach().reshape(-1, codes.shape[-1])
        rows, columns = codes.nonzero(as_tuple=True)
        counts = torch.bincount(rows, minlength=len(codes))
        return cls(counts, columns, codes[rows, columns].float(), codes.shape[-1])

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, rows: slice) -> "SparseRows":
        """Consecutive rows."""
        start, stop, _ = rows.indices(len(self))
        edges = self._edges()
        entries = slice(int(edges[start]), int(edges[stop]))
        return SparseRows(
            self.counts[start:stop], self.columns[entries], self.values[entries], self.width
        )

    def dense(self) -> Tensor:
        """float64 [N, M]."""
        out = self.values.new_zeros(len(self), self.width, dtype=torch.float64)
        out[self.rows(), self.columns] = self.values.double()
        return out

    def rows(self) -> Tensor:
        """The row of each entry, LongTensor [nnz]."""
        return torch.repeat_interleave(self.counts)

    def csr(self) -> Tensor:
        """A sparse CSR matrix [N, M] in float64."""
        return csr(self._edges(), self.columns, self.values.double(), self.width)

    def _edges(self) -> Tensor:
        return torch.cat((self.counts.new_zeros(1), self.counts.cumsum(0)))


def csr(edges: Tensor, columns: Tensor, values: Tensor, width: int) -> Tensor:
    """A sparse CSR matrix [R, width] whose row r holds the entries edges[r] .. edges[r + 1]."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        # Columns need not ascend within a row for products; checking them would cost a pass.
        return torch.sparse_csr_tensor(
            edges, columns, values, (len(edges) - 1, width), check_invariants=False
        )


class SampledCodes(Metric):
    """Base of the metrics that keep rows of codes and something beside each of them.

    Memory grows with the rows that are given, 12 bytes for each code that is not zero: give it a
    sample of bounded size. The states are gathered from all processes, so that the result is that
    of one process that saw all rows.

    Args:
        latents: M.
        beside: columns of what is kept beside each row.
        dtype: its type.
    """

    full_state_update = False

    def __init__(self, latents: int, beside: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.latents = latents
        self._empty = {
            "beside": torch.empty(0, beside, dtype=dtype),
            "counts": torch.empty(0, dtype=torch.long),
            "columns": torch.empty(0, dtype=torch.long),
            "values": torch.empty(0),
        }
        for name in self._empty:
            self.add_state(name, [], dist_reduce_fx="cat")
        self._start()

    def reset(self) -> None:
        super().reset()
        self._start()

    def _start(self) -> None:
        # A process without rows still takes part in the gathering, with the right shapes.
        for name, empty in self._empty.items():
            setattr(self, name, [empty.to(self.device)])

    def _add(self, beside: Tensor, codes: Tensor) -> None:
        """Keep rows: beside [n, ...] and dense codes [n, M]."""
        if codes.ndim != 2 or codes.shape[1] != self.latents or len(beside) != len(codes):
            raise ValueError(
                f"{len(beside)} rows with codes of shape {tuple(codes.shape)}: expected "
                f"[{len(beside)}, {self.latents}]"
            )
        rows = SparseRows.from_dense(codes)
        self.beside.append(beside.detach().to(self._empty["beside"].dtype))
        self.counts.append(rows.counts)
        self.columns.append(rows.columns)
        self.values.append(rows.values)

    def _rows(self) -> tuple[Tensor, SparseRows]:
        """All that is kept; after a reduction that is of all processes."""
        codes = SparseRows(
            dim_zero_cat(self.counts),
            dim_zero_cat(self.columns),
            dim_zero_cat(self.values),
            self.latents,
        )
        return dim_zero_cat(self.beside), codes

    def _keep(self, beside: Tensor, codes: SparseRows) -> None:
        """Keep these rows and no others."""
        self.beside, self.counts = [beside], [codes.counts]
        self.columns, self.values = [codes.columns], [codes.values]
