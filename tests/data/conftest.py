"""The fixture that makes feature caches."""

from collections.abc import Callable
from pathlib import Path

import pytest

from clipsae.data.cache import Cache
from tests.data.counting import write_cache


@pytest.fixture
def cache(tmp_path: Path) -> Callable[..., Cache]:
    """Makes caches, `cache(n, ...)`, each in a folder of its own."""

    def cache(n: int, **options) -> Cache:
        return write_cache(tmp_path / f"cache-{len(list(tmp_path.iterdir()))}", n, **options)

    return cache
