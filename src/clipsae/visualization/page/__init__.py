"""A dictionary as a static page: a folder that opens from disk or from any web host."""

from clipsae.visualization.page.write import Words, write_page

__all__ = ["Words", "write_page"]
