"""Reference images against a plain loop with dense codes and full sorts."""

import math
from collections import Counter

import pytest
import torch

from clipsae.clip import FrozenCLIP
from clipsae.data.scenes import ScenesDataset
from clipsae.evaluation.metrics.monosemanticity import monosemanticity
from clipsae.evaluation.truth import (
    IMAGE_ATTRIBUTES,
    PATCH_ATTRIBUTES,
    bits_over_chance,
    concept_names,
    image_concepts,
    patch_concepts,
)
from clipsae.sae import SAE
from clipsae.visualization import References, collect_references
from clipsae.visualization.collector import NAMED, Collector, draw
from clipsae.visualization.references import BIN_EDGES, BINS, Source
from tests.evaluation.made_up import batch_of, sizes

B, P, M, K = 23, 6, 15, 4
SOURCE = Source("made up", "test", B, (2, 3), ["a", "b", "c"], [], None)


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
    collector = Collector(sizes(M), P, top=K)
    collector.update(batch_of(torch.cat([before, patches], dim=1), labels=labels))
    found = collector.references(SOURCE)
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
@pytest.mark.parametrize("parts", [[23], [1] * 23, [7, 9, 7]])
def test_a_stream_of_batches_gives_what_a_full_sort_gives(seed, ties, parts):
    codes, labels = made_up(seed, ties)
    indices = torch.arange(B) * 3  # not every image of the dataset
    collector = Collector(sizes(M), P, top=K, sample=3)
    for part in torch.arange(B).split(parts):
        collector.update(batch_of(codes[part], labels=labels[part], indices=indices[part]))
    found = collector.references(SOURCE)

    drawn = draw(indices, codes.mean(dim=1) > 0)
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
        some = sorted(order, key=lambda i: -int(drawn[i, m]))[:3]
        some = [i for i in order if i in some]
        assert found.sample_index[m].tolist() == [3 * i for i in some] + [-1] * (3 - len(some))
        assert found.sample_values[m, : len(some)].tolist() == means[some, m].tolist()
        for slot, i in enumerate(some):
            assert ((found.sample_maps[m, slot] > 0) == (codes[i, 1:, m] > 0)).all()
            assert found.sample_label[m, slot] == labels[i]
            assert found.sample_class_token[m, slot] == codes[i, 0, m]
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


def test_every_image_is_drawn_as_often_as_others():
    """SplitMix64 of one number in plain integers; over 4,000 latents each of 20 active images is
    among the first 5 a quarter of the time."""
    active = torch.ones(20, 4000, dtype=torch.bool)
    active[:, 7] = False
    drawn = draw(torch.arange(20) * 11, active)
    x, mask = 33 * 4000 + 5 + 1, 2**64 - 1  # of the fourth image and latent 5
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        x = (x ^ (x >> shift)) * factor & mask
    assert int(drawn[3, 5]) == (x & (2**62 - 1)) + 1
    assert drawn[:, 7].eq(0).all()
    first = drawn.argsort(dim=0, descending=True)[:5].flatten()
    share = torch.bincount(first, minlength=20) / 4000
    assert share.sub(0.25).abs().max() < 5 * (0.25 * 0.75 / 4000) ** 0.5


def test_files_hold_everything(tmp_path):
    codes, labels = made_up(0, ties=False)
    collector = Collector(sizes(M), P, top=K)
    collector.update(batch_of(codes, labels=labels))
    found = collector.references(SOURCE)
    found.save(tmp_path)
    again = References.load(tmp_path)
    assert again.source == SOURCE
    assert torch.equal(again.sample_maps, found.sample_maps)
    assert again.monosemanticity is None


def bits(p: float, n: float, base: float) -> float:
    """The divergence of the lower end q of Wilson's interval from the base, in bits: where q solves
    (p - q)^2 = z^2 q (1 - q) / n."""
    a, b, c = 1 + 4 / n, -(2 * p + 4 / n), p * p
    q = (-b - math.sqrt(max(0.0, b * b - 4 * a * c))) / (2 * a)
    if q <= base or not 0 < base < 1:
        return 0.0
    other = (1 - q) * math.log2((1 - q) / (1 - base)) if q < 1 else 0.0
    return q * math.log2(q / base) + other


