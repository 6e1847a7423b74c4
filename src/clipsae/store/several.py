"""Several stages that are made in one go."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from clipsae.store.stage import Busy, Stage

log = logging.getLogger(__name__)


def make_all(
    stages: Sequence[Stage],
    build_all: Callable[[Mapping[Path, Path]], dict[Path, Exception]],
    rank: int = 0,
    *,
    wait: bool = True,
    check: Literal["content", "size"] = "content",
) -> dict[Path, Exception]:
    """Make several stages in one go, each as `Stage.make` does. Those that another process is
    making are left out, and waited for in the end, or with wait=False not at all.

    Args:
        build_all: given the folders to write into by the stages' paths, returns why some failed.
            What it raises is tried again for each stage: one may be at fault, or all together
            too large.
        rank: see `Stage.make`; of one stage alone.
        check: see `Stage.make`.

    Returns:
        Why some failed, by the stages' paths.
    """
    errors: dict[Path, Exception] = {}
    folders: dict[Path, Path] = {}
    busy: list[Stage] = []

    def attempt(some: Mapping[Path, Path]) -> None:
        try:
            errors.update(build_all(some))
        except Exception as error:
            if len(some) == 1:
                errors.update(dict.fromkeys(some, error))
                return
            log.warning("%s: %s; trying each by itself", type(error).__name__, error)
            for path, folder in some.items():
                attempt({path: folder})

    def hold(rest: Sequence[Stage]) -> None:
        """Build everything while the leases of `rest` are held, too."""
        if not rest:
            if folders:
                attempt(folders)
            return
        stage, entered = rest[0], False

        def build(folder: Path) -> None:
            nonlocal entered
            errors.pop(stage.path, None)
            if entered:  # the lease was lost, and has come back
                attempt({stage.path: folder})
            else:
                entered = True
                folders[stage.path] = folder
                hold(rest[1:])
            if stage.path in errors:
                raise errors[stage.path]

        try:
            stage.make(build, wait=wait and len(stages) == 1, check=check, rank=rank)
            errors.pop(stage.path, None)
        except Busy as error:
            log.info("%s; the others first", error)
            busy.append(stage)
        except Exception as error:
            errors[stage.path] = error
        if not entered:
            hold(rest[1:])

    hold(stages)
    for stage in busy if wait else ():
        errors.pop(stage.path, None)
        errors |= make_all([stage], build_all, check=check)
    return errors
