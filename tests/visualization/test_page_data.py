"""What the page is computed from, against loops and finite differences."""

import base64
import json
import math
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from clipsae.clip import FrozenCLIP
from clipsae.evaluation.interventions import Interventions
from clipsae.naming.names import Names
from clipsae.naming.vocabulary import Vocabulary
from clipsae.sae import SAE
from clipsae.visualization.page import examine, write_page
from clipsae.visualization.page.dictionary import by_chance, layout, nearest
from clipsae.visualization.page.images import collect_activations
from clipsae.visualization.page.meaning import compressed
from clipsae.visualization.page.write import ALPHABET, MAP_LEVELS, heat_text


def test_nearest_are_those_with_the_largest_cosine():
    torch.manual_seed(0)
    rows = torch.randn(1100, 5)  # more than are compared at a time
    alive = torch.rand(1100) < 0.7
    found, cosines = nearest(rows, alive, 4)
    for m in (0, 1, 500, 1050, 1099):
        others = [
            (-torch.cosine_similarity(rows[m], rows[k], dim=0).item(), k)
            for k in range(1100)
            if alive[k] and k != m
        ]
        expected = sorted(others)[:4]
        assert found[m].tolist() == [k for _, k in expected]
        assert cosines[m].tolist() == pytest.approx([-c for c, _ in expected], abs=1e-5)
    assert nearest(rows, alive & False, 4)[0].shape == (1100, 0)


def test_counterparts_lie_among_the_rows_of_another():
    torch.manual_seed(0)
    rows, others = torch.randn(30, 8), torch.randn(50, 8)
    others[20] = 3 * rows[4]
    alive = torch.ones(50, dtype=torch.bool)
    found, cosines = nearest(rows, alive, 1, among=others)
    for m in range(30):
        cosine = torch.cosine_similarity(rows[m, None], others, dim=1)
        assert found[m].item() == int(cosine.argmax())
        assert cosines[m].item() == pytest.approx(cosine.max().item(), abs=1e-5)
    assert found[4].item() == 20
    alive[20] = False
    assert nearest(rows, alive, 1, among=others)[0][4].item() != 20
    # Of directions in the plane, one is within 9 degrees of four that are at right angles to each
    # other a fifth of the time.
    four = torch.tensor([[1.0, 0], [0, 2], [-3, 0], [0, -1]])
    assert by_chance(four) == pytest.approx(math.cos(math.pi / 80), abs=3e-4)
    assert by_chance(four[:0]) == 1


def test_few_dimensions_of_8_bits_find_what_whole_embeddings_find():
    """Latents that lie near words, in 96 dimensions of which 40 matter."""
    torch.manual_seed(0)
    directions = torch.randn(40, 96)
    words = torch.nn.functional.normalize(torch.randn(200, 40) @ directions + 3, dim=-1)
    latents = words[torch.randint(200, (500,))] + 0.05 * torch.randn(500, 40) @ directions / 9
    latents = torch.nn.functional.normalize(latents - 0.2, dim=-1)
    latents[3] = 0
    nothing = torch.zeros(500)
    names = Names(
        *(Vocabulary([str(i) for i in range(200)], words), nothing[:, None].long()),
        *(nothing[:, None], [""] * 500, nothing, nothing, nothing, nothing),
        *(0.5, "clip", "nobody", latents),
    )
    small, of = compressed(names)
    assert small.values.dtype == torch.int8
    assert of.values.shape == (500, 64)
    rows = small.values.double() * small.scales.double()[:, None]
    cosines = rows @ (of.values.double() * of.scales.double()[:, None]).T
    for w in range(0, 200, 20):
        expected = names.find(str(w), 10)
        assert [cosines[w, m].item() for m, _ in expected] == pytest.approx(
            [cosine for _, cosine in expected], abs=0.02
        )
        assert int(cosines[w].argmax()) in [m for m, _ in expected[:2]]
    assert cosines[:, 3].eq(0).all()


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


def collected(world, classifier=..., **options):
    """The images with a page, and the effects."""
    classifier = world.classifier if classifier is ... else classifier
    options = {"on_image": None, **options}
    return collect_activations(
        world.clip, world.sae, world.dataset, classifier, world.references, **options
    )


def encoded(world, index):
    """An image's stream [1, T, d] and codes [1, T, M]."""
    stream = world.clip.prefix(world.clip.normalize(world.dataset[index][0][None]))
    return stream, world.sae.encode(stream)


