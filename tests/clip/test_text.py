"""The text classifier against prompts encoded one by one."""

import json
import warnings

import open_clip
import pytest
import torch

from clipsae.clip import OPENAI_IMAGENET_TEMPLATES, FrozenCLIP, text_classifier

NAMES = ["tench", "missile", "sea lion", "missile", "sunglasses"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> FrozenCLIP:
    config = {
        "embed_dim": 24,
        "vision_cfg": {
            "image_size": 16,
            "layers": 2,
            "width": 32,
            "head_width": 16,
            "patch_size": 8,
        },
        "text_cfg": {
            "context_length": 32,
            "vocab_size": 49408,
            "width": 32,
            "heads": 2,
            "layers": 2,
        },
    }
    path = tmp_path_factory.mktemp("clip") / "clipsae-test-text.json"
    path.write_text(json.dumps(config))
    open_clip.add_model_config(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return FrozenCLIP.load("clipsae-test-text", pretrained=None)


def one_by_one(clip: FrozenCLIP, name: str, templates) -> torch.Tensor:
    tokenizer = open_clip.get_tokenizer(clip.name)
    units = []
    for template in templates:
        embedding = clip.model.encode_text(tokenizer([template(name)]))[0]
        units.append(embedding / embedding.norm())
    return torch.stack(units).mean(dim=0)


@pytest.mark.parametrize("count", [1, 7, 80])
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


def test_repeated_names_keep_their_own_rows(clip):
    rows = text_classifier(clip, NAMES, ["a {}"])
    assert rows.shape == (5, clip.embed_dim)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows[1], rows[3])


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
    torch.testing.assert_close(text_classifier(clip, NAMES), theirs.T, rtol=1e-5, atol=1e-6)


def test_nothing_to_encode_is_refused(clip):
    with pytest.raises(ValueError, match="0 class names and 80 templates"):
        text_classifier(clip, [])
    with pytest.raises(ValueError, match="1 class names and 0 templates"):
        text_classifier(clip, ["tench"], [])
