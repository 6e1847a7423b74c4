"""Worst groups, latents of a confounder, projections: against loops and closed forms."""

import pytest
import torch

from clipsae.clip import FrozenCLIP
from clipsae.data.scenes import ScenesDataset
from clipsae.evaluation.spurious import (
    Probe,
    confounder_auroc,
    confounder_directions,
    embeddings_without,
    group_accuracy,
    projected,
)
from clipsae.sae import SAE, SparseCodes


def test_the_worst_group_has_wilsons_interval():
    labels = torch.tensor([0] * 6 + [1] * 4)
    groups = torch.tensor([0, 0, 0, 1, 1, 1, 3, 3, 3, 3])  # the third is empty
    said = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1, 0])
    found = group_accuracy(said, labels, groups)
    assert (found.average, found.group) == (pytest.approx(0.7), 1)
    assert found.worst == pytest.approx(1 / 3)
    for bound in (found.low, found.high):  # where the score test's statistic is 1.96
        assert abs(1 / 3 - bound) / (bound * (1 - bound) / 3) ** 0.5 == pytest.approx(1.96)
    assert found.low < found.worst < found.high


def test_latents_are_scored_within_classes():
    """A latent of the class says nothing of the confounder, though the two are tied."""
    generator = torch.Generator().manual_seed(0)
    label = torch.arange(400) % 2
    value = torch.where(torch.rand(400, generator=generator) < 0.9, label, 1 - label)
    noise = torch.rand(400, 3, generator=generator)
    codes = torch.stack((label * 1.0, 2 * value + noise[:, 0], noise[:, 1]), dim=1)
    codes = codes * (noise[:, 2:] < 0.9)
    found = confounder_auroc(SparseCodes.from_dense(codes), 2 * label + value, 2)
    for m in range(3):
        expected = []
        for c in (0, 1):
            with_it = codes[(label == c) & (value == 1), m].double()
            without = codes[(label == c) & (value == 0), m].double()
            wins = (with_it[:, None] > without).double() + 0.5 * (with_it[:, None] == without)
            expected.append(wins.mean().item())
        assert found[m, 1].item() == pytest.approx(sum(expected) / 2)
        assert found[m, 0].item() == pytest.approx(1 - sum(expected) / 2)
    assert found[1, 1] > 0.8 > 0.6 > found[0].max()
    with pytest.raises(ValueError, match="choose latents by name"):
        confounder_auroc(SparseCodes.from_dense(codes), 3 * label, 2)


def test_a_projection_takes_out_the_confounder_and_leaves_the_class():
    torch.manual_seed(0)
    label, value = torch.arange(600) % 2, torch.arange(600) // 2 % 3
    axes = torch.linalg.qr(torch.randn(20, 20)).Q
    places = torch.randn(3, 2) @ axes[:2]  # in a plane
    x = label[:, None] * axes[5] + places[value] + 0.01 * torch.randn(600, 20)
    directions = confounder_directions(x, 3 * label + value, 3)
    assert torch.allclose(directions @ directions.T, torch.eye(2), atol=1e-5)
    y = projected(x, directions)
    means = torch.stack([y[(label == 0) & (value == a)].mean(dim=0) for a in range(3)])
    assert (means - means[0]).norm(dim=1).max() < 0.01
    gap = y[label == 1].mean(dim=0) - y[label == 0].mean(dim=0)
    assert gap @ axes[5] == pytest.approx(1, abs=0.02)
    with pytest.raises(ValueError, match="every value of the confounder"):
        confounder_directions(x, 3 * label, 3)


def test_groups_of_equal_weight_do_not_follow_the_tie():
    torch.manual_seed(0)
    label = torch.arange(2000) % 2
    value = torch.where(torch.rand(2000) < 0.95, label, 1 - label)
    x = torch.stack((label + torch.randn(2000) * 0.7, value + torch.randn(2000) * 0.2), dim=1)
    test = torch.stack((label + torch.randn(2000) * 0.7, torch.rand(2000).round()), dim=1)
    groups = 2 * label + test[:, 1].long()
    plain = group_accuracy(Probe(x, label).predict(test), label, groups)
    balanced = Probe(x, label, 2 * label + value).predict(test)
    assert plain.worst < 0.4
    assert group_accuracy(balanced, label, groups).worst > 0.65


@torch.no_grad()
def test_embeddings_are_those_of_changed_streams():
    torch.manual_seed(0)
    clip = FrozenCLIP.load("clipsae-tiny", "builtin")
    sae = SAE(clip.width, 40, "linear", "topk", k=6, normalize="unit").eval()
    dataset = ScenesDataset("spurious", "test", 8)
    sets = [[], [4, 9, 30], [17]]
    found, read = embeddings_without(clip, sae, dataset, sets, [1, 2, 7], batch_size=2)
    assert read.tolist() == [1, 2, 7]
    for i, index in enumerate(read.tolist()):
        stream = clip.prefix(clip.normalize(dataset[index][0][None]))
        codes, scale = sae.encode(stream), sae.input_scale(stream)
        for v, one in enumerate(sets):
            part = codes[..., one] @ sae.decoder_rows()[one] * scale
            expected = torch.nn.functional.normalize(clip.tail(stream - part), dim=-1)
            assert torch.allclose(found[v, i], expected[0], atol=1e-5)
