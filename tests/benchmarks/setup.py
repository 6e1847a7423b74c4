"""What all measurements share: sizes, the device and a clock, SAEs and images."""

import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from clipsae.clip import FrozenCLIP
from clipsae.data.dataset import ImageList
from clipsae.data.listing import list_images
from clipsae.sae import SAE
from clipsae.sae.engine.switch import DENSE_FROM
from clipsae.training.density import set_density

Step = Callable[[], object]


@dataclass(frozen=True)
class Sizes:
    """How large everything is; the defaults are the paper's, on ViT-B/16.

    Attributes:
        d, latents, tokens: width, M, tokens per step.
        rounds: how often each measurement is repeated.
        step_rows: recipes and densities (None: as initialised) of the table of steps.
        cost_rows: recipes and options that are compared with TopK at equal L0.
        memory_rows, memory_tokens: the same for peak memory, and tokens per step there.
        grow: what a step's cost is measured against, and the values.
        crossing_tokens, crossing_shares: of the steps that find where dense products are faster.
        clip: name and weights.
        images, cache_images: number of images in the evaluation and in the cache.
        workers: numbers of processes that decode images.
    """

    d: int = 768
    latents: int = 49152
    tokens: int = 512
    rounds: int = 5
    step_rows: tuple[tuple[str, float | None], ...] = (
        ("relu", None),
        ("relu", 0.02),
        ("jumprelu", None),
        ("jumprelu", 0.02),
        ("gated", None),
        ("gated", 0.02),
        ("topk", None),
        ("batch_topk", None),
        ("sparsemax", 0.007),
        ("sparsemax", 0.021),
        ("attention_relu", 0.02),
        ("linear_sparsemax", 0.021),
    )
    cost_rows: tuple[tuple[str, Mapping[str, Any]], ...] = (
        *((name, {}) for name in ("relu", "jumprelu", "gated", "batch_topk", "sparsemax")),
        *((name, {}) for name in ("attention_relu", "linear_sparsemax")),
        *((name, {}) for name in ("matryoshka", "abs_topk", "matching_pursuit")),
        ("topk", {"nested_k": [8, 16, 32]}),
    )
    memory_rows: tuple[tuple[str, float | None], ...] = (
        ("relu", None),
        ("relu", 0.11),  # nearly the most that is kept sparse
        ("jumprelu", None),
        ("gated", None),
        ("topk", None),
        ("batch_topk", None),
        ("sparsemax", 0.021),
        ("attention_relu", None),
        ("linear_sparsemax", 0.021),
    )
    memory_tokens: int = 6304
    grow: Mapping[str, tuple] = field(default_factory=lambda: _GROW)
    crossing_tokens: tuple[int, ...] = (512, 6304)
    crossing_shares: Mapping[str, tuple[float, ...]] = field(default_factory=lambda: _SHARES)
    clip: tuple[str, str | None] = ("ViT-B-16-quickgelu", None)
    images: int = 16
    ns: tuple[int, ...] = (1, 5, 10, 50)
    cache_images: int = 1024
    workers: tuple[int, ...] = (0, 2)


_GROW = {
    "latents": tuple(2**i for i in range(12, 18)),
    "tokens": (128, 512, 2048),
    "k": (8, 32, 128, 512),
    "support": (0.002, 0.007, 0.021, 0.06),
}

_SHARES = {
    "cpu": (0.03, 0.06, 0.09, 0.12, 0.15, 0.2),
    "cuda": (0.001, 0.003, 0.006, 0.01, 0.02, 0.04, 0.08),
}

GPU_ROWS = (
    *(("relu", None), ("relu", 0.004), ("relu", 0.02), ("jumprelu", 0.004), ("gated", 0.004)),
    *(("topk", None), ("batch_topk", None), ("attention_relu", 0.004)),
    *(("sparsemax", 0.0016), ("sparsemax", 0.007), ("sparsemax", 0.021)),
    ("linear_sparsemax", 0.007),
)

QUICK = Sizes(
    d=32,
    latents=512,
    tokens=64,
    rounds=1,
    step_rows=(("relu", None), ("sparsemax", 0.02)),
    cost_rows=(("matryoshka", {}), ("topk", {"nested_k": [8, 16, 32]})),
    memory_rows=(("topk", None),),
    memory_tokens=128,
    grow={"latents": (512, 1024), "tokens": (32, 64), "k": (4, 8), "support": (0.01, 0.05)},
    crossing_tokens=(64,),
    crossing_shares={"cpu": (0.02, 0.3), "cuda": (0.02, 0.3)},
    clip=("clipsae-tiny", "builtin"),
    images=4,
    ns=(1, 5),
    cache_images=64,
    workers=(0,),
)


