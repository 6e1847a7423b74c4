"""Each latent's reference images, figures of them, and a page to walk through a dictionary."""

from clipsae.visualization.collector import collect_references
from clipsae.visualization.references import References

__all__ = ["References", "collect_references"]
