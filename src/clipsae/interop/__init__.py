"""SAEs in and out: a folder, a file or a Hugging Face id of any known format, and back.

Needs no Hydra, no Lightning, and none of the other libraries. Each of their formats is one file
that maps it to and from one form, `plain.Plain`, through the checks of `files`.
"""

from clipsae.interop.card import model_card
from clipsae.interop.hub import push_to_hub
from clipsae.interop.plain import Imported
from clipsae.interop.source import load, read

__all__ = ["Imported", "load", "model_card", "push_to_hub", "read"]
