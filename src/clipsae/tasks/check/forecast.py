"""How long each training, each evaluation and the whole sweep will take, by what was measured."""

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from clipsae.store import Store
from clipsae.store.files import checkpoint_step
from clipsae.tasks import build
from clipsae.tasks.check.evaluations import Evaluating
from clipsae.tasks.check.jobs import Job
from clipsae.tasks.check.machine import sae_bytes
from clipsae.tasks.stages import classifier, evaluation, features
from clipsae.tasks.together import stream_key

CHECKPOINT_BYTES = 3e8  # a second: written, flushed and hashed; not measured


@dataclass(frozen=True)
class Cost:
    """What was measured of a job, in seconds.

    Attributes:
        read, encode: of an image: by the loader, by CLIP up to the SAE.
        first, step: of a training step, as initialised and later.
        evaluating: None: not measured.
    """

    read: float
    encode: float
    first: float
    step: float
    evaluating: Evaluating | None = None


@dataclass(frozen=True)
class Work:
    """Something that one process does.

    Attributes:
        after: what must be done before.
    """

    seconds: float
    after: Path | None = None


@dataclass(frozen=True)
class Forecast:
    """The work that is not finished, of the jobs that were measured.

    Attributes:
        start: seconds that a job needs before it begins.
        prompts: that are embedded a second.
    """

    jobs: Sequence[Job]
    costs: Mapping[Job, Cost]
    start: float
    prompts: float

    def trainings(self) -> list[Job]:
        """The first job that needs each SAE that is missing."""
        found: dict[Path, Job] = {}
        for job in self.jobs:
            if not job.trained.finished:
                found.setdefault(job.trained.path, job)
        return list(found.values())

    def evaluations(self) -> list[Job]:
        """The first job that needs each evaluation that is missing."""
        found: dict[Path, Job] = {}
        for job in self.jobs:
            if (
                job.evaluated is not None
                and not job.evaluated.finished
                and self.costs[job].evaluating
            ):
                found.setdefault(job.evaluated.path, job)
        return list(found.values())

    def training(self, jobs: Sequence[Job], *, source: str | None = None) -> float:
        """Seconds of a training of several SAEs on the same tokens, or of one. Those that are
        fitted take the time of reading their images, which is most of it.

        Args:
            source: the cache that is trained from, see `features.cached`; None: as the config says.
        """
        fitted = [job for job in jobs if job.cfg.model.get("fit") is not None]
        fitting = sum(
            job.cfg.model.initial_images * (self.costs[job].read + self.costs[job].encode)
            for job in fitted
        )
        if len(fitted) == len(jobs):
            return fitting
        jobs = [job for job in jobs if job not in fitted]
        cfg, cost = jobs[0].cfg, self.costs[jobs[0]]
        source = source or features.cached(cfg)
        size = cfg.features.batch_size
        read = 0.0 if source else size * cost.read
        encode = 0.0 if source == "cache" else size * cost.encode
        batches = max(
            job.cfg.trainer.max_steps * job.cfg.trainer.accumulate_grad_batches for job in jobs
        )
        left = 1 - max(_done(job) for job in jobs) if len(jobs) == 1 else 1.0
        compute = sum(_mean_step(job, self.costs[job]) for job in jobs)
        seconds = batches * _fed(cfg, read, encode + compute)
        limit, held_out = cfg.trainer.limit_val_batches, len(jobs[0].held_out) / size
        limit = limit * held_out if isinstance(limit, float) else min(limit, held_out)
        looks = batches // cfg.trainer.val_check_interval
        tokens = size * (cost.read + cost.encode)
        # Forward passes alone take a third; predictions as long as two batches.
        seconds += looks * (limit * tokens + (limit + 2) * compute / 3)
        saved = batches // cfg.callbacks.checkpoint_every_n_steps
        seconds += saved * sum(3 * sae_bytes(job) for job in jobs) / CHECKPOINT_BYTES
        return left * seconds + fitting

    def evaluation(self, jobs: Sequence[Job]) -> float:
        """Seconds of an evaluation of several SAEs in one pass, or of one."""
        images, counted = len(jobs[0].test_set), jobs[0].counted
        if (limit := build.limit_images(jobs[0].cfg)) is not None:
            images, counted = min(images, limit), min(counted, limit)
        sample = jobs[0].cfg.measurement.sample_images
        read_once = self.costs[jobs[0]].read + self.costs[jobs[0]].encode
        shared = (images + counted) * read_once
        each = [self.costs[job].evaluating.seconds(images, sample, counted) for job in jobs]
        return sum(each) - (len(jobs) - 1) * min(shared, min(each))

    def works(self, together: bool) -> dict[Path, Work]:
        """What is yet to be done, each in one process, by the place of its (first) result.

        Args:
            together: whether SAEs are trained, and evaluated, in groups, as `together=true` does.
        """
        works: dict[Path, Work] = {}
        made_with: dict[Path, Path] = {}
        for jobs in _grouped(self.trainings(), stream_key if together else None):
            job, after = jobs[0], None
            if features.cached(job.cfg):
                cache = features.stage(job.cfg, job.train_set)
                if not cache.finished:
                    after = cache.path
                    seconds = self.cache(job, features.cached(job.cfg))
                    works.setdefault(after, Work(self.start + seconds))
            works[job.trained.path] = Work(self.start + self.training(jobs), after)
            made_with |= {one.trained.path: job.trained.path for one in jobs}
        embedded: set[Path] = set()
        by_pass = evaluation.pass_key if together else None
        for jobs in _grouped(self.evaluations(), by_pass):
            job, seconds = jobs[0], self.start * len(jobs) + self.evaluation(jobs)
            if job.cfg.evaluation.settings:
                store, name = Store(job.cfg.paths.output_dir), job.cfg.dataset.name
                place = classifier.stage(job.cfg, store, job.test_set, name)
                if place.path not in embedded and not place.finished:
                    embedded.add(place.path)
                    prompts = classifier.templates(job.cfg, job.test_set)
                    seconds += len(job.test_set.classnames) * len(prompts) / self.prompts
            works[job.evaluated.path] = Work(seconds, made_with.get(job.trained.path))
        return works

    def cache(self, job: Job, kind: str | None) -> float:
        """Seconds to make a cache of tokens ("cache") or of images."""
        cost = self.costs[job]
        encode = cost.encode if kind == "cache" else 0.0
        return len(job.train_set) * _fed(job.cfg, cost.read, encode)

    def waits(self, job: Job) -> float:
        """How many times as long as the device needs for an image its reading takes."""
        cost = self.costs[job]
        return cost.read / (cost.encode + _mean_step(job, cost) / job.cfg.features.batch_size)


