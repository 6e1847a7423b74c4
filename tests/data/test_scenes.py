"""The built-in world: the same images whatever the batch, true labels, captions that are true."""

import pickle
import re
from dataclasses import replace

import pytest
import torch

from clipsae.data.scenes import (
    BACKGROUNDS,
    COLOURS,
    KINDS,
    PATTERNS,
    POSITIONS,
    SHAPES,
    ScenesDataset,
)
from clipsae.data.scenes.grammar import caption_targets, make_captions, vocabulary
from clipsae.data.scenes.renderer import render
from clipsae.data.scenes.shapes import SHAPE_DISTANCE
from clipsae.data.scenes.world import IMAGE_SIZE, MIXED, SINGLE, sample_scenes, uniforms

ALL_KINDS = [*KINDS, "all", "spurious"]


def singles(n: int, **fixed: int):
    """n scenes of one object, with the same labels where given."""
    fixed = {name: torch.full((n,), value) for name, value in fixed.items()}
    return sample_scenes(7, 99, torch.arange(n), SINGLE, fixed)


# --- determinism ---


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_an_image_does_not_depend_on_its_batch(kind):
    dataset = ScenesDataset(kind, "test", size=200)
    indices = [3, 199, 0, 64, 65, 66, 7, 3, *range(100, 140)]
    together = dataset.__getitems__(indices)
    for i, (image, label) in zip(indices, together, strict=True):
        alone, alone_label = dataset[i]
        assert torch.equal(image, alone)
        assert label == alone_label == int(dataset.labels[i])
        assert image.dtype == torch.uint8
        assert image.shape == (3, dataset.image_size, dataset.image_size)


def test_images_are_a_function_of_their_index_alone():
    state = torch.random.get_rng_state()
    short, long = ScenesDataset("all", "train", 10), ScenesDataset("all", "train", 1000)
    assert torch.equal(short.images(range(10))[0], long.images(range(10))[0])
    short.patch_truth(range(10))
    assert torch.equal(state, torch.random.get_rng_state())


def test_images_are_the_same_as_ever():
    """Exactly in what they show; in their pixels up to the last bit of a sine."""
    data = ScenesDataset("all", "test", 100, seed=3)
    images = data.images(range(100))[0].float()
    assert images.mean((0, 2, 3)).tolist() == pytest.approx([115.47, 118.65, 108.65], abs=0.02)
    assert float(images.std()) == pytest.approx(61.48, abs=0.02)
    assert data.labels.bincount().tolist() == [58, 26, 16]
    assert data.attributes(range(12))["colour"][:, 0].tolist() == [
        2,
        5,
        6,
        2,
        6,
        2,
        6,
        5,
        7,
        0,
        6,
        7,
    ]


def test_splits_kinds_and_seeds_share_no_image():
    seen = set()
    sets = [ScenesDataset(k, s, 100) for k in ALL_KINDS for s in ("train", "test")]
    sets.append(ScenesDataset("shape", "train", 100, seed=1))
    for dataset in sets:
        images, _ = dataset.images(range(100))
        seen |= {image.numpy().tobytes() for image in images}
    assert len(seen) == 100 * len(sets)


def test_random_numbers_are_uniform_and_independent_of_neighbours():
    u = uniforms(0, 3, torch.arange(4000), 32).double()
    assert u.min() >= 0
    assert u.max() < 1
    assert torch.allclose(u.mean(0), torch.tensor(0.5, dtype=torch.double), atol=0.03)
    assert torch.allclose(u.var(0), torch.tensor(1 / 12, dtype=torch.double), atol=0.01)
    both = torch.cat((u[:-1], u[1:]), 1)  # neighbouring counters and neighbouring indices
    correlation = torch.corrcoef(both.T) - torch.eye(64, dtype=torch.double)
    assert correlation.abs().max() < 0.08
    assert torch.equal(uniforms(0, 3, torch.tensor([17]), 8)[0].double(), u[17, :8])


# --- labels and ground truth ---


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_labels_say_what_the_attributes_say(kind):
    dataset = ScenesDataset(kind, "train", size=320)
    truth = dataset.attributes(range(320))
    expected = {
        "shape_colour": truth["shape"][:, 0] * len(COLOURS) + truth["colour"][:, 0],
        "background": truth["background"],
        "count": truth["count"] - 1,
        "all": truth["count"] - 1,
        "spurious": truth["shape"][:, 0],  # 0 and 1 are the two shapes
    }
    label = expected[kind] if kind in expected else truth[kind][:, 0]
    assert torch.equal(dataset.labels, label)
    if kind not in ("background", "count", "all"):
        assert truth["count"].eq(1).all()  # otherwise the label would be ambiguous
    if kind != "all":
        counts = dataset.labels.bincount(minlength=len(dataset.classnames))
        assert counts.max() - counts.min() <= 1
    names = dict(zip(range(320), (dataset.classnames[i] for i in dataset.labels), strict=True))
    if kind == "shape_colour":
        for i in range(0, 320, 37):
            colour, shape = list(COLOURS)[truth["colour"][i, 0]], SHAPES[truth["shape"][i, 0]]
            assert names[i] == f"{colour} {shape}"


