"""Four operations on sparse codes, and sums of them, and what computes these on each device.

| operation          | of codes Z [N, M] at p pairs, X [N, d], rows W [M, d]                     |
|--------------------|---------------------------------------------------------------------------|
| find               | the scores X W^T + b where an activation has codes: `above` a threshold,   |
|                    | the k `largest` of each token or of all, above the one of `sparsemax`      |
| mix                | Z W: codes to tokens                                                      |
| sample             | X W^T at the pairs of Z: the gradient of codes                            |
| accumulate         | Z^T X: the gradient of a dictionary                                       |
| sums               | of values over each latent or token: methods of the codes                 |

A dense product costs N M d; these cost p d. `reference` has each as its formula and runs wherever
torch does, `cpu` and `gpu` compute the same in the way that their devices like; `switch` says where
dense products are faster. A backend for another device is a subclass of `Reference`, a line in
`BACKENDS`, and a share in `switch.DENSE_FROM`.
"""

from collections.abc import Callable

from torch import Tensor

from clipsae.sae.engine.cpu import CPU
from clipsae.sae.engine.reference import Reference


def _gpu() -> type[Reference]:
    from clipsae.sae.engine.gpu import GPU  # imports Triton

    return GPU


BACKENDS: dict[str, Callable[[], type[Reference]]] = {"cpu": lambda: CPU, "cuda": _gpu}
"""By type of device. On others dense products are used."""


def backend(like: Tensor) -> type[Reference]:
    """What computes the operations on a tensor's device."""
    return BACKENDS.get(like.device.type, lambda: Reference)()
