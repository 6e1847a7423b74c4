"""Soft-WPMI against its formula, one number at a time in float64."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from clipsae.naming import dissect
from clipsae.naming.dissect import soft_wpmi


def oracle(examples, index, words, a, weight):
    """[M][W] scores; None for a latent without examples."""
    p = []
    for example in examples.double():
        e = [math.exp(a * float(example @ word)) for word in words.double()]
        p.append([x / sum(e) for x in e])
    k, likelihood = index.shape[1], []
    for of_latent in index.tolist():
        if all(i < 0 for i in of_latent):
            likelihood.append(None)
            continue
        row = []
        for w in range(len(words)):
            row.append(
                sum(
                    math.log(1 + (0.998 - j / k * 0.028) * (p[i][w] - 1) + 1e-7)
                    for j, i in enumerate(of_latent)
                    if i >= 0
                )
            )
        likelihood.append(row)
    there = [row for row in likelihood if row is not None]
    common = [
        math.log(sum(math.exp(row[w]) for row in there) / len(there)) for w in range(len(words))
    ]
    return [
        None if row is None else [x - weight * c for x, c in zip(row, common, strict=True)]
        for row in likelihood
    ]


@pytest.mark.parametrize("weight", [1.0, 0.0, 0.6])
def test_soft_wpmi_is_its_formula_in_blocks(monkeypatch, weight):
    generator = torch.Generator().manual_seed(1)
    examples = normalize(torch.randn(9, 6, generator=generator), dim=1)
    words = normalize(torch.randn(7, 6, generator=generator), dim=1)
    index = torch.randint(9, (11, 4), generator=generator)
    index[3, 2:], index[5], index[10, 1:] = -1, -1, -1
    monkeypatch.setattr(dissect, "_BLOCK_ELEMENTS", 3 * 7)  # three latents, and two in the end
    monkeypatch.setattr(dissect, "_FACTORS", 3)
    done = []
    best, scores = soft_wpmi(
        examples, index, words, 7, weight=weight, progress=lambda *at: done.append(at)
    )
    for latent, row in enumerate(oracle(examples, index, words, 10.0, weight)):
        if row is None:
            assert best[latent].tolist() == [-1] * 7
            assert scores[latent].isnan().all()
            continue
        order = sorted(range(7), key=lambda w: -row[w])
        assert best[latent].tolist() == order
        expected = torch.tensor([row[w] for w in order])
        torch.testing.assert_close(scores[latent], expected, atol=2e-5, rtol=1e-5)
    assert done[-1] == (22, 22)
    few = soft_wpmi(examples, index, words, 2, weight=weight)
    assert torch.equal(few[0], best[:, :2])


def test_a_word_that_fits_all_latents_is_no_name():
    """Word 0 is nearest to every example, and each latent's own word comes next."""
    words = torch.eye(5)
    examples = normalize(torch.eye(5)[1:] + 1.2 * words[0], dim=1)
    index = torch.arange(4)[:, None].expand(4, 10)
    assert soft_wpmi(examples, index, words, 1, weight=0)[0].flatten().tolist() == [0, 0, 0, 0]
    assert soft_wpmi(examples, index, words, 1)[0].flatten().tolist() == [1, 2, 3, 4]


def test_a_dead_dictionary_has_no_words():
    best, scores = soft_wpmi(torch.zeros(0, 5), torch.full((3, 2), -1), torch.eye(5), 2)
    assert best.tolist() == [[-1, -1]] * 3
    assert scores.isnan().all()


def test_too_many_words_are_refused():
    with pytest.raises(ValueError, match="n=6: expected 1 to 5"):
        soft_wpmi(torch.eye(5), torch.zeros(1, 1, dtype=torch.long), torch.eye(5), 6)
