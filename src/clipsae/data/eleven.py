"""The former name of `clipsae.data.published`, for configs that were written with it."""

from clipsae.data.published import *  # noqa: F403
from clipsae.data.published import DATASETS as ELEVEN  # noqa: F401
