"""Image encoders: preprocessing, what they are made from, and the ground truth's concepts."""

import pytest
import torch

from clipsae.clip import FrozenCLIP
from clipsae.data.scenes import BACKGROUNDS, COLOURS, SHAPES, ScenesDataset
from clipsae.errors import ConfigError
from clipsae.evaluation.encoders import ImageEncoder, image_encoder
from clipsae.evaluation.truth import (
    IMAGE_ATTRIBUTES,
    PATCH_ATTRIBUTES,
    concept_names,
    image_concepts,
    patch_concepts,
)

MEAN, STD = (0.5, 0.4, 0.3), (0.1, 0.2, 0.4)


@pytest.fixture(scope="module")
def scenes():
    return ScenesDataset(kind="all", split="test", size=40)


def pictures(scenes, n=4):
    return scenes.images(range(n))[0]


def test_preprocessing_resizes_and_normalises():
    encoder = ImageEncoder("x", torch.nn.Identity(), lambda x: x, (10, 12), MEAN, STD)
    images = torch.full((2, 3, 6, 6), 51, dtype=torch.uint8)
    out = encoder(images)
    assert out.shape == (2, 3, 10, 12)
    assert torch.allclose(out[0, :, 0, 0], torch.tensor([-3.0, -1.0, -0.25]))
    right = torch.randint(0, 256, (2, 3, 10, 12), dtype=torch.uint8)
    assert torch.allclose(encoder(right) * encoder.std + encoder.mean, right / 255, atol=1e-6)
    edge = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    edge[..., 4:] = 255
    out = encoder(edge) * encoder.std + encoder.mean
    assert out.min() >= -1e-6
    assert out.max() <= 1 + 1e-6
    with pytest.raises(ValueError, match="uint8"):
        encoder(edge.float())


def test_the_tiny_clip_is_its_own_embedding(scenes):
    encoder = image_encoder("tiny")
    clip = FrozenCLIP.load("clipsae-tiny", "builtin")
    images = pictures(scenes)
    expected = clip.encode_image(clip.normalize(images))
    assert torch.allclose(encoder(images, torch.arange(4)), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "size"), [("timm:test_vit/random", 64), ("open_clip:ViT-S-32-alt/random", 256)]
)
def test_other_libraries_models(scenes, name, size):
    state = torch.random.get_rng_state()
    with pytest.warns(UserWarning, match="RANDOM WEIGHTS"):
        encoder = image_encoder(name)
    assert torch.equal(torch.random.get_rng_state(), state)
    out = encoder(pictures(scenes), torch.arange(4))
    assert out.shape == (4, size)
    assert out.dtype == torch.float32
    assert not any(p.requires_grad for p in encoder.parameters())
    assert not encoder.training


@pytest.mark.parametrize(
    "name", ["clip", "open_clip:ViT-B-32", "timm:", "huggingface:x/y", "open_clip:/openai"]
)
def test_invalid_names_are_refused(name):
    with pytest.raises(ConfigError, match="open_clip:MODEL/WEIGHTS"):
        image_encoder(name)


def test_unknown_models_are_refused(scenes):
    for name in ("timm:no_such_model/random", "open_clip:no-such/random"):
        with (
            pytest.warns(UserWarning, match="RANDOM"),
            pytest.raises(ConfigError, match="cannot be loaded"),
        ):
            image_encoder(name)
    with pytest.raises(ConfigError, match="ground truth"):
        image_encoder("attributes", object())


def test_image_concepts_are_what_is_in_the_image(scenes):
    names = concept_names(IMAGE_ATTRIBUTES)
    found = image_concepts(scenes, torch.arange(40))
    assert found.shape == (40, len(names))
    truth = scenes.attributes(range(40))
    for i in range(40):
        expected = {f"shape={SHAPES[s]}" for s in truth["shape"][i].tolist() if s >= 0}
        assert {n for n, f in zip(names, found[i], strict=True) if f and "shape" in n} == expected
        counts = found[i, [names.index(f"count={c}") for c in ("one", "two", "three")]]
        assert counts.tolist() == [truth["count"][i] == c for c in (1, 2, 3)]


def test_patch_concepts_are_an_object_or_the_background(scenes):
    names = concept_names(PATCH_ATTRIBUTES)
    found = patch_concepts(scenes, torch.arange(10), 8)
    assert found.shape == (10, 64, len(names))
    truth = scenes.patch_truth(range(10), grid=8)
    background = scenes.attributes(range(10))["background"]
    colours = list(COLOURS)
    for i in range(10):
        for p in range(64):
            here = {n for n, f in zip(names, found[i, p], strict=True) if f}
            if truth["object"][i, p] < 0:
                assert here == {f"background={BACKGROUNDS[background[i]]}"}
            else:
                assert len(here) == 4
                assert f"colour={colours[truth['colour'][i, p]]}" in here


def test_attributes_as_an_encoder(scenes):
    encoder = image_encoder("attributes", scenes)
    out = encoder(pictures(scenes), torch.arange(4))
    assert torch.allclose(out.norm(dim=1), torch.ones(4))
    assert torch.equal(out > 0, image_concepts(scenes, torch.arange(4)))
