"""Reading untrusted files: none of their code runs, and nothing in them is silently dropped.

A pickle is a program. `torch.load(weights_only=True)` runs it with tensors, plain containers and
numpy's numbers as its only words; a class that a format is known to pickle becomes an `Inert`
class of its name, whose objects hold attributes and do nothing. An option or a tensor that an
importer ignores may be the one that makes the codes: `Config` and `Tensors` record what was read,
and refuse the rest by name.
"""

import io
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

# What the pickle of a number of numpy's names.
_NUMBERS: list[Any] = [
    (np.float64().__reduce__()[0], "numpy.core.multiarray.scalar"),
    (np.float64().__reduce__()[0], "numpy._core.multiarray.scalar"),
    (np.dtype, "numpy.dtype"),
    *(type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8")),
]


class Inert:
    """Stands for a pickled object of a class whose code is never imported: its attributes. The
    name of its type is that of the class."""


def read_config(path: Path) -> dict[str, Any]:
    """A JSON or YAML file, by its suffix, that holds one object.

    Raises:
        FileNotFoundError, ValueError: there is none, or it holds something else.
    """
    _check_exists(path)
    kind = "JSON" if path.suffix == ".json" else "YAML"
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if kind == "JSON" else yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is not valid {kind}: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}: expected a {kind} object")
    return content


