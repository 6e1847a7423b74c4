"""Concept recovery against loops over pairs of rows and over thresholds."""

import math
import random
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu

from clipsae.evaluation.floors import RIDGE, RandomDirections, untrained
from clipsae.evaluation.metrics.auroc import auroc, best_f1
from clipsae.evaluation.metrics.concepts import (
    SIZES,
    absorption,
    concept_recovery,
    probe_recovery,
)
from clipsae.evaluation.metrics.recovery import (
    NUMBERS,
    REFERENCES,
    ConceptRecovery,
    pool_rows,
)
from clipsae.evaluation.truth import (
    IMAGE_ATTRIBUTES,
    OBJECT_ATTRIBUTES,
    PATCH_ATTRIBUTES,
    concept_names,
)
from clipsae.sae import SAE, SparseCodes
from tests.evaluation.made_up import batch_of, options


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


NAMES = ["a=0", "a=1", "a=2", "b=0", "b=1", "c=0", "c=1"]


def world(n=120, latents=14, seed=0):
    """Rows with attributes a (always), b (half of the rows) and c (c=1 never), and hard codes."""
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randint(3, (n,), generator=g), torch.randint(2, (n,), generator=g)
    has_b = torch.rand(n, generator=g) < 0.5
    truth = torch.cat(
        (
            a[:, None] == torch.arange(3),
            (b[:, None] == torch.arange(2)) & has_b[:, None],
            torch.stack((has_b, torch.zeros_like(has_b)), dim=1),
        ),
        dim=1,
    )
    codes = (torch.randn(n, latents, generator=g) - 0.4).clamp(min=0)
    codes[:, 0] = 0  # dead
    codes[:, 1] = 0.1  # constant
    codes[:, 2] = codes[:, 2].round()  # ties
    codes[:, 3] -= 0.5  # both signs, no zeros
    codes[:, 4] = truth[:, 0] * (1 + codes[:, 4])  # knows a=0
    codes[:, 5] = truth[:, 0] * 0.2  # so does this
    codes[:, 6] = truth[:, 3].float()
    codes[:, 7] = has_b.float()  # tells b from nothing, and not its values
    choosing = torch.rand(n, generator=g) < 0.5
    return codes, truth, choosing


def plain_recovery(codes, truth, choosing, threshold):
    """The definitions, by loops."""
    kinds = [name.split("=")[0] for name in NAMES]
    found = []
    for v, kind in enumerate(kinds):
        of = [w for w, other in enumerate(kinds) if other == kind]
        rows = truth[:, of].any(dim=1)
        first, second = rows & choosing, rows & ~choosing
        counts = [int(truth[half, v].sum()) for half in (first, second)]
        sizes = [int(first.sum()), int(second.sum())]
        if not all(0 < c < n for c, n in zip(counts, sizes, strict=True)):
            found.append(None)
            continue
        one = {"sizes": [*sizes, *counts]}
        yes, no = truth[first, v].tolist(), truth[second, v].tolist()
        before, after = codes[first].double().T.tolist(), codes[second].double().T.tolist()
        area = [plain_auroc(c, yes) for c in before]
        again = [plain_auroc(c, no) for c in after]
        one["auroc_latent"] = m = area.index(max(area))
        one["auroc"] = again[m]
        one["good"] = {
            k
            for k in range(len(area))
            if again[k] >= threshold and (area[k] >= threshold or k == m)
        }
        f1 = [plain_f1(c, yes) for c in before]
        one["f1_latent"] = m = f1.index(max(f1))
        fits = [
            t
            for t in sorted({c for c in before[m] if c > 0}, reverse=True)
            if plain_f1([float(c >= t) for c in before[m]], yes) == f1[m]
        ]
        one["f1_threshold"] = fits[0]
        said = [c >= fits[0] for c in after[m]]
        hits = sum(s and t for s, t in zip(said, no, strict=True))
        one["f1"] = 2 * hits / (sum(said) + sum(no))
        one["r"] = [[pearson(c, t) for c in half] for half, t in ((before, yes), (after, no))]
        found.append(one)
    return found


def pearson(a, b):
    if len(set(a)) == 1 or len(set(b)) == 1:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


