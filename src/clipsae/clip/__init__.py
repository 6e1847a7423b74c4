"""The frozen CLIP: `prefix` to the tokens, `tail` to the embedding, and the text classifier."""

from clipsae.clip.frozen import FrozenCLIP
from clipsae.clip.text import OPENAI_IMAGENET_TEMPLATES, text_classifier

__all__ = ["OPENAI_IMAGENET_TEMPLATES", "FrozenCLIP", "text_classifier"]
