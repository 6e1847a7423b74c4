"""`task=check`: what could stop a sweep, and what it will cost, before it is queued for a night.

Everything is looked at by what the jobs themselves use, and real steps and evaluations are timed.
Nothing is written. A check that fails ends no other.
"""

import contextlib
import json
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path

import torch
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor

from clipsae.errors import ConfigError
from clipsae.overrides import explain
from clipsae.sae import SAE
from clipsae.tasks import build, precision
from clipsae.tasks.check import evaluations, images, machine, steps
from clipsae.tasks.check.findings import FAILS, OK, WARNING, Findings
from clipsae.tasks.check.forecast import Cost, Forecast, makespan
from clipsae.tasks.check.jobs import Job, Opened, look
from clipsae.tasks.composing import Composer
from clipsae.tasks.stages import features
from clipsae.tasks.sweep import as_job, counted, duration, job_names

PLACES = (1, 8, 16)
WORTH = 0.05  # of the time, that a hint saves at least
WANDB_SECONDS = 1.0  # that a job's runs take to begin and end


def run(cfg: DictConfig) -> None:
    """Check a single run.

    Raises:
        SystemExit: with status 1, if anything would fail.
    """
    with _quiet():
        findings = Findings()
        check = Check(cfg, None, findings)
        check.look("", deepcopy(cfg))
        check.measure()
    _end(findings, cfg.task.json)


def show_sweep(launcher: Launcher, job_overrides: Sequence[Sequence[str]]) -> None:
    """Check all jobs of a sweep: in place of them.

    Raises:
        SystemExit: with status 1, if anything would fail.
    """
    cfg = launcher.config
    with _quiet():
        findings = Findings()
        check = Check(cfg, cfg.hydra.launcher, findings)
        check.asked = len(job_overrides)
        composer = Composer(launcher)
        check.learns_k = any("model=sparsemax" in overrides for overrides in job_overrides)
        for name, overrides in zip(job_names(job_overrides), job_overrides, strict=True):
            try:
                config = composer.config(overrides)
            except (ConfigError, HydraException, OmegaConfBaseException) as error:
                conf = Path(os.environ["CLIPSAE_ROOT"], "conf")
                known = isinstance(error, ConfigError)
                said = str(error) if known else explain(error, conf)
                findings.add("options", FAILS, said, job=name)
                continue
            with as_job(config):
                check.look(name, deepcopy(config))
        with as_job(cfg):
            check.measure()
    _end(findings, cfg.task.json)


def _end(findings: Findings, as_json: bool) -> None:
    findings.show(as_json)
    if findings.verdict == FAILS:
        sys.exit(1)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What the jobs would log is left out: the table says it."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


