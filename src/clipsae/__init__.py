"""Sparse autoencoders on the token features of a frozen CLIP.

As a library: images to sparse codes, codes back to tokens, and what CLIP makes of them after an
intervention. (Here a random SAE on the built-in CLIP; `load` also takes a Hugging Face id.)

>>> import torch
>>> from clipsae import SAE, FrozenCLIP, load
>>> clip = FrozenCLIP.load("clipsae-tiny", "builtin")
>>> SAE(d=clip.width, latents=512, activation="topk", k=8).save("my_sae")
>>> sae = load("my_sae")
>>> images = torch.randint(256, (4, 3, clip.image_size, clip.image_size), dtype=torch.uint8)
>>> tokens = clip.prefix(clip.normalize(images))  # [B, T, d]
>>> codes = sae.encode(tokens)  # [B, T, M], 8 latents a token
>>> tuple(codes.shape), int((codes > 0).sum(dim=-1).max())
((4, 65, 512), 8)
>>> codes[..., codes.sum(dim=(0, 1)).argmax()] = 0  # without the latent that acts most
>>> changed = sae.decode(codes, sae.input_scale(tokens))  # [B, T, d]
>>> tuple(clip.tail(changed).shape)  # image embeddings, to compare with texts
(4, 128)
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clipsae.clip import FrozenCLIP
    from clipsae.data import read_image
    from clipsae.interop import load, push_to_hub
    from clipsae.sae import SAE
    from clipsae.tasks.dictionary import load_dictionary

__version__ = "0.1.0"
__all__ = ["SAE", "FrozenCLIP", "load", "load_dictionary", "push_to_hub", "read_image"]

_WHERE = {
    "FrozenCLIP": "clipsae.clip",
    "SAE": "clipsae.sae",
    "load": "clipsae.interop",
    "load_dictionary": "clipsae.tasks.dictionary",
    "push_to_hub": "clipsae.interop",
    "read_image": "clipsae.data",
}


def __getattr__(name: str) -> Any:
    # torch takes seconds to import: `import clipsae` alone waits for nothing.
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_WHERE]
