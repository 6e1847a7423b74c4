"""`together=true`: the cells of a sweep that train on the same tokens share one process.

Each cell is prepared in its own job. Then the first job trains the SAEs of all, in one fit, and
evaluates them, in one pass over each dataset. Then each job shows its results.
"""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.utils import get_method
from omegaconf import DictConfig

from clipsae.tasks import build, run_task
from clipsae.tasks.experiment import Experiment, produce
from clipsae.tasks.guidance import unresolved
from clipsae.tasks.stages.sae import MEMBER_OPTIONS


def stream_key(cfg: DictConfig) -> str:
    """The same for cells that can be trained in one fit: on tokens of the same images in the same
    order, whichever blocks they come after: the CLIP is run once. Those that learn their sparsity
    from an SAE that may be among the others come later."""
    trainer = {k: v for k, v in build.plain(cfg.trainer).items() if k not in MEMBER_OPTIONS}
    clip = {k: v for k, v in build.plain(cfg.clip).items() if k != "layer"}
    nodes = cfg.train_dataset, cfg.features, cfg.callbacks
    more = trainer, cfg.precision, cfg.seed, bool(unresolved(cfg)), cfg.model.get("target_layer")
    return json.dumps([clip, *map(build.plain, nodes), *more])


def by_stream(configs: Sequence[DictConfig]) -> list[list[int]]:
    """The indices of configs that have a stream in common."""
    groups: dict[str, list[int]] = {}
    for i, cfg in enumerate(configs):
        groups.setdefault(stream_key(cfg), []).append(i)
    # (Stable: otherwise as they come.)
    return sorted(groups.values(), key=lambda group: bool(unresolved(configs[group[0]])))


def run_group(
    launcher: Launcher, run: Callable[[int], JobReturn], cells: Sequence[int]
) -> list[JobReturn]:
    """Run cells of a sweep together.

    Args:
        run: runs the launcher's task function as the job of a cell.
        cells: the numbers of the cells; they have a stream in common.
    """
    own_task = launcher.task_function
    experiments: dict[int, Experiment] = {}
    logs: dict[int, list[logging.Handler]] = {}
    returns: dict[int, JobReturn] = {}

    def prepare(cfg: DictConfig, i: int) -> None:
        module = cfg.task._target_.removesuffix("run")
        experiments[i] = get_method(f"{module}prepare")(cfg)
        logs[i] = [h for h in logging.root.handlers if isinstance(h, logging.FileHandler)]

    def show(cfg: DictConfig, i: int) -> None:
        if i == next(iter(experiments)):
            with _logged_to([h for j, some in logs.items() if j != i for h in some]):
                produce(list(experiments.values()))
        experiments[i].show()

    try:
        for i in cells:
            launcher.task_function = partial(run_task, task=partial(prepare, i=i))
            returns[i] = run(i)
        for i in experiments:
            launcher.task_function = partial(run_task, task=partial(show, i=i))
            returns[i] = run(i)
    finally:
        launcher.task_function = own_task
    return [returns[i] for i in cells]


@contextmanager
def _logged_to(handlers: Sequence[logging.Handler]) -> Iterator[None]:
    """Write the log to the files of other jobs, too."""
    logging.root.handlers += handlers
    try:
        yield
    finally:
        logging.root.handlers = [h for h in logging.root.handlers if h not in handlers]
