"""How the number of active latents follows content, against scipy, residuals and planted cases."""

import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import rankdata, spearmanr

from clipsae.data.scenes import ScenesDataset
from clipsae.evaluation.metrics.support import NUMBERS, Support, rank_correlation, support_values
from clipsae.evaluation.passes import _jpeg_bytes
from clipsae.evaluation.truth import image_concepts, patch_concepts, patch_coverage
from tests.evaluation.made_up import batch_of, options, sizes


def draw(n=60, seed=0):
    return torch.randint(0, 6, (3, n), generator=torch.Generator().manual_seed(seed))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), min_size=3, max_size=12))
def test_correlations_are_scipys_with_ties(pairs):
    active, content = torch.tensor(pairs).double().T
    found = rank_correlation(active, content)
    if len(set(content.tolist())) == 1:
        assert math.isnan(found)
    elif len(set(active.tolist())) == 1:
        assert found == 0
    else:
        assert found == pytest.approx(spearmanr(active, content).statistic, abs=1e-12)


def test_partial_correlation_is_that_of_the_residuals():
    active, content, fixed = draw().double()
    content = content + fixed
    a, c, g = (rankdata(x) for x in (active, content, fixed))
    design = np.stack((np.ones_like(g), g), axis=1)
    left = [x - design @ np.linalg.lstsq(design, x, rcond=None)[0] for x in (a, c)]
    expected = np.corrcoef(*left)[0, 1]
    assert rank_correlation(active, content, fixed) == pytest.approx(expected, abs=1e-12)
    # What the fixed column explains is gone: of itself nothing is left.
    assert math.isnan(rank_correlation(active, fixed, 2 * fixed + 1))
    assert rank_correlation(active, content, torch.ones(60)) == rank_correlation(active, content)


def test_constant_and_few_rows():
    assert rank_correlation(torch.full((5,), 16.0), torch.arange(5)) == 0  # TopK follows nothing
    assert math.isnan(rank_correlation(torch.arange(5), torch.ones(5)))  # nothing to follow
    assert math.isnan(rank_correlation(torch.arange(2), torch.arange(2)))
    with pytest.raises(ValueError, match="60 rows and content of 59: expected as many"):
        rank_correlation(draw()[0], draw()[1][:59])


def scenes(n=40):
    dataset = ScenesDataset(split="test", size=n)
    at = torch.arange(n)
    truth = {
        "image_truth": image_concepts(dataset, at),
        "patch_truth": patch_concepts(dataset, at, 8),
        "coverage": patch_coverage(dataset, at, 8),
    }
    return dataset, at, truth


def codes_of(active, latents=8):
    """Codes [B, P, M] with that many latents active, half of them negative."""
    sign = torch.tensor([1.0, -1.0]).repeat(latents // 2)
    return (torch.arange(latents) < active[..., None]).float() * sign


def measured(dataset, at, truth, active, parts=((0, 40),), size=2000, has_truth=True):
    metric = Support(sizes(8), options(40, 64, sample_images=size))
    jpeg = torch.tensor([_jpeg_bytes(dataset[i][0]) for i in at])
    for first, last in parts:
        known = {name: values[first:last] for name, values in truth.items()}
        known |= {"jpeg_bytes": jpeg[first:last], "has_truth": has_truth}
        metric.update(
            batch_of(codes_of(active[first:last]), first, active=active[first:last], **known)
        )
    return metric


def test_planted_supports_on_scenes():
    """Codes that follow one content exactly have correlation 1, constant ones 0."""
    dataset, at, truth = scenes()
    slots = dataset.patch_truth(at)["object"]
    objects = dataset.attributes(at)["count"]
    concepts = 1 * (truth["coverage"] < 1) + 4 * (truth["coverage"] > 0)
    found = {k: float(v) for k, v in measured(dataset, at, truth, concepts).compute().items()}
    assert found.keys() == {number.key for number in NUMBERS}
    assert found["support_patch_concepts"] == pytest.approx(1)
    assert found["support_patch_object"] > 0.9
    assert found["support_patch_boundary"] == pytest.approx(1)
    assert found["support_patch_pattern"] == 0  # fully covered patches all have four
    assert found["support_background_objects"] == 0
    assert found["support_l0_background"] == 1
    assert 4 <= found["support_l0_object"] <= 5
    by_image = objects[:, None].expand(-1, 64)
    found = {k: float(v) for k, v in measured(dataset, at, truth, by_image).compute().items()}
    for key in ("objects", "objects_given_area", "background_objects"):
        assert found[f"support_{key}"] == pytest.approx(1)
    assert abs(found["support_patch_boundary"]) < 0.3
    values = [
        len(
            {
                (name, v)
                for name in ("shape", "colour", "pattern", "size", "background")
                for v in dataset.attributes(at)[name].reshape(40, -1)[i].tolist()
                if v >= 0
            }
        )
        for i in range(40)
    ]
    expected = spearmanr(objects, values).statistic
    assert found["support_values"] == pytest.approx(expected)
    constant = measured(dataset, at, truth, torch.full((40, 64), 3)).compute()
    assert constant["support_spread"] == 0
    for number in NUMBERS[3:]:
        assert constant[number.key] == 0, number.key
    patterned = (slots >= 0) & (dataset.patch_truth(at)["pattern"] > 0)
    found = measured(dataset, at, truth, 1 + patterned.long()).compute()
    assert found["support_patch_pattern"] == pytest.approx(1)


def test_batches_processes_samples_and_missing_truth(merged):
    dataset, at, truth = scenes()
    active = torch.randint(0, 8, (40, 64), generator=torch.Generator().manual_seed(0))
    whole = measured(dataset, at, truth, active, size=25).compute()
    parts = [
        measured(dataset, at, truth, active, ((20, 40),), size=25),
        measured(dataset, at, truth, active, ((7, 20), (0, 7)), size=25),
        measured(dataset, at, truth, active, (), size=25),
    ]
    found = merged(*parts)
    assert found == whole
    drawn = sorted(parts[0].draw.drawn.tolist())
    counts = dataset.attributes(at)["count"][drawn]
    expected = spearmanr(active[drawn].double().mean(dim=1), counts).statistic
    assert float(whole["support_objects"]) == pytest.approx(expected)
    photos = measured(dataset, at, {}, active, has_truth=False).compute()
    assert photos.keys() == {"support_spread", "support_jpeg"}
    sizes_of = []
    for i in range(40):
        file = io.BytesIO()
        Image.fromarray(dataset[i][0].permute(1, 2, 0).numpy()).save(file, "JPEG", quality=75)
        sizes_of.append(len(file.getvalue()))
    expected = spearmanr(active.double().mean(dim=1), sizes_of).statistic
    assert float(photos["support_jpeg"]) == pytest.approx(expected)
    assert float(photos["support_spread"]) == pytest.approx(
        float(active.double().std(correction=0) / active.double().mean())
    )


def test_scenes_of_one_object_have_no_number_to_follow():
    dataset = ScenesDataset("shape", split="test", size=10)
    coverage = patch_coverage(dataset, torch.arange(10), 8)
    ones, shown = torch.ones(10), coverage > 0.25
    found = support_values(draw(640)[0].view(10, 64), ones, ones, ones, coverage, shown, shown)
    assert all(math.isnan(found[key]) for key in ("jpeg", "objects", "values", "patch_pattern"))
    assert not math.isnan(found["patch_object"])