@dataclass(frozen=True)
class Setup:
    """How to measure.

    Attributes:
        device: "cpu" or "cuda".
        precision: of the SAE's products, "float32", "tf32" or "bf16", as `precision=` of a run.
        images: a folder of photos; None: random pixels.
    """

    sizes: Sizes
    threads: int
    seed: int = 0
    device: str = "cpu"
    precision: str = "float32"
    images: Path | None = None

    @property
    def clock_name(self) -> str:
        if self.device != "cpu":
            return "wall clock, the device synchronised"
        return "CPU time of the process" if self.threads == 1 else "wall clock"

    def clock(self) -> float:
        """Seconds; with one thread CPU time, which other processes disturb least."""
        if self.device != "cpu":
            torch.cuda.synchronize()
        return time.process_time() if "CPU time" in self.clock_name else time.perf_counter()

    def apply(self) -> None:
        """Set what holds for the whole process: threads, and TF32 on a GPU."""
        torch.set_num_threads(self.threads)
        if self.device != "cpu":
            tf32 = self.precision != "float32"
            torch.set_float32_matmul_precision("high" if tf32 else "highest")
            torch.backends.cudnn.allow_tf32 = tf32

    def autocast(self) -> AbstractContextManager[Any]:
        bf16 = self.precision == "bf16"
        return torch.autocast(self.device, torch.bfloat16) if bf16 else nullcontext()

    def seconds(self, step: Step) -> float:
        start = self.clock()
        step()
        return self.clock() - start

    def interleaved(self, steps: Mapping[str, Step]) -> dict[str, list[float]]:
        """Seconds of each step in each round; the steps take turns, after a warm-up round."""
        for step in steps.values():
            step()
        found: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(self.sizes.rounds):
            for name, step in steps.items():
                found[name].append(self.seconds(step))
        return found


def ratio(times: list[float], base: list[float]) -> float:
    """The median of the pairs' ratios."""
    return statistics.median(a / b for a, b in zip(times, base, strict=True))


@contextmanager
def switched(device: str, share: float) -> Iterator[None]:
    """Dense products on a type of device from this share of active pairs on; 0: always."""
    before = DENSE_FROM.pop(device, None)
    if share:
        DENSE_FROM[device] = {1: share, 2: share}
    try:
        yield
    finally:
        DENSE_FROM.pop(device, None)
        if before is not None:
            DENSE_FROM[device] = before


def options_of(model: str, latents: int) -> dict[str, Any]:
    """The SAE's options in conf/model/<model>.yaml, without its width."""
    # Imported here: they are not to count in a process whose memory is measured.
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    import run
    from clipsae.tasks.build import sae_options

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(run.ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", [f"model={model}", "clip=vit_b_16", f"model.latents={latents}"])
    options = sae_options(cfg)
    if options.get("target_l0") == "auto":  # a Sparsemax SAE's; here none is there
        options["target_l0"] = 32.0
    return options


def prepared(options: dict[str, Any], density: float | None, setup: Setup) -> tuple[SAE, Tensor]:
    """An SAE in training mode and tokens [1, N, d], the same for the same arguments."""
    sizes = setup.sizes
    torch.manual_seed(setup.seed)
    with torch.device(setup.device):
        sae = SAE(d=sizes.d, **options).train()
        x = torch.randn(1, sizes.tokens, sizes.d) + torch.randn(sizes.d)
        sae.initialize(x)
        if density is not None:
            set_density(sae, x, density)
    return sae, x


def clip_of(setup: Setup) -> FrozenCLIP:
    """The frozen CLIP on the device."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about random weights, which are intended here
        return FrozenCLIP.load(*setup.sizes.clip).to(setup.device)


class Noise(Dataset):
    """n images of random pixels, S x S, with labels."""

    templates = None

    def __init__(self, labels: list[int], image_size: int) -> None:
        self.labels = torch.tensor(labels)
        self.classnames = [f"class {label}" for label in range(max(labels) + 1)]
        self.image_size = image_size
        self.fingerprint = f"noise-{len(labels)}-{image_size}"

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        generator = torch.Generator().manual_seed(index)
        shape = (3, self.image_size, self.image_size)
        pixels = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        return pixels, int(self.labels[index])


def images(folder: Path | None, n: int, image_size: int, classes: int = 4) -> Noise | ImageList:
    """The first n images in a folder, labelled in equal groups; None: random pixels.

    Raises:
        ValueError: the folder has fewer images.
    """
    labels = [i * classes // n for i in range(n)]
    if folder is None:
        return Noise(labels, image_size)
    files = list_images(folder)[:n]
    if len(files) < n:
        raise ValueError(f"--images {folder}: {len(files)} images, needs {n}")
    names = [f"class {label}" for label in range(classes)]
    return ImageList(folder, files, labels, names, image_size=image_size)