def test_bits_over_chance():
    mass = torch.tensor([[30.0, 12.0], [2.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    total = torch.tensor([30.0, 2, 0], dtype=torch.float64)[:, None].expand(3, 2)
    base = torch.tensor([0.1, 0.2], dtype=torch.float64)
    precision, found = bits_over_chance(mass, total, total, base)
    for m, n in enumerate([30, 2]):
        for c in range(2):
            p = float(mass[m, c]) / n
            assert precision[m, c] == pytest.approx(p)
            assert found[m, c] == pytest.approx(bits(p, n, float(base[c])), abs=1e-9)
    assert found[0, 0] > found[1, 0] > 0  # thirty times of thirty says more than twice of two
    assert found[0, 1] > 0
    assert found[2].eq(0).all()
    # Twice the activation on every row is no more evidence.
    doubled = bits_over_chance(2 * mass, 2 * total, 4 * total, base)
    assert torch.allclose(doubled[1], found)
    everywhere = bits_over_chance(mass, total, total, torch.tensor([0.0, 1.0]))[1]
    assert everywhere.eq(0).all()  # and no NaN


NAMES = ["pattern=dotted", "pattern=plain", "size=small", "size=large", "background=sand"]


def named(active: list[list[float]]) -> list[tuple[str | None, float, float]]:
    """The concept of each latent, its share and its base, for a world of 40 images of 10 patches: 4
    of background and 6 of an object, which is large on three of four images and dotted on one of
    five.

    Args:
        active: of each latent how strongly it is active on patches of dotted large, dotted small,
            plain large, plain small objects, and on the background.
    """
    codes, truth = torch.zeros(40, 11, len(active)), torch.zeros(40, 10, 5, dtype=torch.bool)
    for i in range(40):
        small, plain = i % 4 == 0, i % 5 != 0
        codes[i, 1:7] = torch.tensor([strength[2 * plain + small] for strength in active])
        codes[i, 7:] = torch.tensor([strength[4] for strength in active])
        truth[i, :6, int(plain)] = True
        truth[i, :6, 3 - int(small)] = True
        truth[i, 6:, 4] = True
    concepts = {"patch_concepts": NAMES, "image_concepts": ["count=one"]}
    collector = Collector(sizes(len(active)), 10, top=2, **concepts)
    for part in torch.arange(40).split(7):
        one = torch.ones(len(part), 1, dtype=torch.bool)
        known = {"patch_truth": truth[part], "image_truth": one}
        collector.update(batch_of(codes[part], indices=part, **known))
    concepts = [*NAMES, "count=one"]
    refs = collector.references(Source("made up", "test", 40, (2, 5), ["a"], concepts, None))
    assert refs.base.tolist() == pytest.approx([0.2, 0.8, 0.25, 0.75, 1.0, 1.0])
    return [
        (
            NAMES[k] if (k := int(refs.concept[m])) >= 0 else None,
            float(refs.concept_precision[m]),
            float(refs.base[k]),
        )
        for m in range(len(active))
    ]


def test_a_concept_is_compared_with_its_siblings():
    """A latent of dots lies on large objects, as most patches with an object do, and one of objects
    does so all the more: neither stands for "large"."""
    dots, objects, large = [1, 1, 0, 0, 0], [1, 1, 1, 1, 0.1], [1, 0, 1, 0, 0]
    dots_of_any_size = [1.0, 0.9, 0.02, 0.02, 0.05]
    small_dots, background = [0, 1, 0, 0, 0], [0, 0, 0, 0, 1]
    found = named([dots, objects, large, dots_of_any_size, small_dots, background])
    assert [concept for concept, _, _ in found] == [
        *("pattern=dotted", None, "size=large", "pattern=dotted", "pattern=dotted", None)
    ]
    assert found[0][1:] == pytest.approx((1.0, 0.2))
    assert found[2][1:] == pytest.approx((1.0, 0.75))


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
@pytest.mark.parametrize("hook", ["resid", "embedding"])
def test_several_saes_in_one_pass_with_ground_truth(world, hook):
    clip, saes, dataset = world
    clip = FrozenCLIP(clip.model, name=clip.name, hook=hook)
    found = collect((clip, saes, dataset))
    images, _ = dataset.images(range(30))
    tokens = clip.prefix(clip.normalize(images))
    if clip.has_patches:
        truth = patch_concepts(dataset, torch.arange(30), clip.grid[0]).flatten(0, 1)
        names = concept_names(PATCH_ATTRIBUTES)
    else:
        truth = image_concepts(dataset, torch.arange(30))
        names = concept_names(IMAGE_ATTRIBUTES)
    for name, sae in saes.items():
        codes = sae.encode(tokens)
        refs = found[name]
        assert refs.maps.shape == (sae.latents, 10, clip.tokens - clip.prefix_tokens)
        scores = monosemanticity(codes.mean(dim=1), _concepts(dataset))
        assert torch.allclose(refs.monosemanticity, scores.float(), atol=1e-5, equal_nan=True)
        on_patches = codes[:, clip.prefix_tokens :].flatten(0, 1).double()
        kinds = [concept.split("=")[0] for concept in names]
        siblings = [[k for k, kind in enumerate(kinds) if kind == own] for own in kinds]
        rows = [truth[:, columns].any(dim=1) for columns in siblings]
        base = [float(truth[has, c].double().mean()) for c, has in enumerate(rows)]
        assert refs.base[: len(names)].tolist() == pytest.approx(base)
        score = torch.zeros(len(names), sae.latents)
        share = torch.zeros(len(names), sae.latents)
        for m in range(sae.latents):
            values = on_patches[:, m]
            for c, has in enumerate(rows):
                own, whole = float(values[has].sum()), float(values.sum())
                if own == 0:
                    continue
                share[c, m] = float(values[truth[:, c]].sum()) / own
                n = own**2 / float(values[has].square().sum())
                score[c, m] = own / whole * bits(float(share[c, m]), n, base[c])
            c = int(refs.concept[m])
            assert refs.concept_score[m] >= score[:, m].max() - 1e-4
            assert (c >= 0) == (refs.concept_score[m] >= NAMED)
            if 0 <= c < len(names):
                assert refs.concept_score[m] == pytest.approx(float(score[c, m]), abs=1e-4)
                assert refs.concept_precision[m] == pytest.approx(float(share[c, m]), abs=1e-4)
                covered = float(values[rows[c]].sum() / values.sum())
                assert refs.concept_covered[m] == pytest.approx(covered, abs=1e-4)
                recall = (values[truth[:, c]] > 0).double().mean()
                assert refs.concept_recall[m] == pytest.approx(float(recall))
        assert (
            len(refs.leading)
            == len(refs.leading_precision)
            == len(refs.base)
            == len(refs.source.concepts)
        )
        for c in range(len(names)):
            leading = [m for m in refs.leading[c].tolist() if m >= 0]
            best = score[c].sort(descending=True).values[: len(leading)]
            assert torch.allclose(score[c, leading], best, atol=1e-4)
            assert len(leading) == min(8, int((score[c] >= 1e-6).sum()))
            for m, found_share in zip(leading, refs.leading_precision[c], strict=False):
                assert found_share == pytest.approx(float(share[c, m]), abs=1e-4)
        assert refs.source.concepts[: len(names)] == names
        assert (refs.concept >= -1).all()
        assert refs.concept.max() < len(refs.source.concepts)
    assert (found["topk"].concept >= 0).any() or not clip.has_patches


def _concepts(dataset):
    return image_concepts(dataset, torch.arange(len(dataset))).float()


def test_an_interrupted_pass_goes_on_to_the_same_result(world, tmp_path):
    whole = collect(world)
    scratch = {name: tmp_path / name for name in world[1]}
    for folder in scratch.values():
        folder.mkdir()

    class Cut(RuntimeError):
        pass

    def stop(done: int, total: int, what: str) -> None:
        if done >= 24:
            raise Cut

    with pytest.raises(Cut):
        collect(world, scratch=scratch, save_every_seconds=0, progress=stop)
    seen = []
    again = collect(world, scratch=scratch, progress=lambda done, total, what: seen.append(done))
    assert seen == [24, 30]  # the batches of the first 16 images are not read again
    for name, refs in whole.items():
        for field in ("values", "index", "maps", "histogram", "frequency", "concept"):
            assert torch.equal(getattr(refs, field), getattr(again[name], field)), field
        assert torch.equal(
            refs.monosemanticity.nan_to_num(-9), again[name].monosemanticity.nan_to_num(-9)
        )


def test_what_cannot_be_is_refused(world):
    with pytest.raises(ValueError, match="top=0"):
        collect(world, top=0)
