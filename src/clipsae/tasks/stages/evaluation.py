"""Kind "evaluation": top-n concept classification of one SAE on one dataset (Tables 7-17).
`results.csv`, `diagnostics.json`, `ranking.safetensors` (unless no latents were ranked),
`config.yaml`."""

import logging
import math
from pathlib import Path

import pandas as pd
from omegaconf import DictConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from clipsae.clip import FrozenCLIP
from clipsae.data import ImageDataset
from clipsae.errors import ConfigError
from clipsae.evaluation import TopNResult, check_topn_options, evaluate_topn
from clipsae.progress import Bar
from clipsae.sae import SAE
from clipsae.store import Stage, Store, write_json
from clipsae.tasks import build, together

log = logging.getLogger(__name__)

LARGEST_DIFFERENCE = 2.0  # points between `no_sae` and the published zero-shot accuracy


def stage(cfg: DictConfig, store: Store, sae_stage: Stage, test_set: ImageDataset) -> Stage:
    """The place of the results: the SAE, the images and the protocol are in the key."""
    key = {
        "sae": sae_stage.path.name,
        "dataset": build.dataset_key(cfg.dataset, test_set),
        "evaluation": {
            **build.decisive("evaluation", cfg.evaluation),
            "limit_images": build.limit_images(cfg),
        },
    }
    name = [cfg.model.name, cfg.clip.name, cfg.dataset.name, cfg.evaluation.protocol]
    return store.stage("evaluation", [*name, f"s{cfg.seed}"], key, build.cell(cfg))


def check_options(cfg: DictConfig) -> None:
    """Refuse options that cannot be.

    Raises:
        ConfigError: see `check_topn_options`.
    """
    options = cfg.evaluation
    build.user_error(check_topn_options, options.ns, options.protocol, options.settings)


def check(cfg: DictConfig, clip: FrozenCLIP, test_set: ImageDataset) -> None:
    """Refuse now what would be refused after the training.

    Raises:
        ConfigError: a backbone without a text tower or a tokenizer, or `heldout` where both
            splits are the same images: nothing would be held out.
    """
    _ = clip.tokenizer
    if len(test_set.classnames) == 1:
        log.warning(
            "%s has one class, %r: every accuracy will be 100 %%, as nothing competes with it; "
            "evaluation=none leaves them out",
            *(cfg.dataset.name, test_set.classnames[0]),
        )
    options = cfg.evaluation
    if options.protocol != "heldout":
        return
    counted = build.build_dataset(cfg.dataset, "train", clip.image_size)
    if counted.fingerprint == test_set.fingerprint:
        raise ConfigError(
            f"evaluation.protocol=heldout: {cfg.dataset.name} has one split only, which would be "
            "counted and evaluated alike: use protocol=paper, or lay out train/ and test/"
        )


def make(
    cfg: DictConfig,
    clip: FrozenCLIP,
    trained: Stage,
    classifier: Tensor,
    test_set: ImageDataset,
    stage: Stage,
    folder: Path,
) -> None:
    """Evaluate a trained SAE with the classes' text embeddings [C, e]; write into `folder`."""
    options = cfg.evaluation
    device = build.best_device()
    count_set = None
    if options.protocol == "heldout":
        count_set = build.build_dataset(cfg.dataset, "train", clip.image_size)
    if (limit := build.limit_images(cfg)) is not None:
        log.info(
            "evaluating %d of %d images only: %s",
            min(limit, len(test_set)),
            len(test_set),
            "evaluation.limit_images"
            if cfg.evaluation.limit_images is not None
            else "with random CLIP weights the numbers mean nothing",
        )

    def evaluate(cells: dict[str, tuple[Path, float]]) -> TopNResult:
        with Bar(f"evaluating {build.title(cfg, len(cells))}", stage.progress) as bar:
            return evaluate_topn(
                clip.to(device),
                {name: SAE.load(path).to(device) for name, (path, _) in cells.items()},
                test_set,
                classifier,
                ns=tuple(options.ns),
                settings=tuple(options.settings),
                protocol=options.protocol,
                count_dataset=count_set,
                count_threshold={name: threshold for name, (_, threshold) in cells.items()},
                batch_size=options.batch_size,
                limit_images=limit,
                num_workers=cfg.features.num_workers,
                device=device,
                sparsity=True,
                progress=bar,
            )

    own = trained.path, cfg.evaluation.count_threshold
    name, result = together.in_one_pass("evaluation", cfg, own, evaluate)
    rows = [
        {**build.cell(cfg), **{k: v for k, v in row.items() if k != "sae"}}
        for row in result.rows
        if row["sae"] in (None, name)
    ]
    pd.DataFrame(rows).to_csv(folder / "results.csv", index=False)
    write_json(
        folder / "diagnostics.json",
        {
            # None where no setting looks at the SAE.
            "count_threshold": result.count_threshold.get(name),
            "share_above_threshold": result.share_above_threshold.get(name),
            "l0": result.l0.get(name),
            "sparsity": result.sparsity.get(name),
            "class_accuracy": {
                f"{setting}_{n}" if n else setting: [
                    None if math.isnan(a) else a for a in accuracy.tolist()
                ]
                for (sae, setting, n), accuracy in result.class_accuracy.items()
                if sae in (None, name)
            },
        },
    )
    if name in result.latents and result.latents[name].numel():
        ranking = {"latents": result.latents[name].contiguous(), "images": result.counted_images}
        save_file(ranking, folder / "ranking.safetensors")
    build.save_config(cfg, folder)


def read_ranking(folder: Path) -> dict[int, list[int]] | None:
    """Of a finished evaluation, each class's latents in the order in which `on_n` keeps them, the
    classes alone that had images; None where no latents were ranked."""
    file = folder / "ranking.safetensors"
    if not file.is_file():
        return None
    found = load_file(file)
    latents, counted = found["latents"].tolist(), (found["images"] > 0).nonzero().flatten().tolist()
    return {label: latents[label] for label in counted}


def read(folder: Path) -> pd.DataFrame:
    """The tidy rows of a finished evaluation."""
    return pd.read_csv(folder / "results.csv")


def check_zero_shot(cfg: DictConfig, test_set: ImageDataset, rows: pd.DataFrame) -> None:
    """Warn where CLIP's own accuracy is not what is published for these weights and images.

    It can be known for OpenAI's ViT-B/16 on the whole test split of the eleven datasets.
    """
    about = getattr(test_set, "about", None)
    no_sae = rows[rows.setting == "no_sae"]
    known = (cfg.clip.name, cfg.clip.pretrained, cfg.evaluation.split)
    if (
        about is None
        or known != ("ViT-B-16-quickgelu", "openai", "test")
        or no_sae.empty
        or build.limit_images(cfg) is not None
    ):
        return
    found, published = float(no_sae.micro_accuracy.iloc[0]), about.zero_shot
    if abs(found - published) > LARGEST_DIFFERENCE:
        log.warning(
            "CLIP alone names %.2f %% of %s rightly, where %.2f %% is published for these weights: "
            "look at the split (dataset.split_source=%s), the class names (dataset.classnames=%s), "
            "the prompts (dataset.templates=%s), the resize (bicubic to %d pixels) and QuickGELU",
            found,
            cfg.dataset.name,
            published,
            getattr(test_set, "split_source", "as it comes"),
            cfg.dataset.get("classnames", "clean"),
            cfg.dataset.get("templates", "imagenet"),
            test_set.image_size,
        )
