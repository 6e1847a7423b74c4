"""One or several dictionaries as a static page: a folder that opens from disk or from any web
host."""

from clipsae.visualization.page.write import examine, write_page

__all__ = ["examine", "write_page"]
