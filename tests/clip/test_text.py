"""The text classifier against prompts encoded one by one."""

import open_clip
import pytest
import torch

from clipsae.clip import OPENAI_IMAGENET_TEMPLATES, FrozenCLIP, text_classifier
from tests.clip.conftest import load_random

NAMES = ["tench", "missile", "sea lion", "missile", "sunglasses"]


@pytest.fixture(scope="module")
def clip(register) -> FrozenCLIP:
    return load_random(register("clipsae-test-text"))


def one_by_one(clip: FrozenCLIP, name: str, templates) -> torch.Tensor:
    tokenizer = open_clip.get_tokenizer(clip.name)
    units = []
    for template in templates:
        embedding = clip.model.encode_text(tokenizer([template(name)]))[0]
        units.append(embedding / embedding.norm())
    return torch.stack(units).mean(dim=0)


@pytest.mark.parametrize("count", [1, 7])
def test_rows_are_means_of_unit_prompts(clip, count):
    templates = OPENAI_IMAGENET_TEMPLATES[:count]
    plain = torch.stack([one_by_one(clip, name, templates) for name in NAMES])
    unit = plain / plain.norm(dim=1, keepdim=True)
    torch.testing.assert_close(text_classifier(clip, NAMES, templates), unit, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        text_classifier(clip, NAMES, templates, renormalize=False), plain, rtol=1e-4, atol=1e-6
    )


def test_strings_are_templates_too_and_none_means_openais(clip):
    strings = text_classifier(clip, NAMES, ["a photo of a {}.", "the {}"])
    callables = text_classifier(clip, NAMES, [lambda c: f"a photo of a {c}.", lambda c: f"the {c}"])
    assert torch.equal(strings, callables)
    names = NAMES[:2]
    expected = text_classifier(clip, names, OPENAI_IMAGENET_TEMPLATES)
    assert torch.equal(text_classifier(clip, names, None), expected)


def test_classes_are_encoded_in_small_batches_that_are_told(clip, monkeypatch):
    sizes = []
    encode = clip.encode_text

    def watched(texts, normalize=False):
        sizes.append(len(texts))
        return encode(texts, normalize)

    monkeypatch.setattr(clip, "encode_text", watched)
    said = []
    text_classifier(clip, ["x"] * 50, progress=lambda *done: said.append(done))
    assert sum(sizes) == 50 * 80
    assert max(sizes) <= 256
    assert said == [(min(n, 50), 50) for n in range(3, 52, 3)]


def test_rows_are_open_clips(clip):
    theirs = open_clip.build_zero_shot_classifier(
        clip.model, clip.tokenizer, NAMES, OPENAI_IMAGENET_TEMPLATES, 3
    )
    rows = text_classifier(clip, NAMES)
    torch.testing.assert_close(rows, theirs.T, rtol=1e-5, atol=1e-6)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows[1], rows[3])  # of one name


def test_nothing_to_encode_is_refused(clip):
    with pytest.raises(ValueError, match="0 class names and 80 templates"):
        text_classifier(clip, [])
    with pytest.raises(ValueError, match="1 class names and 0 templates"):
        text_classifier(clip, ["tench"], [])
