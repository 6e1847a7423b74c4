"""What makes the host wait for a GPU, noticed with one and without."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Waits(TorchDispatchMode):
    """Notes the operations within it whose result the host needs: `.item()`, `.tolist()`,
    `bool(tensor)`, sizes that depend on numbers, copies of numbers to Python."""

    NAMES = (
        *("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select"),
        *("bincount", "unique", "_unique2", "unique_consecutive", "unique_dim", "allclose"),
        *("repeat_interleave", "histc"),
    )
    READS = ("tolist", "numpy", "cpu", "__array__")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __enter__(self) -> "Waits":
        # On CPU tensors these are no operations of the dispatcher.
        self.patches = [patch.object(torch.Tensor, name, self._noted(name)) for name in self.READS]
        for one in self.patches:
            one.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for one in self.patches:
            one.stop()

    def _noted(self, name: str) -> Any:
        method = getattr(torch.Tensor, name)

        def noted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.seen.append(name)
            return method(tensor, *args, **kwargs)

        return noted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = name in ("index", "index_put", "index_put_") and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        if name in self.NAMES or masks:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def hide_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter reads numbers where the device would: these are not the host's."""
    from clipsae.sae.engine import gpu

    launch = gpu._launch

    def unseen(*args: Any, **kwargs: Any) -> None:
        with torch.utils._python_dispatch._disable_current_modes():
            launch(*args, **kwargs)

    monkeypatch.setattr(gpu, "_launch", unseen)
    monkeypatch.setattr(gpu._Look, "__call__", lambda self: False)


@contextlib.contextmanager
def no_waits(device: str) -> Iterator[None]:
    """Where the host would wait for the device, an error is raised."""
    if device == "cpu":
        with Waits() as waits:
            yield
        if waits.seen:
            raise RuntimeError(f"the host would wait for {waits.seen}")
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
