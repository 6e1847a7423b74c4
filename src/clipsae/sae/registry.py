"""Names of an SAE's parts, and the options that each declares.

A new variant is one file with a decorated class; from outside the package, too:

    from clipsae.sae import ACTIVATIONS, Activation

    @ACTIVATIONS.register("identity")
    class Identity(Activation):
        def __init__(self, latents: int, *, gain: float = 1.0): ...
"""

import inspect
from collections.abc import Callable
from typing import Any

from clipsae.sae.checks import near


class Registry(dict[str, type[Any]]):
    """Classes by name.

    Args:
        kind: what the classes are, for messages ("activation").
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def register(self, name: str) -> Callable[[type], type]:
        """Class decorator: registers the class under `name`.

        Raises:
            ValueError: the name is taken by another class.
        """

        def decorate(cls: type) -> type:
            taken = self.get(name)
            # The same class again is a reloaded module, not a clash.
            if taken is not None and taken.__qualname__ != cls.__qualname__:
                raise ValueError(f"{self.kind} '{name}' is taken by {taken.__qualname__}")
            self[name] = cls
            return cls

        return decorate

    def __getitem__(self, name: str) -> type[Any]:
        if not isinstance(name, str) or name not in self:
            raise ValueError(
                f"{self.kind}={name!r} does not exist: choose one of {', '.join(sorted(self))}"
                f"{near(name, self)}"
            )
        return super().__getitem__(name)

    def options(self, name: str) -> dict[str, Any]:
        """The options that a class declares (its keyword-only arguments), with their defaults.

        Where it takes `**options`, those of its base class, too.
        An option without a default has `inspect.Parameter.empty`.
        """
        found: dict[str, Any] = {}
        for cls in self[name].__mro__:
            if "__init__" not in vars(cls):
                continue
            parameters = inspect.signature(vars(cls)["__init__"]).parameters.values()
            found = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY} | found
            if all(p.kind is not p.VAR_KEYWORD for p in parameters):
                break
        return found


ARCHITECTURES = Registry("architecture")
ACTIVATIONS = Registry("activation")
OBJECTIVES = Registry("objective")
