"""Names of latents by a model that looks at their examples."""

from clipsae.naming.explainers.base import EXPLAINERS, Evidence, Example, Explainer
from clipsae.naming.explainers.openai import OpenAI
from clipsae.naming.explainers.oracle import Oracle
from clipsae.naming.explainers.recording import Answers, Recording

__all__ = [
    "EXPLAINERS",
    "Answers",
    "Evidence",
    "Example",
    "Explainer",
    "OpenAI",
    "Oracle",
    "Recording",
]
