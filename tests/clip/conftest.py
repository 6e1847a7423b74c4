"""Small models of open_clip."""

import json
import warnings

import open_clip
import pytest

from clipsae.clip import FrozenCLIP


@pytest.fixture(scope="session")
def register(tmp_path_factory):
    """Makes open_clip know a CLIP of 32 pixels with the given vision settings; returns its name."""
    folder = tmp_path_factory.mktemp("configs")

    def register(name: str = "", quick_gelu: bool = False, **vision) -> str:
        name = name or "clipsae-test-" + "-".join(f"{k}={v}" for k, v in vision.items())
        sizes = {"image_size": 32, "layers": 3, "width": 32, "head_width": 16, "patch_size": 8}
        text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
        config = {"embed_dim": 24, "vision_cfg": {**sizes, **vision}, "text_cfg": text}
        (folder / f"{name}.json").write_text(json.dumps({**config, "quick_gelu": quick_gelu}))
        open_clip.add_model_config(folder / f"{name}.json")
        return name

    return register


def load_random(name: str, layer: int = -2, **options) -> FrozenCLIP:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return FrozenCLIP.load(name, pretrained=None, layer=layer, **options)
