"""Probing against scikit-learn on the same arrays, and on planted codes."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.feature_selection import f_classif
from sklearn.linear_model import LogisticRegression

from clipsae.data.scenes import ScenesDataset
from clipsae.evaluation.metrics.probing import (
    ATTRIBUTES,
    LinearProbe,
    SparseProbing,
    anova_f,
    halves,
    linear_probe,
    sparse_probing,
)
from clipsae.sae import SAE, SparseCodes
from tests.evaluation.made_up import batch_of, options


def sample(n=120, latents=30, classes=3):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (n,), generator=generator)
    codes = torch.randn(n, latents, generator=generator).clamp(min=0)
    codes[:, 0] = 0  # dead
    codes[:, 1] = 0.1  # constant, and not in binary
    codes[:, 2] = labels.float()  # constant within a class
    codes[:, 3] -= 0.7
    codes[:, 4:10] += 0.4 * torch.nn.functional.one_hot(labels, classes).repeat(1, 2).float()
    codes[1:, 10] = 0
    return codes, labels


def test_f_is_scikit_learns(monkeypatch):
    codes, labels = sample()
    monkeypatch.setattr("clipsae.evaluation.metrics.probing._SUMS", 3 * 7)  # in blocks
    found = anova_f(SparseCodes.from_dense(codes), labels * 5)  # labels need not be 0..C-1
    with np.errstate(all="ignore"):
        expected, _ = f_classif(codes.double().numpy(), labels.numpy())
    assert found[:2].isnan().all()
    assert found[2] == torch.inf
    assert found[3:].numpy() == pytest.approx(expected[3:], rel=1e-9)
    for one in (torch.zeros(120).long(), torch.arange(120)):
        assert anova_f(SparseCodes.from_dense(codes), one).isnan().all()


def test_sparse_probing_is_scikit_learns_regression():
    codes, labels = sample()
    training = halves(labels, torch.randperm(120, generator=torch.Generator().manual_seed(1)))
    found = sparse_probing(SparseCodes.from_dense(codes), labels, training, ks=[1, 4, 20, 31])
    ranked = found["latents"].tolist()
    assert ranked[0] == 2
    assert len(set(ranked)) == 20
    for k, accuracy in found["k_accuracies"].items():
        x = codes[:, ranked[:k]]
        x = (x / x[training].std(0).masked_fill(x[training].std(0) == 0, 1)).numpy()
        probe = LogisticRegression(max_iter=500).fit(x[training], labels[training])
        assert accuracy == pytest.approx(probe.score(x[~training], labels[~training]))
    a, b, c = found["k_accuracies"].values()
    assert found["auc"] == pytest.approx(((a + b) / 2 * 3 + (b + c) / 2 * 16) / 19)
    assert found["k_accuracies"][4] > 0.8  # a latent knows
    with pytest.raises(ValueError, match=r"expected some of 1\.\.M"):
        sparse_probing(SparseCodes.from_dense(codes), labels, training, ks=[50])
    with pytest.raises(ValueError, match="one a row"):
        sparse_probing(SparseCodes.from_dense(codes), labels[1:], training)


def test_latents_are_ranked_on_the_fitted_half_and_scale_does_not_matter():
    codes, labels = sample(n=400, latents=60)
    codes[:, :10] = codes[:, 20:30]  # nothing knows but what follows
    training = torch.arange(400) % 2 == 0
    codes[:, 0] = torch.where(training, labels, labels.roll(11)).float()  # fools
    codes = SparseCodes.from_dense(codes)
    found = sparse_probing(codes, labels, training, ks=[1])
    assert found["latents"].tolist() == [0]
    assert found["auc"] < 0.5
    small = sparse_probing(codes.with_values(codes.values * 1e-4), labels, training, ks=[1, 20])
    large = sparse_probing(codes, labels, training, ks=[1, 20])
    assert small["k_accuracies"] == pytest.approx(large["k_accuracies"], abs=0.011)


def test_what_cannot_be_probed_is_nan():
    codes = SparseCodes.from_dense(sample()[0])
    one, training = torch.zeros(120, dtype=torch.long), torch.arange(120) % 2 == 0
    assert np.isnan(sparse_probing(codes, one, training)["auc"])
    x = torch.randn(1, 3)
    assert np.isnan(linear_probe(x, x, one[:1], torch.ones(1).bool())).all()
    with pytest.raises(ValueError, match=r"\[N, d\] twice"):
        linear_probe(x, x[:, 1:], one[:1], one[:1].bool())


def test_halves_have_as_many_of_each_class():
    labels = torch.tensor([0] * 10 + [1] * 7 + [2] + [3] * 2)[torch.randperm(20)]
    training = halves(labels, torch.randperm(20))
    assert labels[training].bincount().tolist() == [5, 4, 1, 1]
    assert len(halves(labels[:0], torch.randperm(0))) == 0


@pytest.fixture(scope="module")
def pass_():
    """Images with tokens, labels, codes and one attribute that is known."""
    torch.manual_seed(0)
    sae = SAE(6, 20, "linear", "topk", k=3).eval()
    labels = torch.arange(40) % 2
    tokens = torch.randn(40, 4, 6) + 2 * labels[:, None, None]
    known = torch.full((40, len(ATTRIBUTES)), -1)
    known[:30, 1] = torch.arange(30) % 3  # colour, of images with one object
    with torch.no_grad():
        codes = sae.encode(tokens)
        return sae, tokens, labels, codes, sae.decode(codes, sae.input_scale(tokens)), known


def run(metric, given, parts, merged):
    sae, tokens, labels, codes, x_hat, known = given
    metrics = []
    for part in parts:
        metrics.append(metric(sae, options(40, 4)))
        batch = batch_of(
            codes[part],
            part.start,
            sae,
            tokens=tokens[part],
            labels=labels[part],
            reconstruction=x_hat[part],
            object_labels=lambda names, part=part: known[part],
        )
        metrics[-1].update(batch)
    return {name: float(value) for name, value in merged(*metrics).items()}


@torch.no_grad()
def test_the_measurements_read_the_pass(pass_, merged):
    _, _, labels, codes, _, _ = pass_
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    training = halves(labels, order)
    found = run(SparseProbing, pass_, [slice(0, 40)], merged)
    expected = sparse_probing(SparseCodes.from_dense(codes.mean(1)), labels, training)
    assert found["sparse_probing_auc"] == pytest.approx(expected["auc"])
    assert found["sparse_probing_k5"] == pytest.approx(expected["k_accuracies"][5])
    assert 0 <= found["sparse_probing_auc_untrained"] <= 1
    assert found["concept_probing_auc"] == pytest.approx(found["concept_probing_colour"])
    assert "concept_probing_shape" not in found
    again = run(SparseProbing, pass_, [slice(0, 23), slice(23, 40)], merged)
    for name, value in found.items():
        assert name.endswith("_untrained") or again[name] == pytest.approx(value)

    found = run(LinearProbe, pass_, [slice(0, 23), slice(23, 40)], merged)
    assert found["accuracy_original"] == 1  # the classes lie far apart
    gap = found["accuracy_original"] - found["accuracy_reconstructed"]
    assert found["accuracy_gap"] == pytest.approx(gap)
    assert found["concept_accuracy_original"] == found["concept_accuracy_original_colour"] < 0.7
    declared = {n.key for metric in (SparseProbing, LinearProbe) for n in metric.numbers}
    for n in (*SparseProbing.numbers, *LinearProbe.numbers):
        assert {n.floor, n.ceiling} - {""} <= declared


@torch.no_grad()
def test_images_of_one_class_have_no_numbers(pass_, merged):
    sae, tokens, labels, codes, x_hat, known = pass_
    given = (sae, tokens, 0 * labels, codes, x_hat, torch.full_like(known, -1))
    for metric in (SparseProbing, LinearProbe):
        assert run(metric, given, [slice(0, 40)], merged) == {}


def test_the_untrained_twin_of_an_untrained_sae_is_at_the_floor(merged):
    torch.manual_seed(0)  # of the twin
    sae = SAE(6, 20, "linear", "relu")
    labels = torch.arange(40) % 2
    tokens = torch.randn(40, 4, 6) + labels[:, None, None]
    sae.initialize(tokens[:32])
    with torch.no_grad():
        codes = sae.eval().encode(tokens)
    given = (sae, tokens, labels, codes, tokens, torch.full((40, len(ATTRIBUTES)), -1))
    found = run(SparseProbing, given, [slice(0, 40)], merged)
    floors = {k: v for k, v in found.items() if k.endswith("_untrained")}
    assert floors
    for name, value in floors.items():
        assert value == pytest.approx(found[name.removesuffix("_untrained")])


def test_objects_of_scenes():
    scenes = ScenesDataset(size=12, split="test")
    batch = batch_of(torch.zeros(12, 1, 2))
    batch.images = SimpleNamespace(stream=SimpleNamespace(dataset=scenes))
    found, truth = batch.object_labels(ATTRIBUTES), scenes.attributes(range(12))
    for i in range(12):
        one = truth["count"][i] == 1
        assert found[i, 0] == (truth["shape"][i, 0] if one else -1)
        assert found[i, 5] == (truth["background"][i] if one else -1)
    assert (found >= 0).any()
    batch.images.stream.dataset = object()
    assert batch.object_labels(ATTRIBUTES) is None
