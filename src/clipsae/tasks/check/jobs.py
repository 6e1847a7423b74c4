"""The jobs of a sweep, with the CLIP, the images and the places in the store that each of them
would use; each CLIP and dataset is opened once."""

from contextlib import suppress
from dataclasses import dataclass

from omegaconf import DictConfig, OmegaConf

from clipsae.clip import FrozenCLIP
from clipsae.data import ImageDataset
from clipsae.errors import ConfigError
from clipsae.store import Stage, Store
from clipsae.tasks import build, experiment, guidance, plugins, precision
from clipsae.tasks.check.findings import FAILS, WARNING, Findings
from clipsae.tasks.stages import evaluation, sae

ANY_SIZE = 224  # pixels, where the CLIP is not known


@dataclass(eq=False)
class Job:
    """One job whose options are valid.

    Attributes:
        clip: of random weights, where its own were not found.
        train_set, held_out, test_set: what it is trained, validated and evaluated on; None: not
            there.
        counted: images of a pass that counts latents before they are evaluated.
        trained, evaluated: places in the store; None: not known, or nothing is evaluated.
    """

    name: str
    cfg: DictConfig
    clip: FrozenCLIP
    train_set: ImageDataset | None
    held_out: ImageDataset | None
    test_set: ImageDataset | None
    counted: int = 0
    trained: Stage | None = None
    evaluated: Stage | None = None


class Opened:
    """The CLIPs and datasets of all jobs; why one cannot be opened is noted once."""

    def __init__(self, findings: Findings) -> None:
        self.findings = findings
        self.clips: dict[str, FrozenCLIP | None] = {}
        # With the name, the split and the config of the first job that reads it.
        self.datasets: dict[str, tuple[ImageDataset, str, str, DictConfig] | None] = {}
        self.evaluations: dict[str, bool] = {}

    def clip(self, cfg: DictConfig) -> FrozenCLIP | None:
        """Where its weights cannot be had one with random ones; None: there is no such model."""
        key = str(cfg.clip)
        if key not in self.clips:
            self.clips[key] = None
            with self.findings.attempt("CLIP"):
                self.clips[key] = build.build_clip(cfg)
                return self.clips[key]
            with suppress(ConfigError):
                random = OmegaConf.merge(cfg, {"clip": {"pretrained": None}})
                self.clips[key] = build.build_clip(random)
        return self.clips[key]

    def dataset(self, cfg: DictConfig, group: str, split: str, size: int) -> ImageDataset | None:
        """A split of `cfg.dataset` or `cfg.train_dataset`; None: it cannot be opened."""
        node = cfg[group]
        key = f"{split} {size} {build.plain(node)}"
        if key not in self.datasets:
            self.datasets[key] = None
            with self.findings.attempt(f"dataset {node.name}"):
                images = build.build_dataset(node, split, size)
                self.datasets[key] = images, node.name, split, cfg
        found = self.datasets[key]
        return found and found[0]

    def any_dataset(self, size: int) -> ImageDataset | None:
        """One with images of this size, if there is one."""
        there = (found[0] for found in self.datasets.values() if found)
        return next((images for images in there if images.image_size == size), None)

    def can_evaluate(
        self, cfg: DictConfig, clip: FrozenCLIP, test_set: ImageDataset, stage: Stage
    ) -> bool:
        """Whether all is there that the evaluation needs, such as an image encoder."""
        key = evaluation.pass_key(cfg)
        if key not in self.evaluations:
            self.evaluations[key] = False
            with self.findings.attempt(f"evaluation on {cfg.dataset.name}"):
                evaluation.check(cfg, clip, test_set, finished=stage.finished)
                self.evaluations[key] = True
        return self.evaluations[key]


def look(
    name: str, cfg: DictConfig, opened: Opened, *, elsewhere: bool, learns_k: bool
) -> Job | None:
    """Look at all that a job checks before it begins, however much of it fails.

    Args:
        elsewhere: whether the job runs on another machine: its devices are not looked for here.
        learns_k: whether the sweep trains what `auto` (see `guidance`) learns from.

    Returns:
        None: it cannot be measured.
    """
    findings, store, valid = opened.findings, Store(cfg.paths.output_dir), False
    with findings.attempt("options", name):
        plugins.load(cfg)
        experiment.check(cfg)
        sae.check_options(on_one_device(cfg) if elsewhere else cfg)
        valid = True
    clip = opened.clip(cfg)
    size = clip.image_size if clip else ANY_SIZE
    train_set = opened.dataset(cfg, "train_dataset", "train", size)
    held_out = opened.dataset(cfg, "train_dataset", "test", size)
    counted = test_set = opened.dataset(cfg, "dataset", cfg.evaluation.split, size)
    if cfg.evaluation.protocol == "heldout":
        counted = opened.dataset(cfg, "dataset", "train", size)
    if not valid or clip is None:
        return None
    try:
        guidance.resolve(cfg, store)
    except ConfigError as error:
        findings.add("options", WARNING if learns_k else FAILS, str(error), job=name)
        return None
    job = Job(name, cfg, clip, train_set, held_out, test_set)
    if counted is not None and evaluation.counts_first(cfg):
        job.counted = len(counted)
    if train_set is None or held_out is None or test_set is None:
        if cfg.precision == "auto":
            cfg.precision = precision.of_device(cfg)
        return job
    with findings.attempt("options", name):
        sae.resolve_latents(cfg, clip, train_set)
        trained = precision.resolve(cfg, lambda: sae.stage(cfg, store, train_set))
        sae.check(cfg, clip, train_set)
        evaluated = evaluation.stage(cfg, store, trained, test_set)
        if evaluated is not None and not opened.can_evaluate(cfg, clip, test_set, evaluated):
            evaluated = None
        job.trained, job.evaluated = trained, evaluated
        return job
    return None


def on_one_device(cfg: DictConfig) -> DictConfig:
    """The same on the one device that is there."""
    alone = {"accelerator": "auto", "devices": 1, "num_nodes": 1, "strategy": "auto"}
    return OmegaConf.merge(cfg, {"trainer": alone})