def test_a_shape_is_tied_to_its_background_in_the_training_images_alone():
    shares = {}
    for split in ("train", "test"):
        data = ScenesDataset("spurious", split, 2000)
        truth = data.attributes(range(2000))
        assert data.groupnames[3] == "square on water"
        shape, background = data.groups // 2, data.groups % 2
        assert torch.equal(shape, data.labels)
        assert [SHAPES[i] for i in truth["shape"][:2, 0]] == data.classnames == ["circle", "square"]
        on = [data.confounder.index(BACKGROUNDS[b]) for b in truth["background"].tolist()]
        assert background.tolist() == on
        assert truth["radius"][:, 0].max() < 9  # of 64 pixels
        shares[split] = float((shape == background).double().mean())
    assert shares == pytest.approx({"train": 0.95, "test": 0.5}, abs=0.02)


def test_size_is_independent_of_position():
    scenes = sample_scenes(0, 5, torch.arange(6000), SINGLE)
    for size in (0, 1):
        rows = scenes.size[:, 0] == size
        share = scenes.position[rows, 0].bincount(minlength=9) / rows.sum()
        assert torch.allclose(share, torch.tensor(1 / 9), atol=0.025)
        # Not only the cell: the place itself has the same spread.
        assert abs(float(scenes.x[rows, 0].mean()) - IMAGE_SIZE / 2) < 0.7
        assert abs(float(scenes.x[rows, 0].std()) - float(scenes.x[:, 0].std())) < 0.3


def test_position_names_say_where_the_object_is():
    scenes = singles(400)
    middle = IMAGE_SIZE / 2
    for i in range(400):
        name, x, y = POSITIONS[scenes.position[i, 0]], scenes.x[i, 0], scenes.y[i, 0]
        assert ("left" in name) == bool(x < middle - 5)
        assert ("right" in name) == bool(x > middle + 5)
        assert ("top" in name) == bool(y < middle - 5)
        assert ("bottom" in name) == bool(y > middle + 5)


def test_objects_neither_overlap_nor_leave_the_image():
    scenes = sample_scenes(1, 5, torch.arange(600), MIXED)
    _, coverage = render(scenes)
    assert coverage.sum(1).max() <= 1 + 1e-5
    # Moved to the middle of the image, an object would show no more of itself.
    middle = torch.full_like(scenes.x, IMAGE_SIZE / 2)
    _, whole = render(replace(scenes, x=middle, y=middle))
    shown = coverage.sum((2, 3)) / whole.sum((2, 3)).clamp(min=1)
    assert (shown[scenes.shape >= 0] > 0.98).all()
    drawn = coverage.flatten(2).sum(2) > 40  # each object is there, the others are not
    assert torch.equal(drawn, scenes.shape >= 0)


