"""The machine and what is around it: versions, devices, the disk, W&B, SLURM."""

import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from packaging.requirements import Requirement

from clipsae.store.files import free_bytes
from clipsae.store.stage import PACKAGES
from clipsae.tasks import build, precision
from clipsae.tasks.check.findings import FAILS, OK, WARNING, Findings
from clipsae.tasks.check.jobs import Job
from clipsae.training.logging import asked_mode, logged_in

ON_A_NODE = "give the command on a node: srun --partition=... --gres=gpu:1 python run.py task=check"


def versions(findings: Findings) -> None:
    """Whether the installed packages are those that the project needs."""
    wrong = []
    for text in requires("clipsae") or ():
        needed = Requirement(text)
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(needed.name)
        except PackageNotFoundError:
            wrong.append(f"{needed.name} is not installed")
            continue
        if not needed.specifier.contains(found, prereleases=True):
            wrong.append(f"{needed.name} {found}: needed is {needed.specifier}")
    shown = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    if wrong:
        findings.add("versions", FAILS, "; ".join(wrong), "pip install -e . in this environment")
    else:
        findings.add("versions", OK, f"Python {platform.python_version()}, {shown}")


def device(cfg: DictConfig) -> torch.device:
    """The device that trainings would use here."""
    return torch.device("cpu") if cfg.trainer.accelerator == "cpu" else build.best_device()


def about(cfg: DictConfig, device: torch.device, elsewhere: bool, findings: Findings) -> None:
    """What the device is, and whether it is that of the jobs."""
    where = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads of torch"
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        free = torch.cuda.mem_get_info(device)[0] / 1e9
        where = f"{gpu.name}, {free:.0f} of {gpu.total_memory / 1e9:.0f} GB free; {where}"
    found = f"{platform.node()}: {where}; {precision.described(cfg)}"
    wants = cfg.resources.gpus or 0
    if elsewhere and wants and device.type == "cpu":
        found += f"; the jobs get {wants} GPUs: times and memory below are not theirs"
        findings.add("device", WARNING, found, ON_A_NODE)
    elif elsewhere and not wants and device.type == "cuda":
        findings.add("device", WARNING, f"{found}; the jobs get no GPU", "add resources.gpus=1")
    else:
        load = os.getloadavg()[0]
        busy = load > (os.cpu_count() or 1)
        said = f"{found}; busy, load {load:.1f}" if busy else found
        todo = "times are those of a busy machine" if busy else ""
        findings.add("device", WARNING if busy else OK, said, todo)


def disk(jobs: Sequence[Job], places: int, findings: Findings) -> None:
    """Whether what is yet to be trained has room: the SAEs, and checkpoints while they are made."""
    by_root: dict[Path, dict[Path | str, int]] = {}
    for job in jobs:
        missing = by_root.setdefault(Path(job.cfg.paths.output_dir), {})
        if job.trained is None or not job.trained.finished:
            alike = f"{job.cfg.clip} {job.cfg.model} {job.cfg.optimizer} {job.cfg.seed}"
            missing[job.trained.path if job.trained else alike] = sae_bytes(job)
    for root, sizes in by_root.items():
        # A checkpoint has the weights and Adam's two moments; the next is written beside it.
        largest = sorted(sizes.values(), reverse=True)[:places]
        needed, free = sum(sizes.values()) + 2 * 3 * sum(largest), free_bytes(root)
        found = f"{root}: {needed / 1e9:.2f} GB to write, {free / 1e9:.1f} GB free"
        there = next(folder for folder in (root, *root.parents) if folder.exists())
        if not os.access(there, os.W_OK):
            findings.add("disk", FAILS, f"{root} cannot be written to", "set paths.output_dir")
        elif needed > free or free < 100e6:
            findings.add("disk", FAILS, found, "make space, or set paths.output_dir")
        else:
            verdict = WARNING if needed > 0.8 * free else OK
            findings.add("disk", verdict, found, "make space" if verdict == WARNING else "")


def sae_bytes(job: Job) -> int:
    """Size of a trained SAE's file."""
    with torch.device("meta"):
        sae = build.build_sae(job.cfg, job.clip.width)
    return sum(t.numel() * t.element_size() for t in sae.state_dict().values())


def wandb(cfg: DictConfig, findings: Findings) -> None:
    """Whether runs will be shown where they are meant to be."""
    if "wandb" not in str(cfg.logger.get("_target_")):
        findings.add("W&B", OK, "not used")
        return
    mode = cfg.logger.mode or asked_mode()
    login = "wandb login, or logger.mode=offline"
    if mode in ("offline", "disabled"):
        findings.add("W&B", OK, f"{mode}, as it is set")
    elif logged_in():
        findings.add("W&B", OK, "a login is there")
    elif mode == "online":
        findings.add("W&B", FAILS, "no login, and logger.mode=online asks for one", login)
    else:
        findings.add("W&B", WARNING, "no login: runs are written offline", login)


def slurm(cfg: DictConfig, launcher: DictConfig, findings: Findings) -> None:
    """Whether SLURM would take a job: it is asked, and none is submitted.

    Args:
        launcher: `hydra.launcher` of the sweep.
    """
    if shutil.which("sbatch") is None:
        todo = "start the sweep where jobs are submitted, or use hydra/launcher=many_cores"
        findings.add("SLURM", FAILS, "this machine has no sbatch", todo)
        return
    asked: dict[str, Any] = {
        "partition": launcher.partition,
        "account": launcher.account,
        "qos": launcher.qos,
        "constraint": launcher.constraint,
        "time": launcher.timeout_min,
        "nodes": launcher.nodes,
        "ntasks-per-node": launcher.tasks_per_node,
        "cpus-per-task": launcher.cpus_per_task,
        "gpus-per-node": launcher.gpus_per_node,
        "mem": launcher.mem_gb and f"{launcher.mem_gb}G",
    }
    words = [f"--{name}={value}" for name, value in asked.items() if value is not None]
    command = ["sbatch", "--test-only", *words, "--wrap=true"]
    outside = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))}
    outside |= {k: v for k, v in os.environ.items() if k == "SLURM_CONF"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=outside)
    said = " ".join((done.stderr or done.stdout).replace("sbatch: ", "").split())
    if done.returncode:
        todo = "see hydra.launcher.partition, account, qos and resources"
        findings.add("SLURM", FAILS, f"sbatch {' '.join(words)}: {said}", todo)
    else:
        findings.add("SLURM", OK, f"takes {' '.join(words)}: {said}")
