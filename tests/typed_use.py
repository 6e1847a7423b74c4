"""The library as its users write it. mypy reads this file (see pyproject.toml): names that exist
only when they are asked for, and what comes back, must have the types that the docs say."""

from typing import assert_type

from torch import Tensor

from clipsae import SAE, FrozenCLIP, load
from clipsae.clip import text_classifier
from clipsae.data import ImageFolder
from clipsae.evaluation import Evaluation, evaluate
from clipsae.sae import ACTIVATIONS, Activation


@ACTIVATIONS.register("typed_use")
class Mine(Activation):
    def threshold(self, scores: Tensor) -> Tensor:
        return scores.amax(dim=-1, keepdim=True) / 2


def without_the_strongest(images: Tensor) -> Tensor:
    clip = FrozenCLIP.load("clipsae-tiny", "builtin")
    sae = load("my_sae")
    assert_type(sae, SAE)
    tokens = clip.prefix(clip.normalize(images))
    codes = sae.encode(tokens)
    assert_type(codes, Tensor)
    codes[..., codes.sum(dim=(0, 1)).argmax()] = 0
    return clip.tail(sae.decode(codes, sae.input_scale(tokens)))


def accuracy(folder: str) -> Evaluation:
    clip = FrozenCLIP.load("clipsae-tiny", "builtin")
    dataset = ImageFolder(folder, image_size=clip.image_size)
    names = text_classifier(clip, dataset.classnames)
    return evaluate(clip, {"mine": load("my_sae")}, dataset, names, ns=(1, 5))