@pytest.mark.parametrize("sparse", [False, True])
def test_every_number_is_its_definition(sparse):
    codes, truth, choosing = world()
    given = SparseCodes.from_dense(codes) if sparse else codes
    found = concept_recovery(given, truth, NAMES, choosing, threshold=0.8)
    plain = plain_recovery(codes, truth, choosing, 0.8)
    assert [one is None for one in plain] == [False] * 5 + [True] * 2
    defined = plain[:5]
    for v, one in enumerate(defined):
        for name in ("auroc_latent", "f1_latent"):
            assert found[name][v] == one[name], (name, v)
        for name in ("auroc", "f1", "f1_threshold"):
            assert found[name][v].item() == pytest.approx(one[name], rel=1e-9), (name, v)
        assert found["latents"][v] == len(one["good"])
        assert [found[name][v] for name in SIZES] == one["sizes"]
    for name in ("auroc", "f1", "mcc"):
        assert found[name][5:].isnan().all()
        assert found[f"{name}_latent"][5:].tolist() == [-1, -1]
        assert found[f"mean_{name}"].item() == pytest.approx(found[name][:5].mean().item())
    assert found["concepts"] == 5
    good = [sum(m in one["good"] for one in defined) for m in range(14)]
    assert found["good_for"].tolist() == good
    split = [len(one["good"]) for one in defined if one["auroc"] >= 0.8]
    assert len(split) >= 2
    assert max(split) >= 2  # latents 4 and 5
    assert found["concepts_found"].item() == pytest.approx(len(split) / 5)
    assert found["splitting"].item() == pytest.approx(sum(split) / len(split))
    merged = sum(g > 1 for g in good) / sum(g > 0 for g in good)
    assert found["merging"].item() == pytest.approx(merged)
    for m in range(14):
        positive = codes[choosing, m].double().clamp(min=0)
        if positive.sum() == 0:
            assert found["purity"][m].isnan()
        else:
            shares = (positive[:, None] * truth[choosing][:, :5]).sum(0) / positive.sum()
            assert found["purity"][m].item() == pytest.approx(shares.max().item())
    assert found["live"] == (codes[choosing].clamp(min=0).sum(0) > 0).sum()


def test_mcc_is_the_best_assignment():
    """Against all assignments of few latents, two of them equal: one concept goes without."""
    codes, truth, choosing = world(latents=9)
    codes = codes[:, [2, 3, 4, 5, 6, 8]]
    found = concept_recovery(codes, truth, NAMES, choosing)
    plain = plain_recovery(codes, truth, choosing, 0.9)[:5]
    ways = list(permutations(range(6), 5))
    before, after = ([one["r"][half] for one in plain] for half in (0, 1))
    best = max(ways, key=lambda way: sum(before[v][m] for v, m in enumerate(way)))
    assert found["mcc_latent"].tolist()[:5] == list(best)
    expected = [after[v][m] for v, m in enumerate(best)]
    assert found["mcc"].tolist()[:5] == pytest.approx(expected)
    two = concept_recovery(codes[:, 2:4], truth, NAMES, choosing)
    assert two["mcc_latent"].tolist().count(-1) == 5
    assert sorted(two["mcc"].tolist()[:5]).count(0) == 3


# --- planted codes with known answers ---


def planted(n=3000, seed=0):
    """Patches of which one in six shows an object, of a shape and a colour."""
    g = torch.Generator().manual_seed(seed)
    shown = torch.rand(n, generator=g) < 1 / 6
    shape, colour = torch.randint(4, (n,), generator=g), torch.randint(5, (n,), generator=g)
    truth = torch.cat(
        (
            (shape[:, None] == torch.arange(4)) & shown[:, None],
            (colour[:, None] == torch.arange(5)) & shown[:, None],
            ~shown[:, None] & (torch.randint(3, (n, 1), generator=g) == torch.arange(3)),
        ),
        dim=1,
    )
    names = [f"shape={i}" for i in range(4)] + [f"colour={i}" for i in range(5)]
    return truth, [*names, *(f"background={i}" for i in range(3))], torch.arange(n) % 2 == 0


