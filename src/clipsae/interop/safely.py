"""Reading files of strangers: no code of theirs runs, and what is wrong is said in one sentence.

A pickle is a program. `torch.load(weights_only=True)` runs it with tensors and plain containers
as its only words; a class that a format is known to pickle becomes an `Inert` object, which holds
attributes and does nothing.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor


class Inert:
    """Stands for a pickled object of a class whose code is never imported: its attributes."""


def read_config(path: Path) -> dict[str, Any]:
    """A JSON or YAML file, by its suffix, that holds one object.

    Raises:
        FileNotFoundError, ValueError: there is none, or it holds something else.
    """
    _there(path)
    kind = "JSON" if path.suffix == ".json" else "YAML"
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if kind == "JSON" else yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is no {kind}: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}: expected a {kind} object")
    return content


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        FileNotFoundError, ValueError: there is none, or it is damaged.
    """
    _there(path)
    try:
        return load_file(path)
    except Exception as error:  # its reader has errors of its own, of several kinds
        raise ValueError(f"{path} is no whole safetensors file: {_line(error)}") from error


def read_pickle(path: Path, classes: Iterable[str] = ()) -> Any:
    """What `torch.save` wrote, of tensors and plain containers.

    Args:
        classes: full names of classes that become `Inert`.

    Raises:
        FileNotFoundError, ValueError: there is none, it is damaged, or it asks for any other code.
    """
    _there(path)
    try:
        with torch.serialization.safe_globals([(Inert, name) for name in classes]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a hostile file can make the unpickler raise anything
        asked = re.search(r"GLOBAL (\S+)", str(error))
        if asked is not None:
            raise ValueError(
                f"{path} is a pickle that asks for {asked[1]}, which could run code, so it is not "
                "opened: ask its author for safetensors, or for a pickle of tensors alone"
            ) from error
        # torch's own sentence would advise to run the code.
        reason = re.search(r"WeightsUnpickler error: (.+)", str(error))
        why = reason[1] if reason else type(error).__name__
        raise ValueError(
            f"{path} is no pickle of tensors that can be read, or a damaged one: {why}"
        ) from error


def _there(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} holds no {path.name}: the SAE is not whole")


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


class Tensors:
    """Named tensors of a file, taken one by one and looked at.

    Args:
        where: the file, for messages.
        tensors: what it holds.

    Raises:
        ValueError: that is no mapping of names to tensors.
    """

    def __init__(self, where: Path | str, tensors: Any) -> None:
        self.where = where
        if not isinstance(tensors, Mapping) or not all(
            isinstance(name, str) and isinstance(t, Tensor) for name, t in tensors.items()
        ):
            raise ValueError(f"{where}: expected tensors by name, a state_dict")
        self._tensors = dict(tensors)
        self._taken: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str, dimensions: int) -> tuple[int, ...]:
        """The shape of a tensor.

        Raises:
            ValueError: it is not there, or has another number of dimensions, or one of size 0.
        """
        shape = tuple(self._get(name).shape)
        if len(shape) != dimensions or 0 in shape:
            raise ValueError(f"{self.where}: {name} has shape {list(shape)}: expected a matrix")
        return shape

    def take(self, name: str, *shape: int) -> Tensor:
        """A tensor as float32, of this shape exactly.

        Raises:
            ValueError: it is not there, has another shape, holds no numbers, or NaN or infinity.
        """
        tensor = self._get(name)
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{self.where}: {name} has shape {list(tensor.shape)}: expected {list(shape)}"
            )
        if tensor.is_complex() or tensor.is_sparse:
            raise ValueError(f"{self.where}: {name} is {tensor.dtype}: expected real numbers")
        self._taken.add(name)
        tensor = tensor.detach().to(torch.float32)
        all_finite(tensor, name, self.where)
        return tensor

    def refuse_others(self) -> None:
        """Raises ValueError where there is a tensor that nobody took: it may be part of what the
        SAE computes, such as a skip connection."""
        left = sorted(set(self._tensors) - self._taken)
        if left:
            raise ValueError(
                f"{self.where}: {', '.join(left[:8])} is not known here and may decide the codes: "
                "leave it out of the file if it does not"
            )

    def drop(self, *names: str) -> None:
        """Tensors that are known and not needed: not left over."""
        self._taken.update(names)

    def _get(self, name: str) -> Tensor:
        if name not in self._tensors:
            held = ", ".join(sorted(self._tensors)[:8]) or "nothing"
            raise ValueError(f"{self.where} holds no {name}: it holds {held}")
        return self._tensors[name]


def all_finite(tensor: Tensor, name: str, where: Path | str) -> None:
    """Raises ValueError where a tensor holds NaN or infinity."""
    wrong = int((~tensor.isfinite()).sum())
    if wrong:
        raise ValueError(
            f"{where}: {name} holds {wrong:,} numbers that are NaN or infinite: its training "
            "failed, or the file is damaged"
        )


def size(config: Mapping[str, Any], name: str, where: Path | str) -> int:
    """A whole number above 0 of a config.

    Raises:
        ValueError: it is missing or something else.
    """
    value = config.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{where}: {name}={value!r}: expected a whole number, 1 or more")
    return value


def flag(config: Mapping[str, Any], name: str, default: bool, where: Path | str) -> bool:
    """True or false of a config.

    Raises:
        ValueError: it is something else.
    """
    value = config.get(name)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{where}: {name}={value!r}: expected true or false")
    return default if value is None else value


def same_size(config: Mapping[str, Any], name: str, found: int, where: Path | str) -> None:
    """Raises ValueError where a config has a size, and the weights have another."""
    if config.get(name) is not None and size(config, name, where) != found:
        raise ValueError(f"{where}: {name}={config[name]}: the weights have {found}")