def makespan(works: Mapping[Path, Work], places: int) -> float:
    """Seconds until all is done, if each place takes what can begin first, the longest first."""
    free, ends = [0.0] * places, {}
    waiting = dict(works)

    def ready(path: Path) -> float:
        after = waiting[path].after
        return 0.0 if after not in works else ends.get(after, math.inf)

    while waiting:
        path = min(waiting, key=lambda path: (ready(path), -waiting[path].seconds))
        begins = max(heapq.heappop(free), ready(path))
        ends[path] = begins + waiting.pop(path).seconds
        heapq.heappush(free, ends[path])
    return max(ends.values(), default=0.0)


def _grouped(jobs: Sequence[Job], key: Callable[[DictConfig], str] | None) -> list[list[Job]]:
    """The jobs that have a key in common; without one each by itself."""
    groups: dict[str, list[Job]] = {}
    for i, job in enumerate(jobs):
        groups.setdefault(str(i) if key is None else key(job.cfg), []).append(job)
    return list(groups.values())


def _fed(cfg: DictConfig, read: float, compute: float) -> float:
    """Seconds of a batch: workers read while the device computes."""
    return max(read, compute) if cfg.features.num_workers else read + compute


def _mean_step(job: Job, cost: Cost) -> float:
    """Seconds of a step of a training: supports settle while the rate warms up."""
    share = min(1.0, job.cfg.optimizer.warmup_steps / max(1, job.cfg.trainer.max_steps))
    return share * cost.first + (1 - share) * cost.step


def _done(job: Job) -> float:
    """The share of a training that its checkpoint holds."""
    return (checkpoint_step(job.trained.scratch) or 0) / max(1, job.cfg.trainer.max_steps)
