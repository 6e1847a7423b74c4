"""A dictionary as a static page: a folder that opens from disk or from any web host."""

from clipsae.visualization.page.write import make_page

__all__ = ["make_page"]
