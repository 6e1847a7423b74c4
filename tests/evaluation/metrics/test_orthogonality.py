"""Decoder orthogonality against the double loop over pairs of rows."""

import pytest
import torch

from clipsae.evaluation.metrics import decoder_orthogonality


def plain(rows):
    rows = [row / row.norm() for row in rows.double() if row.norm() > 0]
    squares = [
        (a @ b).item() ** 2 for i, a in enumerate(rows) for j, b in enumerate(rows) if i != j
    ]
    return sum(squares) / len(squares)


def dictionary(latents=23, d=7):
    rows = torch.randn(latents, d, generator=torch.Generator().manual_seed(0))
    return rows * torch.linspace(0.01, 50, latents)[:, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_its_definition(dtype):
    rows = dictionary().to(dtype)
    rows[3] = 0  # no direction
    assert decoder_orthogonality(rows).item() == pytest.approx(plain(rows), rel=1e-10)


def test_known_values():
    assert decoder_orthogonality(2 * torch.eye(5)).item() == pytest.approx(0, abs=1e-15)
    assert decoder_orthogonality(torch.ones(4, 3)).item() == pytest.approx(1)
    assert decoder_orthogonality(torch.ones(1, 3)).isnan()
    assert decoder_orthogonality(torch.zeros(4, 3)).isnan()


def test_random_rows_in_768_dimensions_are_where_the_table_is():
    rows = torch.randn(4096, 768, generator=torch.Generator().manual_seed(0))
    assert decoder_orthogonality(rows).item() == pytest.approx(1 / 768, rel=0.01)