def test_codes_that_know_all():
    truth, names, choosing = planted()
    found = concept_recovery(truth.float(), truth, names, choosing)
    for name in ("concepts_found", "mean_auroc", "mean_f1", "mean_mcc", "splitting"):
        assert found[name] == 1, name
    assert found["merging"] == 0
    assert found["mean_purity"] == 1


def test_codes_that_know_nothing():
    truth, names, choosing = planted()
    codes = torch.rand(len(truth), 200, generator=torch.Generator().manual_seed(1))
    found = concept_recovery(codes, truth, names, choosing)
    assert found["concepts_found"] == 0
    assert found["mean_auroc"].item() == pytest.approx(0.5, abs=0.03)
    assert found["mean_mcc"].abs() < 0.05
    assert found["auroc"].max() < 0.6  # chosen among 200, but not scored where it was chosen


def test_object_or_not_finds_nothing():
    """Against all patches, this one latent reaches AUROC 0.9 for each shape and each colour."""
    truth, names, choosing = planted()
    objects = truth[:, :4].any(dim=1)
    assert plain_auroc(objects.tolist(), truth[:, 0].tolist()) > 0.88
    found = concept_recovery(torch.stack((objects, ~objects), 1).float(), truth, names, choosing)
    assert found["concepts_found"] == 0
    assert found["auroc"].tolist() == [0.5] * 12


def test_random_directions_find_nothing_and_a_probe_all():
    """Tokens with a large component "object or not", and a small one for each concept."""
    truth, names, choosing = planted()
    g = torch.Generator().manual_seed(2)
    rows, d = torch.randn(12, 64, generator=g) / 8, 64
    large = torch.randn(d, generator=g)
    x = truth.float() @ rows + truth[:, :4].any(dim=1)[:, None] * large
    x = x + 0.3 * torch.randn(len(x), d, generator=g)
    model = RandomDirections(x)
    codes = model.encode_sparse(x)
    assert codes.shape == (len(x), 1024)
    expected = torch.relu((x - x.mean(dim=0)) @ model.rows.T)
    assert torch.allclose(codes.dense(), expected)
    assert torch.equal(model.rows[:512], -model.rows[512:])
    assert torch.allclose(model.rows.norm(dim=1), torch.ones(1024))
    random_ones = concept_recovery(codes, truth, names, choosing)
    probe = probe_recovery(x, truth, names, choosing)
    assert random_ones["concepts_found"] == 0
    assert probe["concepts_found"] == 1
    assert random_ones["mean_auroc"] < probe["mean_auroc"] - 0.15


def test_a_concept_that_is_split():
    truth, names, choosing = planted()
    half = torch.rand(len(truth), generator=torch.Generator().manual_seed(3)) < 0.5
    codes = truth.float()
    codes = torch.cat((codes * half[:, None], codes * ~half[:, None]), dim=1)
    found = concept_recovery(codes, truth, names, choosing, threshold=0.65)
    assert found["concepts_found"] == 1
    assert found["splitting"] == 2
    assert found["auroc"].mean().item() == pytest.approx(0.75, abs=0.03)
    assert found["mean_mcc"] < 0.85
    assert concept_recovery(codes, truth, names, choosing)["concepts_found"] == 0


def test_a_latent_that_merges_two_siblings():
    truth, names, choosing = planted()
    codes = truth.float()
    codes[:, 4] = codes[:, 5] = (truth[:, 4] | truth[:, 5]).float()  # two colours of five
    found = concept_recovery(codes, truth, names, choosing, threshold=0.85)
    assert found["good_for"].tolist() == [1] * 4 + [2, 2] + [1] * 6
    assert found["merging"].item() == pytest.approx(2 / 12)
    assert found["concepts_found"] == 1
    assert found["auroc"][4].item() == pytest.approx(1 - 0.25 / 2, abs=0.03)


def test_all_zero_codes():
    truth, names, choosing = planted(600)
    found = concept_recovery(torch.zeros(600, 3), truth, names, choosing)
    assert found["auroc"].tolist() == [0.5] * 12
    assert found["concepts_found"] == found["mean_f1"] == found["mean_mcc"] == found["live"] == 0
    for name in ("splitting", "merging", "mean_purity"):
        assert found[name].isnan()


