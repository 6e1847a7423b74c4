"""What the page is computed from, against loops and finite differences."""

import json
import math

import pytest
import torch

from clipsae.clip import FrozenCLIP
from clipsae.clip.towers import Tower
from clipsae.data.scenes import ScenesDataset
from clipsae.sae import SAE
from clipsae.visualization import collect_references
from clipsae.visualization.page.dictionary import layout, nearest, word_scores
from clipsae.visualization.page.looks import collect_looks
from clipsae.visualization.page.reasons import first_order_effects, logits_without
from clipsae.visualization.page.write import ALPHABET, MAP_LEVELS, heat_text


def test_nearest_are_those_with_the_largest_cosine():
    torch.manual_seed(0)
    rows = torch.randn(1100, 5)  # more than are compared at a time
    alive = torch.rand(1100) < 0.7
    found, cosines = nearest(rows, alive, 4)
    for m in (0, 1, 500, 1050, 1099):
        of = [
            (-torch.cosine_similarity(rows[m], rows[k], dim=0).item(), k)
            for k in range(1100)
            if alive[k] and k != m
        ]
        expected = sorted(of)[:4]
        assert found[m].tolist() == [k for _, k in expected]
        assert cosines[m].tolist() == pytest.approx([-c for c, _ in expected], abs=1e-5)
    assert nearest(rows, alive & False, 4)[0].shape == (1100, 0)


def test_the_map_is_made_of_principal_components():
    torch.manual_seed(0)
    rows = torch.randn(60, 8) * torch.tensor([9.0, 5, 1, 1, 1, 1, 1, 1])
    alive = torch.ones(60, dtype=torch.bool)
    alive[7] = False
    places = layout(rows, alive)
    assert places[7].isnan().all()
    unit = torch.nn.functional.normalize(rows[alive].double(), dim=-1)
    u, s, _ = torch.linalg.svd(unit - unit.mean(dim=0), full_matrices=False)
    expected = u[:, :2] * s[:2]
    expected = expected / expected.abs().max()
    assert torch.allclose(places[alive].double().abs(), expected.abs(), atol=1e-6)
    assert torch.equal(places.nan_to_num(), layout(rows, alive).nan_to_num())


@pytest.fixture(scope="module")
def world():
    torch.manual_seed(0)
    clip = FrozenCLIP.load("clipsae-tiny", "builtin")
    sae = SAE(clip.width, 40, "attention", "sparsemax", normalize_input=True, scale=0.1).eval()
    dataset = ScenesDataset("colour", "test", 12)
    classifier = torch.nn.functional.normalize(torch.randn(10, clip.embed_dim), dim=-1)
    return clip, sae, dataset, classifier


def test_words_are_compared_along_the_direct_path(world):
    """Exactly the tail, where the stream is the row alone and the last block does nothing."""
    clip = world[0]
    rows, words = torch.randn(3, clip.width), torch.randn(4, clip.embed_dim)
    unit = torch.nn.functional.normalize(words, dim=-1)
    unit = unit - unit.mean(dim=0)
    visual = clip.model.visual
    for m in range(3):
        direct = (visual.ln_post(rows[m]) - visual.ln_post.bias) @ visual.proj
        for w in range(4):
            expected = torch.cosine_similarity(direct, unit[w], dim=0)
            found = word_scores(clip, rows, words)[m, w]
            assert found.item() == pytest.approx(expected.item(), abs=1e-4)


def test_no_words_where_there_is_no_direct_path(world, monkeypatch):
    """SigLIP's embedding is pooled by attention."""
    clip = world[0]
    monkeypatch.setattr(clip.tower, "direct", lambda rows: Tower.direct(clip.tower, rows))
    assert word_scores(clip, torch.randn(3, clip.width), torch.randn(4, clip.embed_dim)) is None


def test_nothing_is_predicted_without_texts(world):
    clip, sae, dataset, classifier = world
    references = collect_references(clip, {"it": sae}, dataset, name="colour", split="test")["it"]
    options = {"pages": [2], "effect_images": 1, "on_image": None}
    (full,) = collect_looks(clip, sae, dataset, classifier, references, **options).images
    looks = collect_looks(clip, sae, dataset, None, references, **options)
    assert looks.effects is None
    (look,) = looks.images
    assert (look.clip, look.sae, look.why) == ([], [], None)
    assert (look.tokens, look.latents) == (full.tokens, full.latents)