def test_patch_truth_is_what_a_loop_over_patches_finds():
    dataset = ScenesDataset("all", "test", size=40)
    scenes = dataset.scenes(range(40))
    _, coverage = render(scenes)
    truth = dataset.patch_truth(range(40), grid=8, min_coverage=0.25)
    for i in range(40):
        for patch in range(64):
            row, column = divmod(patch, 8)
            window = coverage[i, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            share = window.mean((1, 2))
            assert truth["coverage"][i, patch] == pytest.approx(float(share.max()), abs=1e-5)
            slot = int(share.argmax()) if share.max() >= 0.25 else -1
            assert truth["object"][i, patch] == slot
            for name in ("shape", "colour", "pattern", "size"):
                expected = int(getattr(scenes, name)[i, slot]) if slot >= 0 else -1
                assert truth[name][i, patch] == expected


def test_coverage_falls_where_the_object_is_said_to_be():
    scenes = singles(200)
    coverage = render(scenes)[1][:, 0]
    axis = torch.arange(IMAGE_SIZE) + 0.5
    mass = coverage.sum((1, 2))
    x = (coverage.sum(1) * axis).sum(1) / mass
    y = (coverage.sum(2) * axis).sum(1) / mass
    # The centre of mass of crescent and heart lies off their middle, never by half a radius.
    assert ((x - scenes.x[:, 0]).abs() < 0.5 * scenes.radius[:, 0]).all()
    assert ((y - scenes.y[:, 0]).abs() < 0.5 * scenes.radius[:, 0]).all()


# --- what is seen ---


@pytest.mark.parametrize("colour", range(len(COLOURS)), ids=list(COLOURS))
def test_a_plain_object_has_its_colour(colour):
    scenes = singles(60, colour=colour, pattern=0)
    images, coverage = render(scenes)
    inside = (coverage[:, 0] > 0.99).float()
    mean = (images * inside[:, None]).sum((2, 3)) / inside.sum((1, 2))[:, None] / 255  # [n, 3]
    palette = torch.tensor(list(COLOURS.values()))
    # Light changes the brightness by a third at most: compare the best fit over brightness.
    bright = torch.linspace(0.7, 1.25, 12)[:, None, None]
    shades = (palette * bright).clamp(max=1)  # [12, C, 3]
    distance = (mean[:, None, None] - shades).norm(dim=-1).amin(1)  # [n, C]
    assert (distance.argmin(1) == colour).all()


def test_every_pattern_shows_its_second_colour():
    for pattern, name in enumerate(PATTERNS):
        images, coverage = render(singles(60, pattern=pattern, colour=2))  # yellow, dark yellow
        inside = coverage[:, 0] > 0.99
        green = images[:, 1] / 255.0
        dark = ((green < 0.6) & inside).sum((1, 2)) / inside.sum((1, 2))
        low, high = {"plain": (0, 0.02)}.get(name, (0.1, 0.8))
        assert (dark >= low).all(), name
        assert (dark <= high).all(), name


def test_shapes_differ_and_fill_their_radius():
    axis = torch.linspace(-1.3, 1.3, 261)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    inside = {name: distance(x, y) < 0 for name, distance in SHAPE_DISTANCE.items()}
    assert tuple(inside) == SHAPES
    reach = torch.hypot(x, y)
    for name, mask in inside.items():
        assert 0.85 < float(reach[mask].max()) < 1.15, name
    for a in SHAPES:
        for b in SHAPES:
            overlap = (inside[a] & inside[b]).sum() / (inside[a] | inside[b]).sum()
            assert (a == b) == bool(overlap > 0.9), (a, b)


@pytest.mark.parametrize("name", SHAPES)
def test_shape_distances_are_distances_near_the_edge(name):
    """A gradient of length 1 where the edge is, or antialiasing would blur or sharpen it."""
    y, x = torch.meshgrid(*2 * [torch.linspace(-1.2, 1.2, 97, dtype=torch.double)], indexing="ij")
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    distance = SHAPE_DISTANCE[name](x, y)
    gx, gy = torch.autograd.grad(distance.sum(), (x, y))
    length = torch.hypot(gx, gy)[distance.abs() < 0.05]
    assert torch.quantile((length - 1).abs(), 0.9) < 0.02


def test_backgrounds_differ():
    mean, spread = [], []
    for background in range(8):
        images, coverage = render(singles(30, background=background))
        pixels = images[:, :, :, :].permute(0, 2, 3, 1)[coverage.sum(1) == 0] / 255.0
        mean.append(pixels.mean(0))
        spread.append(pixels.std(0))
    mean = torch.stack(mean)
    apart = torch.cdist(mean, mean) + torch.eye(8)
    assert apart.min() > 0.08
    assert min(float(s.min()) for s in spread) > 0.02  # a texture, not a flat colour


# --- what is said ---


@pytest.mark.parametrize("kind", list(KINDS))
def test_prompts_use_a_and_an_rightly(kind):
    dataset = ScenesDataset(kind, "test", size=1)
    prompts = [t(name) for t in dataset.templates for name in dataset.classnames]
    assert len(set(prompts)) == len(prompts)
    for prompt in prompts:
        assert not re.search(r"\ba [aeiou]", prompt), prompt
        assert not re.search(r"\ban [^aeiou]", prompt), prompt
        assert "{" not in prompt


def test_captions_are_grammatical_and_true():
    scenes = sample_scenes(2, 5, torch.arange(500), MIXED)
    captions = make_captions(scenes, 0, torch.arange(500))
    words = set(vocabulary())
    for i, text in enumerate(captions.texts):
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]|  |^ | $|,\S", text), text
        tokens = text.replace(",", " ,").split()
        assert set(tokens) <= words, text
        # Every shape and colour that is named is there, as often as it is named.
        for names, column in ((SHAPES, scenes.shape), (tuple(COLOURS), scenes.colour)):
            for k, name in enumerate(names):
                assert tokens.count(name) <= int((column[i] == k).sum()), text
        if " against " in text:
            assert text.endswith(
                ("grass", "sand", "sky", "water", "snow", "brick", "wood", "stone")
            )
    assert len(set(captions.texts)) > 400
    again = make_captions(scenes[100:110], 0, torch.arange(100, 110))
    assert again.texts == captions.texts[100:110]