def test_blocks_of_latents_change_nothing(monkeypatch):
    codes, truth, choosing = world()
    whole = concept_recovery(codes, truth, NAMES, choosing)
    monkeypatch.setattr("clipsae.evaluation.metrics.concepts._BLOCK_ELEMENTS", 6 * 20)
    done = []
    again = concept_recovery(codes, truth, NAMES, choosing, progress=lambda *at: done.append(at))
    for name, value in again.items():
        assert torch.equal(value.nan_to_num(-9), whole[name].nan_to_num(-9)), name
    assert done == sorted(done)
    assert len(done) > 3
    assert done[-1] == (28, 28)  # rows with a, and those with b and c


def test_invalid_input_is_refused():
    codes, truth, choosing = world()
    for wrong, words in (
        ((truth.float(), NAMES, choosing), r"expected bool \[120, V\]"),
        ((truth[:7], NAMES, choosing), r"expected bool \[120, V\]"),
        ((truth, NAMES[1:], choosing), "6 names: expected one for each of 7 concepts"),
        ((truth, NAMES, choosing.long()), r"choosing .*: expected bool \[120\]"),
        ((truth, NAMES, choosing, 0.5), r"above 0\.5"),
    ):
        with pytest.raises(ValueError, match=words):
            concept_recovery(codes, *wrong)
        with pytest.raises(ValueError, match=words):
            probe_recovery(codes, *wrong)


# --- the probe, and absorption ---


def test_the_probe_is_ridge_regression():
    codes, truth, choosing = world()
    found = probe_recovery(codes, truth, NAMES, choosing, threshold=0.8)
    for v, kind in ((0, slice(0, 3)), (3, slice(3, 5))):
        rows = truth[:, kind].any(dim=1)
        x, y = codes[rows & choosing].double().numpy(), truth[rows & choosing, v].numpy()
        mean = x.mean(axis=0)
        strength = RIDGE * x.var(axis=0).mean() * len(x)
        padded = np.vstack((x - mean, strength**0.5 * np.eye(x.shape[1])))
        wanted = np.concatenate((y - y.mean(), np.zeros(x.shape[1])))
        weights = np.linalg.lstsq(padded, wanted, rcond=None)[0]
        intercept = y.mean() - mean @ weights
        expected = [*weights, intercept]
        assert found["weights"][:, v].tolist() == pytest.approx(expected, rel=1e-6, abs=1e-9)
        scores = codes[rows & ~choosing].double().numpy() @ weights + intercept
        scores = scores.tolist()
        after = truth[rows & ~choosing, v].tolist()
        assert found["auroc"][v].item() == pytest.approx(plain_auroc(scores, after))
        assert found["mcc"][v].item() == pytest.approx(pearson(scores, after))
        fitted = (x @ weights + intercept).tolist()
        low = min(*fitted, *scores)
        best = max(fitted, key=lambda t: plain_f1([float(c >= t) for c in fitted], y.tolist()))
        assert found["threshold"][v].item() == pytest.approx(best)
        expected = plain_f1([float(c >= best) for c in scores], after)
        assert found["f1"][v].item() == pytest.approx(expected)
        assert low < best
    assert found["auroc"].isnan().tolist() == [False] * 5 + [True] * 2
    assert found["concepts"] == 5


def plain_absorption(codes, target, decoder, directions, shown, main):
    shares = []
    for v, m in enumerate(main.tolist()):
        p, rows = directions[:, v], shown[:, v].nonzero()[:, 0].tolist()
        if m < 0 or not rows:
            shares.append(math.nan)
            continue
        absorbed = 0
        for i in rows:
            others = [
                k
                for k in range(len(decoder))
                if k != m
                and target[i] @ p > 0
                and codes[i, k] > 0
                and float(torch.cosine_similarity(decoder[k], p, dim=0)) >= 0.1
                and codes[i, k] * (decoder[k] @ p) >= 0.4 * (target[i] @ p)
            ]
            absorbed += bool(codes[i, m] <= 0 and others)
        shares.append(absorbed / len(rows))
    return shares


