"""Concept recovery against loops over pairs of rows and over thresholds."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu

from clipsae.evaluation.metrics.auroc import auroc, best_f1
from clipsae.evaluation.metrics.recovery import ConceptRecovery, concept_recovery
from clipsae.evaluation.truth import IMAGE_ATTRIBUTES, PATCH_ATTRIBUTES, concept_names
from clipsae.sae import SparseCodes
from tests.evaluation.made_up import batch_of, options, sizes


def plain_auroc(codes, truth):
    yes = [c for c, t in zip(codes, truth, strict=True) if t]
    no = [c for c, t in zip(codes, truth, strict=True) if not t]
    if not yes or not no:
        return math.nan
    wins = sum((a > b) + 0.5 * (a == b) for a in yes for b in no)
    return wins / (len(yes) * len(no))


def plain_f1(codes, truth):
    if not any(truth):
        return math.nan
    best = 0.0
    for t in {0.0, *(c for c in codes if c > 0)}:
        said = [c > t for c in codes]
        true = sum(s and t for s, t in zip(said, truth, strict=True))
        best = max(best, 2 * true / (sum(said) + sum(truth)))
    return best


def table(measure, codes, truth):
    return [[measure(c, t) for t in truth.T.tolist()] for c in codes.double().T.tolist()]


def same(found, expected):
    assert found.shape == (len(expected), len(expected[0]))
    for a, b in zip(found.tolist(), expected, strict=True):
        assert a == pytest.approx(b, rel=1e-12, nan_ok=True)


def sample(n=40, latents=15, concepts=6):
    generator = torch.Generator().manual_seed(0)
    codes = (torch.randn(n, latents, generator=generator) - 0.4).clamp(min=0)
    truth = torch.rand(n, concepts, generator=generator) < 0.3
    codes[:, 0] = 0  # dead
    codes[:, 1] = 1.5  # constant
    codes[:, 2] = -(codes[:, 2] > 0).float()  # negative, all ties
    codes[:, 3] = codes[:, 3].round()  # ties
    codes[:, 4] -= 0.5  # both signs, no zeros
    codes[:, 5] = truth[:, 0].float()  # knows the first concept
    codes[:, 6] = truth[:, 0].float() * 0.2  # so does this
    codes[:, 7] = (truth[:, 0] | truth[:, 1]).float()
    codes[:, 8] = 0
    codes[4, 8] = 2.0  # active once
    truth[:, 4], truth[:, 5] = False, True  # nowhere, everywhere
    return codes, truth


def entries(codes):
    return SparseCodes.from_dense(codes.float()).by_latent()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_auroc_and_f1_are_their_definitions(dtype):
    codes, truth = sample()
    codes = codes.to(dtype)
    same(auroc(entries(codes), truth.double()), table(plain_auroc, codes, truth))
    same(best_f1(entries(codes), truth.double()), table(plain_f1, codes, truth))


def test_auroc_is_the_rank_test_of_scipy():
    codes, truth = sample()
    found = auroc(entries(codes), truth.double())
    for m in range(codes.shape[1]):
        yes, no = codes[truth[:, 2], m], codes[~truth[:, 2], m]
        u = mannwhitneyu(yes.numpy(), no.numpy()).statistic
        assert found[m, 2].item() == pytest.approx(u / (len(yes) * len(no)), rel=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0]), st.booleans()),
        min_size=1,
        max_size=12,
    )
)
def test_few_rows_with_many_ties(rows):
    codes = torch.tensor([[c] for c, _ in rows])
    truth = torch.tensor([[t] for _, t in rows])
    same(auroc(entries(codes), truth.double()), table(plain_auroc, codes, truth))
    same(best_f1(entries(codes), truth.double()), table(plain_f1, codes, truth))


def test_best_latents_counts_and_purity():
    codes, truth = sample()
    found = concept_recovery(codes, truth, threshold=0.95)
    scores = torch.tensor(table(plain_auroc, codes, truth))[:, :4]
    f1 = torch.tensor(table(plain_f1, codes, truth))[:, :4]
    assert torch.allclose(found["auroc"][:4].float(), scores.amax(0))
    assert found["auroc_latent"].tolist() == [*scores.argmax(0).tolist(), -1, -1]
    assert found["f1_latent"].tolist() == [*f1.argmax(0).tolist(), -1, -1]
    assert found["auroc"][4:].isnan().all()
    assert found["f1"][4:].isnan().all()
    good = scores >= 0.95
    assert found["latents"].tolist() == [*good.sum(0).tolist(), 0, 0]
    assert found["latents"][0] >= 2  # split between latents 5 and 6
    assert found["concepts"].tolist() == good.sum(1).tolist()
    assert found["concepts_found"].item() == pytest.approx(good.any(0).float().mean().item())
    assert found["splitting"].item() == pytest.approx(
        (good.sum(0)[good.any(0)].float().mean()).item()
    )
    assert found["merging"].item() == pytest.approx(
        ((good.sum(1) > 1).sum() / (good.sum(1) > 0).sum()).item()
    )
    for m in range(codes.shape[1]):
        positive = codes[:, m].double().clamp(min=0)
        if positive.sum() == 0:
            assert found["purity"][m].isnan()
            assert found["purest"][m] == -1
            continue
        shares = (positive[:, None] * truth).sum(0) / positive.sum()
        assert found["purity"][m].item() == pytest.approx(shares.max().item())
    assert found["live"] == (codes.clamp(min=0).sum(0) > 0).sum()


def test_a_latent_that_merges_two_concepts():
    truth = torch.zeros(30, 2, dtype=torch.bool)
    truth[:6, 0] = True
    truth[:7, 1] = True
    codes = torch.stack((truth[:, 0].float(), torch.zeros(30)), dim=1)
    found = concept_recovery(codes, truth)
    assert found["concepts"].tolist() == [2, 0]
    assert found["merging"] == 1
    assert found["splitting"] == 1
    assert found["purity"][0] == 1


def test_all_zero_codes():
    _, truth = sample()
    found = concept_recovery(torch.zeros(40, 3), truth)
    assert found["auroc"][:4].tolist() == [0.5] * 4
    assert found["concepts_found"] == 0
    assert found["mean_f1"] == 0
    assert found["live"] == 0
    assert found["splitting"].isnan()
    assert found["merging"].isnan()
    assert found["mean_purity"].isnan()


def test_blocks_of_latents_change_nothing(monkeypatch):
    codes, truth = sample()
    whole = concept_recovery(codes, truth)
    monkeypatch.setattr("clipsae.evaluation.metrics.recovery._BLOCK_ELEMENTS", 6 * 50)
    done = []
    for name, value in concept_recovery(codes, truth, progress=lambda *at: done.append(at)).items():
        assert torch.equal(value.nan_to_num(-9), whole[name].nan_to_num(-9)), name
    assert done == sorted(done)
    assert len(done) > 3
    assert done[-1] == (15, 15)


def test_levels_samples_and_processes(merged):
    """Patches and images of those images that are drawn, in whatever order they come."""
    g = torch.Generator().manual_seed(1)
    patches, images = len(concept_names(PATCH_ATTRIBUTES)), len(concept_names(IMAGE_ATTRIBUTES))
    codes = torch.relu(torch.randn(20, 5, 15, generator=g))
    of_patches = torch.rand(20, 4, patches, generator=g) < 0.3
    of_images = torch.rand(20, images, generator=g) < 0.3
    metrics = [ConceptRecovery(sizes(15), options(20, sample_images=9)) for _ in range(3)]
    for metric, part in ((metrics[2], slice(0, 7)), (metrics[0], slice(7, 20))):
        known = {"patch_truth": of_patches[part], "image_truth": of_images[part]}
        metric.update(batch_of(codes[part], part.start, **known))
    drawn = sorted(random.Random(0).sample(range(20), 9))
    expected = (
        (
            "patch",
            concept_recovery(codes[drawn, 1:].flatten(0, 1), of_patches[drawn].flatten(0, 1)),
        ),
        ("image", concept_recovery(codes[drawn].mean(dim=1), of_images[drawn])),
    )
    found = merged(*metrics)
    for level, whole in expected:
        assert found[f"{level}_auroc"].item() == pytest.approx(whole["mean_auroc"].item())
        assert found[f"{level}_concepts_found"] == whole["concepts_found"]
        rows = [row for row in metrics[0].concepts if row["level"] == level]
        assert [row["auroc_latent"] for row in rows] == whole["auroc_latent"].tolist()


def test_invalid_input_is_refused():
    codes, truth = sample()
    with pytest.raises(ValueError, match=r"expected bool \[40, V\]"):
        concept_recovery(codes, truth.float())
    with pytest.raises(ValueError, match=r"expected bool \[40, V\]"):
        concept_recovery(codes, truth[:7])
    with pytest.raises(ValueError, match=r"above 0\.5"):
        concept_recovery(codes, truth, threshold=0.5)