class Check:
    """The jobs of a sweep or of one run, and what was measured of them.

    Args:
        launcher: `hydra.launcher` of a sweep; None: a single run.
    """

    def __init__(self, cfg: DictConfig, launcher: DictConfig | None, findings: Findings) -> None:
        self.cfg, self.launcher, self.findings = cfg, launcher, findings
        self.begun = time.monotonic()
        self.start = _age()  # of a process: what it imports
        self.seconds = float(cfg.task.seconds)
        self.opened = Opened(findings)
        self.jobs: list[Job] = []  # those that can be measured
        self.asked = 1
        self.learns_k = False  # whether the sweep trains what `auto` (see `guidance`) learns from
        self.prompts = math.inf  # a second
        target = "" if launcher is None else str(launcher.get("_target_")).rpartition(".")[2]
        self.on_slurm, self.many = target == "Slurm", target == "ManyCores"
        self.elsewhere = self.on_slurm and "SLURM_JOB_ID" not in os.environ

    def look(self, name: str, cfg: DictConfig) -> None:
        """Look at one job; nothing is measured yet."""
        job = look(name, cfg, self.opened, elsewhere=self.elsewhere, learns_k=self.learns_k)
        if job is not None:
            self.jobs.append(job)

    def measure(self) -> None:
        """Everything else, in the order of the table."""
        findings = self.findings
        composing = (time.monotonic() - self.begun) / max(1, self.asked)
        if not any(line.check == "options" for line in findings.lines):
            findings.add("options", OK, f"valid for {counted(self.asked, 'job')}")
        with findings.attempt("versions"):
            machine.versions(findings)
        cfg = self.jobs[0].cfg if self.jobs else self.cfg  # recipes are a job's
        device = machine.device(cfg)
        machine.about(cfg, device, self.elsewhere, findings)
        with findings.attempt("disk"):
            machine.disk(self.jobs, self.places, findings)
        with findings.attempt("W&B"):
            machine.wandb(cfg, findings)
        if self.on_slurm:
            with findings.attempt("SLURM"):
                machine.slurm(self.cfg, self.launcher, findings)
        costs = self._costs(device)
        known = [job for job in self.jobs if job in costs and job.trained is not None]
        if not known:
            findings.add("forecast", WARNING, "nothing that can be predicted", "see above")
            return
        wandb = WANDB_SECONDS if "wandb" in str(cfg.logger.get("_target_")) else 0.0
        start = composing + wandb + (self.start if self.on_slurm or self.many else 0.0)
        self._forecast(Forecast(known, costs, start, self.prompts))

    def _costs(self, device: torch.device) -> dict[Job, Cost]:
        """Look at CLIP and the images, and time what the jobs do with them; once what is the same
        for several."""
        findings, read = self.findings, {}
        for clip in filter(None, self.opened.clips.values()):
            if clip.pretrained is not None:
                found = f"{clip.name}: {clip.tokens} tokens of width {clip.width}"
                findings.add("CLIP", OK, f"{found}, weights {Path(clip.pretrained).name}")
            with findings.attempt("CLIP"):
                clip.to(device)
        for dataset, name, split, cfg in filter(None, self.opened.datasets.values()):
            with findings.attempt(f"dataset {name}"):
                rate = images.dataset(name, split, dataset, cfg, self.seconds, findings)
                read[dataset] = 1 / rate
        classes: dict[str, Tensor | None] = {}
        encoded: dict[str, tuple[Tensor, float]] = {}
        stepped: dict[str, tuple[float, float, SAE | None]] = {}
        evaluated: dict[str, evaluations.Evaluating | None] = {}
        costs = {}
        for job in self.jobs:
            cfg, clip = job.cfg, job.clip
            precision.apply(cfg, clip)
            of_clip = f"{cfg.clip} {precision.of_clip(cfg)} {cfg.features.batch_size}"
            of_images = f"{cfg.clip} {cfg.dataset}"
            sample = job.train_set or job.test_set or self.opened.any_dataset(clip.image_size)
            if sample is None:
                findings.add("steps", WARNING, "not timed: no images are there")
                continue
            if of_clip not in encoded:
                with findings.attempt("CLIP"):
                    size = cfg.features.batch_size
                    encoded[of_clip] = images.encoded(clip, sample, size, self.seconds)
            if job.test_set is not None and not classes:
                with findings.attempt("zero-shot"):
                    classes[of_images], self.prompts = images.zero_shot(job, findings)
            if of_clip not in encoded:
                continue
            tokens, rate = encoded[of_clip]
            variant = f"{of_clip} {_variant(cfg)}"
            if variant not in stepped:
                stepped[variant] = (math.nan, math.nan, None)
                if cfg.model.get("fit") is not None:
                    # It takes none, and is evaluated as one with any other weights.
                    sae = build.build_sae(cfg, clip.width).to(tokens.device)
                    stepped[variant] = (0.0, 0.0, sae)
                else:
                    with findings.attempt(f"step {cfg.model.name}"):
                        chosen = tokens[:, clip.token_slice(cfg.features.tokens)]
                        stepped[variant] = self._steps(job, chosen)
            first, step, sae = stepped[variant]
            if math.isnan(step):
                continue
            how = f"{variant} {cfg.evaluation} {cfg.measurement}"
            if how not in evaluated and job.evaluated is not None and sae is not None:
                evaluated[how] = None
                with findings.attempt(f"evaluation {cfg.model.name}"):
                    if of_images not in classes:
                        classes[of_images] = images.few_prompts(job)
                    evaluated[how] = evaluations.timed(job, sae, classes[of_images], self.seconds)
                    stepped[variant] = (first, step, None)  # its memory
            costs[job] = Cost(
                read.get(job.train_set, 0.0), 1 / rate, first, step, evaluated.get(how)
            )
        return costs

    def _steps(self, job: Job, tokens: Tensor) -> tuple[float, float, SAE]:
        """Seconds of a step as initialised and later, and the SAE."""
        cfg, findings = job.cfg, self.findings
        begun = steps.timed(cfg, tokens, None, self.seconds / 3)
        later = begun
        if begun.seconds < self.seconds:
            later = steps.timed(cfg, tokens, steps.TRAINED_SHARE, self.seconds)
        apart = steps.distance(cfg, begun.sae, tokens)
        kind = cfg.precision if tokens.is_cuda or cfg.precision == "bf16" else "float32"
        gb = max(begun.gb, later.gb)
        found = (
            f"{1e3 * later.seconds:,.1f} ms ({later.taken} timed; {1e3 * begun.seconds:,.1f} ms as "
            f"initialised), peak {gb:.1f} GB; {cfg.model.latents:,} latents, batches of "
            f"{len(tokens)} x {tokens.shape[1]} tokens; gradients differ from float64's by "
            f"{apart:.0e} ({kind})"
        )
        verdict, todo = OK, ""
        if not apart <= steps.TOLERANCES[kind]:
            verdict = FAILS
            todo = f"expected is {steps.TOLERANCES[kind]:g} at most: this machine miscalculates"
        elif self.on_slurm and not cfg.resources.gpus and gb > (cfg.resources.mem_gb or gb):
            verdict, todo = FAILS, f"ask for resources.mem_gb={math.ceil(1.2 * gb)}"
        findings.add(f"step {_named(cfg)}", verdict, found, todo, seconds=later.seconds, gb=gb)
        return begun.seconds, later.seconds, later.sae

    def _forecast(self, forecast: Forecast) -> None:
        """How long all will take, and what would shorten it."""
        findings = self.findings
        for job in forecast.trainings():
            seconds = forecast.training([job])
            verdict, todo = OK, ""
            limit = 60 * self.launcher.timeout_min if self.on_slurm else math.inf
            if seconds > limit:
                verdict = WARNING
                todo = f"over the limit of {duration(limit)}: it is queued again and continues"
            fits = job.cfg.model.get("fit") is not None
            count = job.cfg.model.initial_images if fits else job.cfg.trainer.max_steps
            found = f"about {duration(seconds)} for {count:,} {'images' if fits else 'steps'}"
            check = f"{'fitting' if fits else 'training'} {_named(job.cfg)}"
            findings.add(check, verdict, found, todo, job=job.name, seconds=seconds)
        here = forecast.works(self.cfg.together)
        if not here:
            findings.add("forecast", OK, "all is finished: nothing is left to be done")
            return
        times = {places: makespan(here, places) for places in (*PLACES, self.places)}
        said = ", ".join(f"{duration(times[n])} on {n}" for n in PLACES)
        trainings = counted(len(forecast.trainings()), "training")
        found = (
            f"{trainings}, {counted(len(forecast.evaluations()), 'evaluation')}: {said} places; "
            f"{duration(times[self.places])} as it would be launched"
        )
        left_out = self.asked - len(forecast.jobs)
        verdict = WARNING if left_out else OK
        if left_out:
            found += f"; {left_out} of {self.asked} jobs are not in it"
        numbers = {f"places_{n}": times[n] for n in PLACES}
        findings.add("forecast", verdict, found, **numbers, seconds=times[self.places])
        for hint, saved in self._hints(forecast, times[self.places]):
            findings.add("shorter", OK, f"{hint}: {duration(saved)} less")

    def _hints(self, forecast: Forecast, now: float) -> Iterator[tuple[str, float]]:
        """What would shorten it, and the seconds that it saves."""
        if not self.cfg.together:
            alone, together = (makespan(forecast.works(t), 1) for t in (False, True))
            if alone - together > WORTH * now:
                yield "together=true, of the time on one place", alone - together
        trainings = forecast.trainings()
        online = [job for job in trainings if features.cached(job.cfg) != "cache"]
        if online:
            job = online[0]
            saved = sum(
                forecast.training([one]) - forecast.training([one], source="cache")
                for one in online
            )
            saved -= forecast.cache(job, "cache")
            gb = 2e-9 * len(job.train_set) * job.clip.positions * job.clip.width
            if saved > WORTH * now:
                yield f"features=cached ({gb:,.1f} GB), of the time on one place at most", saved
            workers, waits = job.cfg.features.num_workers, forecast.waits(job)
            if workers and waits > 1 and not features.cached(job.cfg):
                hint = (
                    f"features.num_workers={math.ceil(workers * waits)}, where there are such cores"
                )
                yield hint, (1 - 1 / waits) * sum(forecast.training([one]) for one in online)

    @property
    def places(self) -> int:
        """Jobs at a time, as the launcher is set."""
        if self.on_slurm:
            return self.launcher.array_parallelism
        return (self.launcher.parallel or os.cpu_count() or 1) if self.many else 1


def _variant(cfg: DictConfig) -> str:
    """The same for SAEs whose steps cost the same: coefficients do not count."""
    options = {
        key: value > 0 if isinstance(value, float) else value
        for key, value in build.sae_options(cfg).items()
    }
    more = cfg.model.get("compile"), cfg.precision, cfg.features.tokens, cfg.features.max_norm_ratio
    return json.dumps([options, *more])


def _named(cfg: DictConfig) -> str:
    k = cfg.model.get("k")
    return cfg.model.name + ("" if k is None else f" k={k}")


def _age() -> float:
    """Seconds since this process was started."""
    started = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
    running = float(Path("/proc/uptime").read_text().split()[0])
    return running - int(started) / os.sysconf("SC_CLK_TCK")