def test_absorption_is_its_definition():
    g = torch.Generator().manual_seed(0)
    n, m, d, v = 60, 12, 8, 4
    codes = torch.relu(torch.randn(n, m, generator=g))
    target, decoder = torch.randn(n, d, generator=g), torch.randn(m, d, generator=g)
    directions = torch.randn(d, v, generator=g)
    shown = torch.rand(n, v, generator=g) < 0.5
    shown[:, 2] = False
    main = torch.tensor([4, 7, 1, -1])
    given = codes, target, decoder, directions, shown, main
    found = absorption(SparseCodes.from_dense(codes), *given[1:])
    expected = plain_absorption(*given)
    assert found.tolist() == pytest.approx(expected, nan_ok=True)
    assert 0 < expected[0] < 1


def test_a_concept_that_is_absorbed():
    """The latent of circles is silent on red circles, and that of red circles says both."""
    g = torch.Generator().manual_seed(0)
    circle = torch.rand(4000, generator=g) < 0.3
    red = torch.rand(4000, generator=g) < 0.25
    directions = torch.eye(6)[:2]  # of circles, of red
    target = torch.stack((circle, red), dim=1).float() @ directions
    shown, main = circle[:, None], torch.tensor([0])
    apart = torch.stack((circle, red, torch.zeros_like(red)), dim=1).float()
    absorbed = torch.stack((circle & ~red, red & ~circle, circle & red), dim=1).float()
    decoder = torch.stack((*directions, directions.sum(dim=0)))
    for codes, share in ((apart, 0.0), (absorbed, (circle & red).sum() / circle.sum())):
        assert torch.equal(codes @ decoder, target)  # both reconstruct all
        found = absorption(
            SparseCodes.from_dense(codes), target, decoder, directions[:1].T, shown, main
        )
        assert found.item() == pytest.approx(float(share))
    missed = absorbed * torch.tensor([1.0, 1.0, 0.0])  # silent, but no other latent says it
    found = absorption(
        SparseCodes.from_dense(missed), target, decoder, directions[:1].T, shown, main
    )
    assert found.item() == 0
    against = torch.where(shown, -target, target)  # tokens that do not point to the concept at all
    found = absorption(
        SparseCodes.from_dense(absorbed), against, decoder, directions[:1].T, shown, main
    )
    assert found.item() == 0


# --- the measurement ---


@pytest.mark.parametrize("how", ["max", "mean", "cls"])
def test_pooled_rows(how):
    g = torch.Generator().manual_seed(0)
    codes = torch.randn(20, 5, generator=g) * (torch.rand(20, 5, generator=g) < 0.4)
    group = torch.cat((torch.randint(-1, 4, (16,), generator=g), torch.arange(4)))
    found = pool_rows(SparseCodes.from_dense(codes), group, how).dense()
    for at in range(4):
        rows = codes[group == at]
        expected = {"max": rows.amax(0).clamp(min=0), "mean": rows.mean(0), "cls": rows[0]}[how]
        assert torch.allclose(found[at], expected)


@pytest.fixture
def sae():
    torch.manual_seed(0)
    return SAE(6, 15, "linear", "topk", k=3).eval()


def made_up(images=40, patches=4):
    """Tokens and truth of images of two objects and background."""
    g = torch.Generator().manual_seed(1)
    values = [len(concept_names([name])) for name in PATCH_ATTRIBUTES]
    objects = torch.randint(-1, 2, (images, patches), generator=g)
    columns = []
    for name, size in zip(PATCH_ATTRIBUTES, values, strict=True):
        of_object = torch.randint(min(size, 3), (images, 2), generator=g)
        label = of_object.gather(1, objects.clamp(min=0))
        hidden = objects >= 0 if name == "background" else objects < 0
        columns.append(label.masked_fill(hidden, -1)[..., None] == torch.arange(size))
    of_images = torch.rand(images, len(concept_names(IMAGE_ATTRIBUTES)), generator=g) < 0.3
    x = torch.randn(images, patches + 1, 6, generator=g)
    return x, {
        "patch_truth": torch.cat(columns, dim=2),
        "patch_objects": objects,
        "image_truth": of_images,
    }


