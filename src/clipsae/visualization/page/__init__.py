"""One or several dictionaries as a static page: a folder that opens from disk or from any web
host."""

from clipsae.visualization.page.write import examine, image_content, write_page

__all__ = ["examine", "image_content", "write_page"]