@torch.no_grad()
@pytest.mark.parametrize("layer", [-2, -3])
def test_a_latent_is_taken_out_of_the_stream_alone(world, layer):
    clip, sae, dataset, classifier = world
    clip = FrozenCLIP(clip.model, name=clip.name, layer=layer)
    stream = clip.prefix(clip.normalize(dataset[0][0][None]))[0]
    codes = sae.encode(stream)
    active = (codes > 0).any(dim=0).nonzero().squeeze(1)[:5]
    found = logits_without(clip, sae, stream, codes, active, classifier)
    scale = sae.input_scale(stream)
    for i, m in enumerate(active.tolist()):
        zeroed = codes.clone()
        zeroed[:, m] = 0
        changed = stream - (sae.decode(codes, scale) - sae.decode(zeroed, scale))
        image = torch.nn.functional.normalize(clip.tail(changed[None]), dim=-1)
        expected = clip.logit_scale * (image @ classifier.T)[0]
        assert torch.allclose(found[i], expected, atol=1e-3)


@torch.no_grad()
def test_first_order_effects_are_the_slope_at_the_stream(world):
    clip, sae, dataset, classifier = world
    stream = clip.prefix(clip.normalize(dataset[1][0][None]))[0]
    codes = sae.encode(stream)
    classes = torch.tensor([4, 7])
    effects = first_order_effects(clip, sae, stream, codes, classifier, classes)
    step = 1e-3
    for m in (codes > 0).any(dim=0).nonzero().squeeze(1)[:4].tolist():
        share = codes[:, m, None] * sae.decoder_rows()[m] * sae.input_scale(stream)
        two = torch.stack((stream + step * share, stream - step * share))
        logits = clip.logits(two, classifier)[:, classes]
        slope = (logits[0] - logits[1]) / (2 * step)
        assert effects[:, m].tolist() == pytest.approx(slope.tolist(), abs=0.02, rel=0.05)


def test_looks_and_effects_of_the_images_that_are_shown(world):
    clip, sae, dataset, classifier = world
    names = {"name": "colour", "split": "test"}
    references = collect_references(clip, {"it": sae}, dataset, **names)["it"]
    pictures = {}
    options = {"pages": [0, 7], "effect_images": 2, "on_image": pictures.__setitem__}
    looks = collect_looks(clip, sae, dataset, classifier, references, **options)
    assert [look.index for look in looks.images] == [0, 7]
    assert set(pictures) == set(references.index[references.index >= 0].tolist()) | {0, 7}
    stream = clip.prefix(clip.normalize(dataset[7][0][None]))
    codes = sae.encode(stream)[0]
    look = looks.images[1]
    assert len(look.tokens) == clip.tokens
    for token, (latents, values) in enumerate(look.tokens):
        assert values == sorted(values, reverse=True)
        assert values == pytest.approx(codes[token, latents].tolist(), rel=1e-3)
        assert len(latents) == min(24, int((codes[token] > 0).sum()))
    means = codes.mean(dim=0)
    assert look.latents == [m for m in means.argsort(descending=True).tolist() if means[m] > 0][:40]
    assert sum(p for _, p in look.clip) <= 1 + 1e-6


def whole_tail(clip, stream, classifier) -> list[float]:
    """The logits of one image, by CLIP's last layers as they are."""
    image = torch.nn.functional.normalize(clip.tail(stream), dim=-1)
    return (clip.logit_scale * (image @ classifier.T)[0]).tolist()


def softmax(logits: list[float]) -> list[float]:
    most = max(logits)
    powers = [math.exp(x - most) for x in logits]
    return [x / sum(powers) for x in powers]


