"""Localisation against scikit-learn's average precision and a loop over thresholds."""

import math

import pytest
import torch
from sklearn.metrics import average_precision_score

from clipsae.evaluation.floors import RandomDirections, untrained
from clipsae.evaluation.metrics.localization import (
    Localization,
    average_precision,
    best_iou,
    localize,
)
from clipsae.sae import SAE, SparseCodes
from tests.evaluation.made_up import batch_of, options, sizes


def sample(n=60, latents=12, concepts=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    codes = (torch.randn(n, latents, generator=generator) - 0.4).clamp(min=0)
    truth = torch.rand(n, concepts, generator=generator) < 0.3
    codes[:, 0] = 0  # dead
    codes[:, 1] = 1.5  # constant
    codes[:, 2] = codes[:, 2].round()  # ties
    codes[:, 3] -= 0.5  # both signs, no zeros
    codes[:, 4] *= -1
    codes[:, 5] = torch.randn(n, generator=generator).round()  # both signs, ties and zeros
    codes[:, 6] = truth[:, 0].float()  # knows the first concept
    codes[5:, 7] = 0
    truth[:, 3], truth[:, 4] = False, True  # nowhere, everywhere
    return codes, truth


def iou(said, truth):
    return (said & truth).sum().item() / (said | truth).sum().item()


def test_average_precision_and_iou_are_their_definitions():
    codes, truth = sample()
    block = SparseCodes.from_dense(codes).by_latent()
    found = average_precision(block, truth.double())
    best, threshold = best_iou(block, truth.double())
    for m in range(codes.shape[1]):
        for v in range(truth.shape[1]):
            if not truth[:, v].any():
                assert found[m, v].isnan()
                assert best[m, v].isnan()
                continue
            expected = average_precision_score(truth[:, v].numpy(), codes[:, m].numpy())
            assert found[m, v].item() == pytest.approx(expected, rel=1e-9)
            tried = {t: iou(codes[:, m] >= t, truth[:, v]) for t in codes[:, m].tolist() if t > 0}
            assert best[m, v].item() == pytest.approx(max(tried.values(), default=0))
            if best[m, v] > 0:
                assert tried[threshold[m, v].item()] == pytest.approx(best[m, v].item())
            else:
                assert threshold[m, v] == math.inf


def test_chosen_on_one_half_and_scored_on_the_other():
    codes, truth = sample(n=200)
    generator = torch.Generator().manual_seed(0)
    choosing = torch.arange(200) % 2 == 0
    codes[:, 8] = torch.where(choosing, truth[:, 1], truth[:, 1].roll(17)).float()  # fools
    codes[:, 9] = truth[:, 2] * 3.0 + torch.rand(200, generator=generator)  # a threshold is needed
    found = localize(SparseCodes.from_dense(codes), truth, choosing)
    assert found["ap_latent"][:3].tolist() == [6, 8, 9]
    assert found["ap"][[0, 2]].tolist() == [1, 1]
    expected = average_precision_score(truth[~choosing, 1].numpy(), codes[~choosing, 8].numpy())
    assert found["ap"][1].item() == pytest.approx(expected)
    assert expected < 0.5
    t = found["iou_threshold"][2].item()
    assert 1 < t < 4
    mine = iou(codes[~choosing, 9].double() >= t, truth[~choosing, 2])
    assert found["iou"][2].item() == pytest.approx(mine)
    assert mine > 0.9
    assert found["ap"][3].isnan()
    assert found["iou_latent"][3] == -1
    assert found["base"][2].item() == pytest.approx(truth[~choosing, 2].float().mean().item())
    with pytest.raises(ValueError, match=r"expected bool \[200, V\]"):
        localize(SparseCodes.from_dense(codes), truth[:5], choosing)


def test_random_codes_are_at_the_base_rate():
    generator = torch.Generator().manual_seed(0)
    codes = torch.rand(4000, 30, generator=generator)
    truth = torch.rand(4000, 4, generator=generator) < torch.tensor([0.05, 0.1, 0.2, 0.4])
    found = localize(SparseCodes.from_dense(codes), truth, torch.arange(4000) % 2 == 0)
    assert torch.allclose(found["ap"], found["base"], atol=0.04)


def test_the_measurement_merges(merged):
    n, patches = 12, 9
    codes, truth = sample(n * patches)
    codes, truth = codes.view(n, patches, -1), truth.view(n, patches, -1)
    tokens = torch.cat((torch.randn(n, 1, codes.shape[2]), codes), dim=1)
    names = tuple(f"class={v}" for v in range(5))
    o = options(n, 10, grid=(3, 3), concepts=names)
    parts = []
    for part in (slice(0, 7), slice(7, n)):
        parts.append(Localization(sizes(codes.shape[2]), o))
        parts[-1].update(batch_of(tokens[part], part.start, patch_truth=truth[part]))
    found = merged(*parts)
    choosing = parts[0].choosing.repeat_interleave(patches)
    expected = localize(SparseCodes.from_dense(codes.flatten(0, 1)), truth.flatten(0, 1), choosing)
    assert found["localization_ap"].item() == pytest.approx(expected["ap"].nanmean().item())
    assert found["localization_iou"].item() == pytest.approx(expected["iou"].nanmean().item())
    assert found["localization_concepts"] == 4
    assert [row["concept"] for row in parts[0].concepts] == list(names)


def test_one_image_and_empty_masks_are_nan():
    metric = Localization(sizes(3), options(1, 4, grid=(2, 2), concepts=("class=a",)))
    metric.update(batch_of(torch.rand(1, 4, 3), patch_truth=torch.zeros(1, 4, 1).bool()))
    found = metric.compute()
    assert found["localization_ap"].isnan()
    assert found["localization_concepts"] == 0


@torch.no_grad()
def test_floors_and_ceiling(merged):
    """Concepts that are directions of the tokens: probes find them, random directions do not."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(1)
    sae, n, patches = SAE(24, 40, "linear", "topk", k=3).eval(), 60, 9
    x = torch.randn(n, 1 + patches, 24, generator=generator)
    truth = x[:, 1:, :3] > 1
    given = options(n, 1 + patches, grid=(3, 3), concepts=("class=a", "class=b", "class=c"))
    metrics = [Localization(sae, given) for _ in range(2)]
    for metric, part in zip(metrics, (slice(0, 25), slice(25, n)), strict=True):
        codes = sae.encode(x[part])
        metric.update(batch_of(codes, part.start, sae, tokens=x[part], patch_truth=truth[part]))
    floors = {"random": RandomDirections(x[:25]), "untrained": untrained(sae, x[:25])}
    metrics[0].floors = floors
    found = merged(*metrics)
    choosing = metrics[0].choosing.repeat_interleave(patches)
    for of, model in floors.items():
        codes = model.encode_sparse(x[:, 1:].flatten(0, 1))
        expected = localize(codes, truth.flatten(0, 1), choosing)
        for key in ("ap", "iou"):
            mean = expected[key].nanmean().item()
            assert found[f"localization_{key}_{of}"].item() == pytest.approx(mean)
            assert mean < found[f"localization_{key}_probe"].item() - 0.1
    assert found["localization_ap_probe"] > 0.8
    assert found.keys() == {n.key for n in Localization.numbers}
    for number in Localization.numbers:
        assert {number.floor, number.ceiling} <= {"", *found}
    row = metrics[0].concepts[0]
    assert row["ap_probe"] > row["ap_random"]


@torch.no_grad()
def test_dense_floors_are_of_a_part_of_the_patches(monkeypatch, caplog):
    monkeypatch.setattr("clipsae.evaluation.metrics.localization._REFERENCE", 12_000)
    monkeypatch.setattr("clipsae.evaluation.metrics.localization._ROWS", 8)
    sae = SAE(24, 40, "linear", "relu").eval()
    x = torch.randn(20, 9, 24, generator=torch.Generator().manual_seed(0))
    metric = Localization(sae, options(20, 9, grid=(3, 3), concepts=("class=a",)))
    metric.update(batch_of(sae.encode(x), 0, sae, tokens=x, patch_truth=x[..., :1] > 0))
    with caplog.at_level("INFO"):
        found = metric.compute()
    # Half of 1,024 directions on each patch: 24 patches are 12,288 codes.
    assert "random codes are those of 24 of 180 patches" in caplog.text
    assert not found["localization_ap_random"].isnan()