def read_weights(path: Path, classes: Iterable[str] = (), skip: int = 0) -> Any:
    """The content of a safetensors file, or of a pickle of tensors and plain containers.

    Args:
        classes: full names of pickled classes and functions that become `Inert` classes.
        skip: bytes that stand before the pickle.

    Raises:
        FileNotFoundError, ValueError: there is none, it is damaged, or it needs other code.
    """
    _check_exists(path)
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except Exception as error:  # errors of many kinds
            raise ValueError(
                f"{path} is not a complete safetensors file: {first_line(error)}"
            ) from error
    inert: list[Any] = [(type(name.rpartition(".")[2], (Inert,), {}), name) for name in classes]
    try:
        file = io.BytesIO(path.read_bytes()[skip:]) if skip else path
        with torch.serialization.safe_globals([*_NUMBERS, *inert]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a hostile file can make the unpickler raise anything
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        if wanted is not None:
            raise ValueError(
                f"{path} is a pickle that asks for {wanted[1]}, which could run code, so it is not "
                "opened: ask its author for safetensors, or for a pickle of tensors alone"
            ) from error
        # torch's message would advise to run the code.
        reason = re.search(r"WeightsUnpickler error: (.+)", str(error))
        why = reason[1] if reason else type(error).__name__
        raise ValueError(f"{path} is not a pickle of tensors, or is damaged: {why}") from error


def _check_exists(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} holds no {path.name}: the SAE is incomplete")


def first_line(error: Exception) -> str:
    """Of an error's message, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def names(text: str) -> frozenset[str]:
    """Words as a set."""
    return frozenset(text.split())


class Config:
    """Options of a foreign config. None is an option that is not set. All errors are ValueErrors.

    Args:
        options: by name.
        where: the file, for messages.
    """

    def __init__(self, options: Any, where: Path | str) -> None:
        if not isinstance(options, Mapping):
            raise ValueError(f"{where}={options!r}: expected names and values")
        self.options = options
        self.where = where
        self._read: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        """An option's value as it is."""
        self._read.add(name)
        value = self.options.get(name)
        return default if value is None else value

    def part(self, name: str) -> "Config":
        """The options below an option; empty where it is not set."""
        return Config(self.get(name, {}), f"{self.where}: {name}")

    def whole(self, name: str) -> int:
        """A whole number above 0."""
        value = self.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{self.where}: {name}={value!r}: expected an integer of at least 1")
        return value

    def number(self, name: str) -> float:
        """A finite number, or a tensor of one."""
        value = self.get(name)
        if isinstance(value, Tensor) and value.numel() == 1:
            value = value.item()
        real = isinstance(value, int | float | np.number) and not isinstance(value, bool)
        try:
            number = float(value) if real else math.nan
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise ValueError(f"{self.where}: {name}={str(value)[:80]}: expected a number")
        return number

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise ValueError(f"{self.where}: {name}={value!r}: expected true or false")
        return value

    def choice(self, name: str, allowed: tuple[str, ...], default: str | None = None) -> str:
        """One of some names."""
        value = self.get(name, default)
        if value not in allowed:
            raise ValueError(
                f"{self.where}: {name}={value!r} has no counterpart here: expected "
                f"{' or '.join(allowed)}"
            )
        return str(value)

    def check_size(self, name: str, size: int) -> None:
        """Refuse an option that contradicts the weights."""
        if self.get(name) is not None and self.whole(name) != size:
            raise ValueError(f"{self.where}: {name}={self.get(name)}: the weights have {size}")

    def known(self, *names: str) -> dict[str, Any]:
        """Those of some options that are set."""
        return {name: self.get(name) for name in names if self.get(name) is not None}

    def refuse_others(
        self, unused: Iterable[str] = (), only: Mapping[str, tuple[Any, ...]] | None = None
    ) -> None:
        """Refuse every option that is set and was not read.

        Args:
            unused: options that do not affect what a trained SAE computes.
            only: options that are not read, by the values at which they do nothing.
        """
        for name, value in self.options.items():
            if value is None or name in self._read or name in unused:
                continue
            text = " ".join(repr(value).split())
            said = f"{self.where}: {name}={text if len(text) <= 80 else f'{text[:77]}...'}"
            if only is None or name not in only:
                raise ValueError(
                    f"{said} is an option that is not known here and may decide the codes: remove "
                    "it from the file if it does not"
                )
            plain = isinstance(value, str | bool | int | float | list | tuple | dict)
            if not plain or value not in only[name]:
                expected = " or ".join(map(str, only[name])) or "null"
                raise ValueError(f"{said} has no counterpart here: expected {expected}")


class Tensors:
    """Named tensors of a file. All errors are ValueErrors.

    Args:
        tensors: by name, a state_dict.
        where: the file, for messages.
    """

    def __init__(self, tensors: Any, where: Path | str) -> None:
        self.where = where
        if not isinstance(tensors, Mapping) or not all(
            isinstance(name, str) and isinstance(t, Tensor) for name, t in tensors.items()
        ):
            raise ValueError(f"{where}: expected tensors by name, a state_dict")
        self._tensors = tensors
        self._read: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def matrix_shape(self, name: str) -> tuple[int, int]:
        """The shape of a tensor, which must be a matrix with elements."""
        shape = tuple(self._get(name).shape)
        if len(shape) != 2 or 0 in shape:
            raise ValueError(f"{self.where}: {name} has shape {list(shape)}: expected a matrix")
        return shape[0], shape[1]

    def take(self, name: str, *shape: int) -> Tensor:
        """A tensor of finite real numbers as float32, of this shape exactly."""
        tensor = self._get(name)
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{self.where}: {name} has shape {list(tensor.shape)}: expected {list(shape)}"
            )
        if tensor.is_complex() or tensor.is_sparse:
            raise ValueError(f"{self.where}: {name} is {tensor.dtype}: expected real numbers")
        self.ignore(name)
        tensor = tensor.detach().to(torch.float32)
        check_finite(tensor, name, self.where)
        return tensor

    def linear(
        self, W_enc: str, b_enc: str | None, W_dec: str, b_dec: str | None
    ) -> dict[str, Any]:
        """The parts of a linear SAE [M, d], [M], [M, d], [d] by their names in the file; "NAME.T"
        is stored transposed, None stands for zeros."""
        encoder, decoder = W_enc.removesuffix(".T"), W_dec.removesuffix(".T")
        shape = self.matrix_shape(encoder)
        m, d = shape if encoder == W_enc else shape[::-1]
        w_enc = self.take(encoder, *shape)
        w_dec = self.take(decoder, m, d) if decoder == W_dec else self.take(decoder, d, m).T
        return {
            "W_enc": w_enc if encoder == W_enc else w_enc.T,
            "b_enc": torch.zeros(m) if b_enc is None else self.take(b_enc, m),
            "W_dec": w_dec,
            "b_dec": torch.zeros(d) if b_dec is None else self.take(b_dec, d),
        }

    def ignore(self, *names: str) -> None:
        """Tensors that are known not to affect the codes."""
        self._read.update(names)

    def refuse_others(self) -> None:
        """Refuse what was not read: it may affect the codes, as a skip connection does."""
        left = sorted(set(self._tensors) - self._read)
        if left:
            raise ValueError(
                f"{self.where}: {', '.join(left[:8])} is not known here and may decide the codes: "
                "leave it out of the file if it does not"
            )

    def _get(self, name: str) -> Tensor:
        if name not in self._tensors:
            held = ", ".join(sorted(self._tensors)[:8]) or "nothing"
            raise ValueError(f"{self.where} holds no {name}: it holds {held}")
        return self._tensors[name]


def check_finite(tensor: Tensor, name: str, where: Path | str) -> None:
    """Raises ValueError where a tensor holds NaN or infinity."""
    wrong = int((~tensor.isfinite()).sum())
    if wrong:
        raise ValueError(
            f"{where}: {name} holds {wrong:,} numbers that are NaN or infinite: its training "
            "failed, or the file is damaged"
        )