def logits_of(world, stream) -> list[float]:
    """The logits of one image, by CLIP's last layers as they are."""
    image = torch.nn.functional.normalize(world.clip.tail(stream), dim=-1)
    return (world.clip.logit_scale * (image @ world.classifier.T)[0]).tolist()


def logits_with(world, stream, codes, changed) -> list[float]:
    """The same when the codes are others and the rest of the stream stays."""
    sae, scale = world.sae, world.sae.input_scale(stream)
    return logits_of(world, stream + sae.decode(changed, scale) - sae.decode(codes, scale))


def logits_without(world, stream, codes, latent) -> list[float]:
    zeroed = codes.clone()
    zeroed[..., latent] = 0
    return logits_with(world, stream, codes, zeroed)


def test_nothing_is_predicted_without_texts(world):
    options = {"pages": [2], "effect_images": 1}
    (full,), _ = collected(world, **options)
    (image,), effects = collected(world, None, **options)
    assert effects is None
    assert (image.clip, image.sae, image.why) == ([], [], None)
    assert (image.tokens, image.latents) == (full.tokens, full.latents)


@torch.no_grad()
@pytest.mark.parametrize("layer", [-2, -3, "layer_norm"])
def test_a_latent_is_taken_out_of_the_stream_alone(world, layer):
    sae = world.sae
    if layer == "layer_norm":  # of which each token has a mean, too
        torch.manual_seed(0)
        layer, sae = -2, SAE(sae.d, 40, activation="topk", k=4, normalize="layer_norm").eval()
    clip = FrozenCLIP(world.clip.model, name=world.clip.name, layer=layer)
    other = SimpleNamespace(**{**vars(world), "clip": clip, "sae": sae})
    stream, codes = encoded(other, 0)
    active = (codes[0] > 0).any(dim=0).nonzero().squeeze(1)[:5]
    interventions = Interventions(clip, sae, world.classifier)
    found = interventions.logits_without(stream[0], codes[0], active)
    for i, m in enumerate(active.tolist()):
        without = logits_without(other, stream, codes, m)
        assert found[i].tolist() == pytest.approx(without, abs=1e-3)
        steered = interventions.steered_logits(world.dataset[0][0], {m: 0.0})
        assert steered.tolist() == pytest.approx(without, abs=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("hook", ["attn_out", "mlp_out", "embedding"])
def test_latents_are_taken_out_of_the_tokens_at_a_hook(world, hook):
    """Of all versions by the tail of the whole tokens; as set codes; and to first order."""
    clip, sae = FrozenCLIP(world.clip.model, name=world.clip.name, hook=hook), world.sae
    image = world.dataset[0][0]
    tokens, context = clip.prefix(clip.normalize(image[None]), with_context=True)
    codes, scale = sae.encode(tokens), sae.input_scale(tokens)
    beside = None if context is None else context[0]
    active = (codes[0] > 0).any(dim=0).nonzero().squeeze(1)[:4]
    interventions = Interventions(clip, sae, world.classifier)
    found = interventions.logits_without(tokens[0], codes[0], active, beside)
    classes = torch.arange(3)
    slopes = interventions.first_order_effects(tokens[0], codes[0], classes, beside)
    whole = sae.decode(codes, scale)
    for i, m in enumerate(active.tolist()):
        fewer = codes.clone()
        fewer[..., m] = 0
        change = sae.decode(fewer, scale) - whole
        expected = clip.logits(tokens + change, world.classifier, context)[0]
        assert found[i].tolist() == pytest.approx(expected.tolist(), abs=1e-3)
        steered = interventions.steered_logits(image, {m: 0.0})
        assert steered.tolist() == pytest.approx(expected.tolist(), abs=1e-3)
        ends = [
            clip.logits(tokens + step * change, world.classifier, context)[0, :3]
            for step in (-1e-3, 1e-3)
        ]
        slope = (ends[0] - ends[1]) / 2e-3
        assert slopes[:, m].tolist() == pytest.approx(slope.tolist(), rel=0.02, abs=2e-2)
    other = SimpleNamespace(**{**vars(world), "clip": clip})
    (shown,), _ = collected(other, pages=[0], effect_images=0)
    rebuilt = clip.logits(whole, world.classifier, context)[0].softmax(dim=-1)
    for k, probability in shown.sae:
        assert probability == pytest.approx(rebuilt[k].item(), abs=1e-4)


@torch.no_grad()
def test_codes_are_set_and_the_rest_of_the_stream_stays(world):
    interventions = Interventions(world.clip, world.sae, world.classifier)
    stream, codes = encoded(world, 0)
    best = int(codes.mean(dim=1)[0].argmax())
    changed = codes.clone()
    changed[..., best] = 0
    changed[..., 5] = 0.7
    for strengths, wanted in (({}, codes), ({best: 0.0, 5: 0.7}, changed)):
        found = interventions.steered_logits(world.dataset[0][0], strengths).tolist()
        assert found == pytest.approx(logits_with(world, stream, codes, wanted), abs=1e-3)
    with pytest.raises(ValueError, match="expected 0 to 39"):
        interventions.steered_logits(world.dataset[0][0], {40: 1.0})


@torch.no_grad()
def test_first_order_effects_are_the_slope_at_the_stream(world):
    stream, codes = (x[0] for x in encoded(world, 1))
    classes = torch.tensor([4, 7])
    interventions = Interventions(world.clip, world.sae, world.classifier)
    effects = interventions.first_order_effects(stream, codes, classes)
    step = 1e-3
    for m in (codes > 0).any(dim=0).nonzero().squeeze(1)[:4].tolist():
        share = codes[:, m, None] * world.sae.decoder_rows()[m] * world.sae.input_scale(stream)
        two = torch.stack((stream + step * share, stream - step * share))
        logits = world.clip.logits(two, world.classifier)[:, classes]
        slope = (logits[0] - logits[1]) / (2 * step)
        assert effects[:, m].tolist() == pytest.approx(slope.tolist(), abs=0.02, rel=0.05)


def test_activations_of_the_images_that_are_shown(world):
    pictures, index = {}, world.references.index
    options = {"pages": [0, 7], "effect_images": 2, "on_image": pictures.__setitem__}
    images, _ = collected(world, **options)
    assert [image.index for image in images] == [0, 7]
    assert set(pictures) == set(index[index >= 0].tolist()) | {0, 7}
    codes = encoded(world, 7)[1][0]
    image = images[1]
    assert len(image.tokens) == world.clip.tokens
    for token, (latents, values) in enumerate(image.tokens):
        assert values == sorted(values, reverse=True)
        assert values == pytest.approx(codes[token, latents].tolist(), rel=1e-3)
        assert len(latents) == min(24, int((codes[token] > 0).sum()))
    means = codes.mean(dim=0)
    order = means.argsort(descending=True).tolist()
    assert image.latents == [m for m in order if means[m] > 0][:40]
    assert sum(p for _, p in image.clip) <= 1 + 1e-6


def softmax(logits: list[float]) -> list[float]:
    most = max(logits)
    powers = [math.exp(x - most) for x in logits]
    return [x / sum(powers) for x in powers]


@torch.no_grad()
@pytest.mark.parametrize("effect_images", [1, 0])
def test_why_a_class_is_predicted(world, effect_images):
    """Each active latent taken out in turn, the whole model run again: by the logit, the margin
    over each of the five likeliest others and the probability the page has the strongest."""
    options = {"pages": [7], "effect_images": effect_images, "why": 3}
    (image,), _ = collected(world, **options)
    why = image.why
    stream, codes = encoded(world, 7)
    own = logits_of(world, stream)
    order = sorted(range(10), key=lambda k: -own[k])
    assert why.classes == order
    assert why.logits == pytest.approx([own[k] for k in order], abs=1e-3)
    assert image.clip[0][0] == order[0]
    assert math.exp(why.logits[0] - why.normaliser) == pytest.approx(image.clip[0][1], abs=1e-4)
    active = (codes[0].mean(dim=0) > 0).nonzero().flatten().tolist()
    without = {m: logits_without(world, stream, codes, m) for m in active}
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
    measures = [lambda logits, k=k: logits[first] - logits[k] for k in order[1:6]]
    measures += [lambda logits: logits[first], lambda logits: softmax(logits)[first]]
    for measure in measures:
        effect = {m: abs(measure(own) - measure(without[m])) for m in without}
        strongest = sorted(effect.values(), reverse=True)[:3]
        kept = sorted((effect[m] for m in why.latents), reverse=True)[:3]
        assert kept == pytest.approx(strongest, abs=2e-3)


@torch.no_grad()
def test_effects_on_the_true_class_are_those_of_one_latent_at_a_time(world):
    """One image, one latent, the whole model: the plain loop."""
    pages, own = [0, 3, 7, 10], world.references.index[:, :1].tolist()
    expected: dict[tuple[int, int], list[float]] = {}
    for index in range(len(world.dataset)):
        label = world.dataset[index][1]
        stream, codes = encoded(world, index)
        logits = logits_of(world, stream)
        rival = max((k for k in range(10) if k != label), key=lambda k: logits[k])
        for m in (codes.mean(dim=1)[0] > 0).nonzero().flatten().tolist():
            if index not in pages and own[m] != [index]:
                continue
            without = logits_without(world, stream, codes, m)
            margins = [found[label] - found[rival] for found in (logits, without)]
            expected.setdefault((m, label), []).append(margins[0] - margins[1])
    _, found = collected(world, pages=pages, effect_images=1, batch_size=5)
    pairs = list(zip(found.latent.tolist(), found.label.tolist(), strict=True))
    assert pairs == sorted(expected)
    assert found.images.tolist() == [len(expected[pair]) for pair in pairs]
    assert found.images.max() > 1
    means = [sum(expected[pair]) / len(expected[pair]) for pair in pairs]
    assert found.change.tolist() == pytest.approx(means, abs=1e-3)
    assert collected(world, pages=pages, effect_images=0)[1] is None


def test_what_is_active_has_a_level_above_zero():
    heat = torch.arange(256, dtype=torch.uint8)
    levels = [ALPHABET.index(character) for character in heat_text(heat)]
    assert levels[0] == 0
    assert min(levels[1:]) == 1
    assert levels == sorted(levels)
    assert levels[-1] == MAP_LEVELS - 1
    assert len(set(ALPHABET)) == MAP_LEVELS
    assert json.loads(json.dumps(ALPHABET)) == ALPHABET


FROZEN = Path(__file__).with_name("frozen_page.json")


def page_data(world, folder: Path) -> dict:
    """A sample of the data scripts of a page, by name."""
    examined = examine(
        folder,
        world.clip,
        world.sae,
        world.dataset,
        world.references,
        about={"SAE": "random weights"},
        classifier=world.classifier,
        ranking={0: [3, 1], 2: [5, 3]},
        pages=2,
        effect_images=1,
        neighbours=2,
    )
    names = [f"file {i}" for i in range(12)]
    write_page(folder, {"it": examined}, title="a page", thumbnails=True, names=names)
    scripts = {
        str(file.relative_to(folder / "data")): json.loads(file.read_text().split(",", 1)[1][:-3])
        for file in sorted(folder.glob("data/**/*.js"))
    }
    columns = scripts["0/dictionary.js"]["columns"]
    for name, (kind, text) in columns.items():
        values = np.frombuffer(base64.b64decode(text), f"<{kind}4")[:10]
        columns[name] = [round(x, 4) for x in values.tolist()]
    latents = json.loads(zlib.decompress(base64.b64decode(scripts["0/latents/0.js"])))
    scripts["0/latents/0.js"] = latents[:3]
    (first, second) = [name for name in scripts if "looks/" in name]
    del scripts[second]
    scripts[first]["tokens"] = scripts[first]["tokens"][:3]
    scripts[first]["why"]["without"] = scripts[first]["why"]["without"][:3]
    return scripts


def check_same(found, expected, at="") -> None:
    assert type(found) is type(expected), at
    if isinstance(found, dict):
        assert found.keys() == expected.keys(), at
        for key in found:
            check_same(found[key], expected[key], f"{at}/{key}")
    elif isinstance(found, list):
        assert len(found) == len(expected), at
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            check_same(a, b, f"{at}/{i}")
    elif isinstance(found, float):
        assert found == pytest.approx(expected, rel=6e-3, abs=2e-3, nan_ok=True), at
    elif not at.partition("maps/")[1]:  # a patch may get the next level on another processor
        assert found == expected, at


def test_the_data_of_a_page_are_what_they_were(world, tmp_path):
    """To freeze them again, after a change that is meant to show: delete the file, run the test."""
    found = page_data(world, tmp_path)
    if not FROZEN.exists():
        FROZEN.write_text(json.dumps(found, separators=(",", ":")) + "\n")
    check_same(found, json.loads(FROZEN.read_text()))