def test_levels_samples_and_processes(merged, sae):
    """Patches, objects and images of those that are drawn, in whatever order they come."""
    x, known = made_up()
    codes = sae.encode(x)
    given = options(40, tokens=5, sample_images=30, pooling="max")
    metrics = [ConceptRecovery(sae, given) for _ in range(3)]
    for metric, part in ((metrics[2], slice(0, 13)), (metrics[0], slice(13, 40))):
        of_part = {name: value[part] for name, value in known.items()}
        metric.update(batch_of(codes[part], part.start, sae, tokens=x[part], **of_part))
    found = merged(*metrics)

    drawn = torch.tensor(sorted(random.Random(0).sample(range(40), 30)))
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    first = order % 2 == 0  # of the drawn images, those that choose
    names = {
        "patch": concept_names(PATCH_ATTRIBUTES),
        "object": concept_names(OBJECT_ATTRIBUTES),
        "image": concept_names(IMAGE_ATTRIBUTES),
    }
    z, truth, slot = codes[drawn], known["patch_truth"][drawn], known["patch_objects"][drawn]
    rows = [(i, s) for i in range(30) for s in range(2) if (slot[i] == s).any()]
    levels = {
        "patch": (z[:, 1:].flatten(0, 1), truth.flatten(0, 1), first.repeat_interleave(4)),
        "object": (
            torch.stack([z[i, 1:][slot[i] == s].amax(dim=0) for i, s in rows]),
            torch.stack([truth[i][slot[i] == s].any(dim=0) for i, s in rows])[:, :25],
            torch.stack([first[i] for i, _ in rows]),
        ),
        "image": (z.amax(dim=1), known["image_truth"][drawn], first),
    }
    for level, (of_level, shown, choosing) in levels.items():
        whole = concept_recovery(of_level, shown, names[level], choosing)
        for name in ("auroc", "f1", "mcc"):
            assert found[f"{level}_{name}"].item() == pytest.approx(whole[f"mean_{name}"].item()), (
                level
            )
        assert found[f"{level}_concepts_found"] == whole["concepts_found"]
        assert found[f"{level}_concepts"] == whole["concepts"]
        listed = [row for row in metrics[0].concepts if row["level"] == level]
        assert [row["concept"] for row in listed] == names[level]
        assert [row["auroc_latent"] for row in listed] == whole["auroc_latent"].tolist()
        for of in REFERENCES:
            values = [row[f"auroc_{of}"] for row in listed]
            assert found[f"{level}_auroc_{of}"].item() == pytest.approx(np.nanmean(values))
    assert found.keys() <= {number.key for number in NUMBERS}
    for number in NUMBERS:
        assert {number.floor, number.ceiling} <= {"", *found}
        if number.floor:
            assert number.floor == f"{number.key}_untrained"


def test_too_much_for_memory(sae, monkeypatch, caplog):
    """Whole images are dropped, as if they had not been drawn."""
    x, known = made_up()
    monkeypatch.setattr("clipsae.evaluation.metrics.recovery._NUMBERS", 5_000)
    metric = ConceptRecovery(sae, options(40, tokens=5))
    metric.update(batch_of(sae.encode(x), sae=sae, tokens=x, **known))
    with caplog.at_level("INFO"):
        found = metric.compute()
    assert "of 40 images" in caplog.text
    assert "leaves out" in caplog.text
    assert 0 < metric.sample.compared < 40
    assert found["patch_concepts"] > 0


def test_the_untrained_sae(sae):
    """Another one of the same config, initialised as training does; no global state is touched."""
    x, _ = made_up()
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    twin = untrained(sae, x)
    assert torch.equal(torch.rand(1), expected)
    assert twin.config == sae.config
    torch.manual_seed(0)
    fresh = SAE(**sae.config)
    fresh.initialize(x[:32])
    for one, other in zip(twin.state_dict().values(), fresh.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(untrained(sae, x).encode(x), twin.encode(x))


def test_an_untrained_batch_topk_sae_has_a_threshold():
    torch.manual_seed(0)
    sae, x = SAE(d=16, latents=64, activation="batch_topk", k=4), torch.randn(8, 5, 16)
    codes = untrained(sae, x).encode(x)
    # k a token, on the images that it is initialised from; the smallest is the threshold.
    assert (codes != 0).sum() == 4 * 8 * 5 - 1
