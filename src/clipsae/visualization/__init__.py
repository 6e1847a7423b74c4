"""What each latent sees: reference images, figures, and a page to walk through a dictionary."""

from clipsae.visualization.collect import collect_references
from clipsae.visualization.references import References

__all__ = ["References", "collect_references"]