def test_a_dataset_captions_its_images_in_any_batch():
    data, other = (ScenesDataset("all", split, 200) for split in ("train", "test"))
    texts = data.captions(range(200))
    assert [*data.captions([7, -1]), *data.captions(torch.tensor([30]))] == [
        *(texts[7], texts[199], texts[30])
    ]
    truth = data.attributes(range(200))
    for i, text in enumerate(texts):
        for names, column in ((SHAPES, truth["shape"]), (tuple(COLOURS), truth["colour"])):
            for k, name in enumerate(names):
                assert text.replace(",", " ").split().count(name) <= int((column[i] == k).sum())
    # What is stated is drawn anew in each split.
    ends = [[" against " in text for text in data.captions(range(200))] for data in (data, other)]
    assert 60 < sum(a == b for a, b in zip(*ends, strict=True)) < 140


def _sentence_is_true(scenes, captions, i: int, j: int) -> bool:
    """Is the caption of scene j, one object, true of scene i, one object? From the words alone."""
    words = captions.texts[j].split()
    colours, backgrounds = list(COLOURS), KINDS["background"].classnames
    sizes = KINDS["size"].classnames
    place = captions.texts[j].partition(" at the ")[2].partition(" against ")[0]
    facts = [
        (set(words) & set(SHAPES), SHAPES[scenes.shape[i, 0]]),
        (set(words) & set(colours), colours[scenes.colour[i, 0]]),
        (set(words) & set(PATTERNS), PATTERNS[scenes.pattern[i, 0]]),
        (set(words) & set(sizes), sizes[scenes.size[i, 0]]),
        (set(words) & set(backgrounds), backgrounds[scenes.background[i]]),
        ({place} if place else set(), POSITIONS[scenes.position[i, 0]]),
    ]
    return all(not said or said == {fact} for said, fact in facts)


def test_caption_targets_agree_with_the_words():
    scenes = sample_scenes(3, 5, torch.arange(150), SINGLE)
    captions = make_captions(scenes, 0, torch.arange(150))
    true, unclear = caption_targets(scenes, captions)
    expected = [[_sentence_is_true(scenes, captions, i, j) for j in range(150)] for i in range(150)]
    assert torch.equal(true, torch.tensor(expected))
    assert not unclear.any()


def test_a_scene_that_holds_the_object_among_others_is_unclear():
    scenes = sample_scenes(3, 5, torch.arange(300), MIXED)
    captions = make_captions(scenes, 0, torch.arange(300))
    true, unclear = caption_targets(scenes, captions)
    assert true.diagonal().all()
    assert not (true & unclear).any()
    single = scenes.count == 1
    assert unclear.any()
    assert not unclear[single].any()  # rows: scenes of one object are never unclear
    assert not unclear[:, ~single].any()  # columns: captions of several objects neither


# --- use ---


def test_works_with_data_loader_workers():
    dataset = ScenesDataset("shape", "test", size=24)
    assert pickle.loads(pickle.dumps(dataset)).templates[0]("star") == dataset.templates[0]("star")
    loader = torch.utils.data.DataLoader(dataset, batch_size=8, num_workers=1)
    images = torch.cat([batch[0] for batch in loader])
    assert torch.equal(images, dataset.images(range(24))[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "shapes"}, "unknown kind of scenes 'shapes': expected .*shape_colour"),
        ({"split": "val"}, "split='val': expected train or test"),
        ({"image_size": 0}, "image_size must be at least 1, got 0"),
        ({"size": -1}, "must not be negative"),
    ],
)
def test_wrong_options_are_refused_in_a_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        ScenesDataset(**options)


def test_indices_out_of_range_are_refused():
    dataset = ScenesDataset("shape", "test", size=10)
    with pytest.raises(IndexError, match="10 images of scenes_shape"):
        dataset[10]
    assert torch.equal(dataset[-1][0], dataset[9][0])
    assert dataset.__getitems__([]) == []


def test_scenes_are_enlarged_for_a_clip_that_sees_more_pixels():
    """Against the bilinear enlargement, which is a blur away; truth on a grid that does not divide
    64 keeps what the 8 x 8 grid says."""
    small = ScenesDataset("shape", "test", size=8)
    large = ScenesDataset("shape", "test", size=8, image_size=224)
    images, labels = large.images(range(8))
    assert images.shape == (8, 3, 224, 224)
    assert images.dtype == torch.uint8
    assert torch.equal(labels, small.images(range(8))[1])
    drawn = small.images(range(8))[0].float()
    oracle = torch.nn.functional.interpolate(drawn, (224, 224), mode="bilinear")
    assert (images.float() - oracle).abs().mean() < 4
    coarse, fine = (
        d.patch_truth(range(8), grid)["coverage"] for d, grid in ((small, 8), (large, 14))
    )
    assert torch.allclose(coarse.mean(1), fine.mean(1), atol=0.03)
    for i in range(8):
        assert set(large.patch_truth([i], 14)["shape"].unique().tolist()) == {-1, int(labels[i])}
