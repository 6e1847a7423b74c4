"""Reference images against a plain loop with dense codes and full sorts."""

import math
from collections import Counter

import pytest
import torch

from clipsae.clip import FrozenCLIP
from clipsae.data.scenes import ScenesDataset
from clipsae.evaluation.metrics import monosemanticity
from clipsae.evaluation.metrics.truth import (
    PATCH_ATTRIBUTES,
    concept_names,
    image_concepts,
    patch_concepts,
)
from clipsae.sae import SAE
from clipsae.visualization import References, collect_references
from clipsae.visualization.collector import Collector, precision_gain
from clipsae.visualization.references import BIN_EDGES, BINS, Shown

B, P, M, K = 23, 6, 15, 4
SHOWN = Shown("made up", "test", B, (2, 3), ["a", "b", "c"], [], None)


def made_up(seed: int, ties: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Sparse codes, some negative, latent 0 dead, latent 1 active on one image; labels."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randn(B, P + 1, M, generator=generator)
    codes = codes * (torch.rand(codes.shape, generator=generator) < 0.15)
    if ties:
        codes = codes.sign() * (codes.abs() > 0.5)
    codes[:, :, :2] = 0
    codes[3, 2, 1] = 0.5
    return codes, torch.randint(3, (B,), generator=generator)


@pytest.mark.parametrize("others", [0, 1, 5])
def test_patches_are_the_last_tokens_however_many_come_before(others):
    codes, labels = made_up(0, False)
    patches = codes[:, 1:]
    before = torch.full((B, others, M), 0.0)
    before[..., 2:] = 0.25  # the same on every image: the order stays that of the patches
    collector = Collector(M, P, top=K)
    collector.update(torch.cat([before, patches], dim=1), labels, torch.arange(B))
    found = collector.references(SHOWN)
    assert found.alive.any()
    for m in range(M):
        active = int((patches[..., m] != 0).sum()) + B * others * (m >= 2)
        assert found.token_frequency[m].item() == pytest.approx(active / (B * (P + others)))
        for slot, image in enumerate(found.index[m].tolist()):
            if image < 0:
                continue
            assert found.class_token[m, slot] == (0.25 if others and m >= 2 else 0)
            scale = found.scale[m, slot]
            shown = found.maps[m, slot].float() * scale / 255
            expected = patches[image, :, m].clamp(min=0)
            assert torch.allclose(shown, expected, atol=float(scale) / 255 + 1e-6)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("ties", [True, False])
@pytest.mark.parametrize("sizes", [[23], [1] * 23, [7, 9, 7]])
def test_a_stream_of_batches_gives_what_a_full_sort_gives(seed, ties, sizes):
    codes, labels = made_up(seed, ties)
    indices = torch.arange(B) * 3  # not every image of the dataset
    collector = Collector(M, P, top=K)
    for part in torch.arange(B).split(sizes):
        collector.update(codes[part], labels[part], indices[part])
    found = collector.references(SHOWN)

    means = codes.mean(dim=1)
    for m in range(M):
        order = sorted(range(B), key=lambda i: (-means[i, m].item(), i))
        order = [i for i in order if means[i, m] > 0]
        top = order[:K]
        assert found.index[m].tolist() == [3 * i for i in top] + [-1] * (K - len(top))
        assert found.label[m].tolist() == [int(labels[i]) for i in top] + [-1] * (K - len(top))
        for slot, i in enumerate(top):
            assert found.values[m, slot] == means[i, m]
            assert found.class_token[m, slot] == codes[i, 0, m]
            patches = codes[i, 1:, m]
            scale = max(0.0, patches.max().item())
            assert found.scale[m, slot] == scale
            for p in range(P):
                code, shown = patches[p].item(), int(found.maps[m, slot, p])
                assert (shown > 0) == (code > 0)
                if code > 0:
                    assert abs(shown / 255 * scale - code) <= scale / 255 * (1 + 1e-5)
        assert found.frequency[m] == pytest.approx(len(order) / B)
        assert found.token_frequency[m] == pytest.approx(
            int((codes[:, :, m] != 0).sum()) / (B * (P + 1))
        )
        strength = sum(means[i, m].item() for i in order) / max(1, len(order))
        assert found.strength[m] == pytest.approx(strength, rel=1e-5)
        expected = [0] * BINS
        for code in codes[:, :, m].flatten().tolist():
            if code > 0:
                expected[sum(code >= edge for edge in BIN_EDGES.tolist())] += 1
        assert found.histogram[m].tolist() == expected
        check_labels(found, m, top, means, labels)


def check_labels(found, m, top, means, labels):
    mass = Counter()
    count = Counter()
    for i in top:
        mass[int(labels[i])] += means[i, m].item()
        count[int(labels[i])] += 1
    if not top:
        assert found.top_label[m] == -1
        assert math.isnan(found.entropy[m])
        return
    total = sum(mass.values())
    entropy = -sum(v / total * math.log(v / total) for v in mass.values())
    assert found.entropy[m] == pytest.approx(entropy, abs=1e-6)
    best = max(count, key=lambda label: (count[label], round(mass[label], 5), -label))
    assert found.top_label[m] == best


def test_files_hold_everything(tmp_path):
    codes, labels = made_up(0, ties=False)
    collector = Collector(M, P, top=K)
    collector.update(codes, labels, torch.arange(B))
    found = collector.references(SHOWN)
    found.save(tmp_path)
    again = References.load(tmp_path)
    assert again.shown == SHOWN
    assert torch.equal(again.maps, found.maps)
    assert again.monosemanticity is None


def test_the_gain_of_a_latent_over_chance():
    """Against Wilson's interval written for counts, where all activations are equal."""
    mass, total = torch.tensor([[30.0, 12.0], [2.0, 0.0], [0.0, 0.0]]), torch.tensor([30.0, 2, 0])
    base = torch.tensor([0.1, 0.5])
    precision, gain = precision_gain(mass.double(), total.double(), total.double(), base.double())
    for m, n in enumerate([30, 2]):
        for c in range(2):
            p = float(mass[m, c]) / n
            assert precision[m, c] == pytest.approx(p)
            # The lower end solves (p - q)^2 = z^2 q (1 - q) / n.
            lower = base[c] + gain[m, c] * (1 - base[c])
            assert (p - lower) ** 2 == pytest.approx(float(4 * lower * (1 - lower) / n), abs=1e-6)
            assert lower <= p
    assert gain[0, 0] > gain[1, 0] > 0  # thirty times of thirty says more than twice of two
    assert gain[2].eq(0).all()
    # Twice the activation on every row is no more evidence.
    doubled = precision_gain(2 * mass.double(), 2 * total.double(), 4 * total.double(), base)
    assert torch.allclose(doubled[1], gain)


@pytest.fixture(scope="module")
def world():
    torch.manual_seed(0)
    clip = FrozenCLIP.load("clipsae-tiny", "builtin")
    saes = {
        "topk": SAE(clip.width, 48, activation="topk", k=3).eval(),
        "relu": SAE(clip.width, 32, activation="relu").eval(),
    }
    return clip, saes, ScenesDataset("all", "test", 30)


def collect(world, **options):
    clip, saes, dataset = world
    options = {"encoder": "attributes", "batch_size": 8, **options}
    return collect_references(clip, saes, dataset, name="scenes", split="test", **options)


@torch.no_grad()
def test_several_saes_in_one_pass_with_ground_truth(world):
    clip, saes, dataset = world
    found = collect(world)
    images, _ = dataset.images(range(30))
    tokens = clip.prefix(clip.normalize(images))
    truth = patch_concepts(dataset, torch.arange(30), clip.grid[0]).flatten(0, 1)
    names = concept_names(PATCH_ATTRIBUTES)
    for name, sae in saes.items():
        codes = sae.encode(tokens)
        of = found[name]
        assert of.maps.shape == (sae.latents, 10, clip.tokens - 1)
        scores = monosemanticity(codes.mean(dim=1), _concepts(dataset))
        assert torch.allclose(of.monosemanticity, scores.float(), atol=1e-5, equal_nan=True)
        on_patches = codes[:, 1:].flatten(0, 1).double()
        gains = []
        for m in range(sae.latents):
            c, values = int(of.concept[m]), on_patches[:, m]
            if 0 <= c < len(names):
                precision = values[truth[:, c]].sum() / values.sum()
                assert of.concept_precision[m] == pytest.approx(float(precision), rel=1e-4)
                recall = (values[truth[:, c]] > 0).double().mean()
                assert of.concept_recall[m] == pytest.approx(float(recall))
            one = (truth.T.double() @ values, values.sum(), values.square().sum())
            base = truth.double().mean(dim=0)
            gain = precision_gain(one[0][None], one[1][None], one[2][None], base)[1]
            gains.append(gain[0])
            assert of.concept_score[m] >= gain.max() - 1e-4
            assert c >= len(names) or of.concept_score[m] == pytest.approx(
                max(0.0, float(gain.max())), abs=1e-4
            )
        assert len(of.leading) == len(of.leading_precision) == len(of.shown.concepts)
        for c in range(len(names)):
            order = sorted((-float(gain[c]), m) for m, gain in enumerate(gains))
            expected = [m for gain, m in order[:8] if -gain >= 1e-6]
            leading = [m for m in of.leading[c].tolist() if m >= 0]
            assert leading == expected
            for m, found_precision in zip(leading, of.leading_precision[c], strict=False):
                values = on_patches[:, m]
                precision = values[truth[:, c]].sum() / values.sum()
                assert found_precision == pytest.approx(float(precision), rel=1e-4)
        assert of.shown.concepts[: len(names)] == names
        assert (of.concept >= -1).all()
        assert of.concept.max() < len(of.shown.concepts)


def _concepts(dataset):
    return image_concepts(dataset, torch.arange(len(dataset))).float()


def test_an_interrupted_pass_goes_on_to_the_same_result(world, tmp_path):
    whole = collect(world)
    scratch = {name: tmp_path / name for name in world[1]}
    for folder in scratch.values():
        folder.mkdir()

    class Cut(RuntimeError):
        pass

    def stop(done: int, total: int) -> None:
        if done >= 24:
            raise Cut

    with pytest.raises(Cut):
        collect(world, scratch=scratch, save_every_seconds=0, progress=stop)
    seen = []
    again = collect(world, scratch=scratch, progress=lambda done, total: seen.append(done))
    assert seen == [24, 30]  # the batches of the first 16 images are not read again
    for name, of in whole.items():
        for field in ("values", "index", "maps", "histogram", "frequency", "concept"):
            assert torch.equal(getattr(of, field), getattr(again[name], field)), field
        assert torch.equal(
            of.monosemanticity.nan_to_num(-9), again[name].monosemanticity.nan_to_num(-9)
        )


def test_what_cannot_be_is_refused(world):
    with pytest.raises(ValueError, match="top=0"):
        collect(world, top=0)