@torch.no_grad()
@pytest.mark.parametrize("effect_images", [1, 0])
def test_why_a_class_is_predicted(world, effect_images):
    """Each active latent taken out in turn, the whole model run again: by the logit, the margin
    over each of the five likeliest others and the probability the page has the strongest."""
    clip, sae, dataset, classifier = world
    references = collect_references(clip, {"it": sae}, dataset, name="colour", split="test")["it"]
    options = {"pages": [7], "effect_images": effect_images, "on_image": None, "why": 3}
    (look,) = collect_looks(clip, sae, dataset, classifier, references, **options).images
    why = look.why

    stream = clip.prefix(clip.normalize(dataset[7][0][None]))
    codes, scale = sae.encode(stream), sae.input_scale(stream)
    own = whole_tail(clip, stream, classifier)
    order = sorted(range(10), key=lambda k: -own[k])
    assert why.classes == order
    assert why.logits == pytest.approx([own[k] for k in order], abs=1e-3)
    assert look.clip[0][0] == order[0]
    assert math.exp(why.logits[0] - why.normaliser) == pytest.approx(look.clip[0][1], abs=1e-4)
    without = {}
    for m in (codes[0].mean(dim=0) > 0).nonzero().flatten().tolist():
        zeroed = codes.clone()
        zeroed[..., m] = 0
        changed = stream + sae.decode(zeroed, scale) - sae.decode(codes, scale)
        without[m] = whole_tail(clip, changed, classifier)
    for i, m in enumerate(why.latents):
        assert why.without[i] == pytest.approx([without[m][k] for k in order], abs=2e-3)
        p = math.exp(why.without[i][0] - why.normalisers[i])
        assert p == pytest.approx(softmax(without[m])[order[0]], abs=1e-3)
        assert why.instead[i] == max(range(10), key=lambda k: without[m][k])
        assert why.means[i] == pytest.approx(codes[0, :, m].mean().item(), rel=1e-4)
    if effect_images == 0:  # chosen to first order, maybe not quite the strongest
        assert 3 <= len(why.latents) <= 6
        return
    first = order[0]
    measures = [lambda of, k=k: of[first] - of[k] for k in order[1:6]]
    measures += [lambda of: of[first], lambda of: softmax(of)[first]]
    for measure in measures:
        effect = {m: abs(measure(own) - measure(of)) for m, of in without.items()}
        strongest = sorted(effect.values(), reverse=True)[:3]
        kept = sorted((effect[m] for m in why.latents), reverse=True)[:3]
        assert kept == pytest.approx(strongest, abs=2e-3)


@torch.no_grad()
def test_effects_on_the_true_class_are_those_of_one_latent_at_a_time(world):
    """One image, one latent, the whole model: the plain loop."""
    clip, sae, dataset, classifier = world
    references = collect_references(clip, {"it": sae}, dataset, name="colour", split="test")["it"]
    pages = [0, 3, 7, 10]
    own = references.index[:, :1].tolist()
    expected: dict[tuple[int, int], list[float]] = {}
    for index in range(len(dataset)):
        pixels, label = dataset[index]
        stream = clip.prefix(clip.normalize(pixels[None]))
        codes = sae.encode(stream)
        scale = sae.input_scale(stream)
        logits = whole_tail(clip, stream, classifier)
        rival = max((k for k in range(10) if k != label), key=lambda k: logits[k])
        for m in (codes.mean(dim=1)[0] > 0).nonzero().flatten().tolist():
            if index not in pages and own[m] != [index]:
                continue
            zeroed = codes.clone()
            zeroed[..., m] = 0
            changed = stream + sae.decode(zeroed, scale) - sae.decode(codes, scale)
            without = whole_tail(clip, changed, classifier)
            margins = [of[label] - of[rival] for of in (logits, without)]
            expected.setdefault((m, label), []).append(margins[0] - margins[1])
    options = {"pages": pages, "effect_images": 1, "on_image": None, "batch_size": 5}
    found = collect_looks(clip, sae, dataset, classifier, references, **options).effects
    pairs = list(zip(found.latent.tolist(), found.label.tolist(), strict=True))
    assert pairs == sorted(expected)
    assert found.images.tolist() == [len(expected[pair]) for pair in pairs]
    assert found.images.max() > 1
    means = [sum(expected[pair]) / len(expected[pair]) for pair in pairs]
    assert found.change.tolist() == pytest.approx(means, abs=1e-3)
    options["effect_images"] = 0
    assert collect_looks(clip, sae, dataset, classifier, references, **options).effects is None


def test_what_is_active_has_a_level_above_zero():
    heat = torch.arange(256, dtype=torch.uint8)
    levels = [ALPHABET.index(character) for character in heat_text(heat)]
    assert levels[0] == 0
    assert min(levels[1:]) == 1
    assert levels == sorted(levels)
    assert levels[-1] == MAP_LEVELS - 1
    assert len(set(ALPHABET)) == MAP_LEVELS
    assert json.loads(json.dumps(ALPHABET)) == ALPHABET
