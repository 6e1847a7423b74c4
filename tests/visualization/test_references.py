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
from clipsae.visualization.collect import Collector, phi_coefficient
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


def test_phi_is_the_correlation_of_two_columns():
    generator = torch.Generator().manual_seed(0)
    active = torch.rand(200, 3, generator=generator) < 0.3
    truth = torch.rand(200, 2, generator=generator) < 0.6
    truth[:, 1] |= active[:, 0]
    hits = active.double().T @ truth.double()
    found = phi_coefficient(hits, active.sum(0), truth.sum(0), torch.tensor(200))
    both = torch.corrcoef(torch.cat((active, truth), dim=1).T.double())
    assert torch.allclose(found, both[:3, 3:])
    assert phi_coefficient(hits * 0, active.sum(0) * 0, truth.sum(0), torch.tensor(200)).eq(0).all()


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
        active = (codes[:, 1:] > 0).flatten(0, 1)
        for m in range(sae.latents):
            c = int(of.concept[m])
            if 0 <= c < len(names):
                pair = torch.stack((active[:, m], truth[:, c])).double()
                assert of.concept_score[m] == pytest.approx(
                    float(torch.corrcoef(pair)[0, 1]), abs=1e-5
                )
                hits = (active[:, m] & truth[:, c]).sum()
                assert of.concept_precision[m] == pytest.approx(float(hits / active[:, m].sum()))
                assert of.concept_recall[m] == pytest.approx(float(hits / truth[:, c].sum()))
            every = torch.cat((active[:, m : m + 1], truth), dim=1).T.double()
            assert of.concept_score[m] >= torch.corrcoef(every)[0, 1:].nan_to_num().max() - 1e-5
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
