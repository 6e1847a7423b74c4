"""Kind "evaluation": one SAE on one dataset. `config.yaml`, and

- with `evaluation.settings`, top-n concept classification (Tables 7-17): `results.csv`,
  `diagnostics.json`, `ranking.safetensors` (unless no latents were ranked);
- with `measurement.metrics`, how sparse, faithful and monosemantic it is (Tables 5, 6), and with
  ground truth which concepts it found: `metrics.csv`, `latents.safetensors`, `concepts.csv`.
"""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from omegaconf import DictConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from clipsae.clip import FrozenCLIP
from clipsae.data import ImageDataset
from clipsae.errors import ConfigError
from clipsae.evaluation import Evaluation, check_metrics, check_topn_options, evaluate, topn
from clipsae.evaluation.encoders import image_encoder
from clipsae.evaluation.metrics import METRICS
from clipsae.evaluation.passes import Progress
from clipsae.evaluation.truth import has_truth
from clipsae.progress import Bar
from clipsae.sae import SAE
from clipsae.store import MARK, SCHEMA, Stage, Store, write_json
from clipsae.store.files import read_json
from clipsae.tasks import build, plugins, precision

log = logging.getLogger(__name__)

JUDGED_BY = ("open_clip:ViT-B-32/openai", "timm:vit_small_patch14_dinov2.lvd142m")
LARGEST_DIFFERENCE = 2.0  # points between `no_sae` and the published zero-shot accuracy


def measures(cfg: DictConfig) -> bool:
    """Whether anything is measured: `measurement.metrics` null is all, empty nothing."""
    return cfg.measurement.metrics != []


def metric_names(cfg: DictConfig) -> list[str]:
    """The metrics by name, so that one which is new is measured on finished work, too: null is all
    there are but those of other runs' plugins in this process, and those of captions where the
    tokens are of images alone."""
    plugins.load(cfg)
    if cfg.measurement.metrics is not None:
        return list(cfg.measurement.metrics)
    of_images = cfg.clip.get("hook") != "towers"
    return [
        name
        for name, metric in METRICS.items()
        if not plugins.of_others(cfg, metric)
        and not (of_images and "captions" in getattr(metric, "needs", ()))
    ]


def encoder_names(cfg: DictConfig, dataset: ImageDataset) -> list[str]:
    """The image encoders of MonoSemanticity, the main one first; none: it is not measured.

    "auto" is the source's choice, OpenAI's ViT-B/32, and DINOv2 beside it, which is not of the
    family of the CLIPs that are measured; in the built-in world the ground truth, or its own CLIP
    where there is none; nothing beside random CLIP weights.
    """
    names = cfg.measurement.image_encoder
    if names is None:
        return []
    if names != "auto":
        return [names] if isinstance(names, str) else list(names)
    if has_truth(dataset):
        return ["attributes"]
    if cfg.clip.pretrained is None:
        return []
    return ["tiny"] if cfg.clip.pretrained == "builtin" else list(JUDGED_BY)


def encoder_name(cfg: DictConfig, dataset: ImageDataset) -> str | None:
    """The first of `encoder_names`; None: there is none."""
    return next(iter(encoder_names(cfg, dataset)), None)


def stage(cfg: DictConfig, store: Store, sae_stage: Stage, test_set: ImageDataset) -> Stage | None:
    """The place of the results: the SAE, the images, and how they are evaluated and measured are
    in the key. None where nothing is asked (`evaluation=none measurement=none`)."""
    key = {
        "sae": sae_stage.path.name,
        "dataset": build.dataset_key(cfg.dataset, test_set),
        "split": cfg.evaluation.split,
        "limit_images": build.limit_images(cfg),
    }
    name = [cfg.model.name, cfg.clip.name, cfg.dataset.name]
    if cfg.evaluation.settings:
        options = build.decisive("evaluation", cfg.evaluation)
        of_images = ("split", "limit_images")
        key["evaluation"] = {k: v for k, v in options.items() if k not in of_images}
        name.append(cfg.evaluation.protocol)
        name += [cfg.evaluation.ranking] * (cfg.evaluation.ranking != "frequency")
    if measures(cfg):
        encoders = encoder_names(cfg, test_set)
        # One is its name, as in results of before.
        encoder = {"image_encoder": encoders if len(encoders) > 1 else encoder_name(cfg, test_set)}
        chosen = {"metrics": metric_names(cfg)}
        if plugged := plugins.digests(cfg, measuring=True):
            chosen["plugins"] = plugged
        key["measurement"] = build.plain(cfg.measurement) | encoder | chosen
    if not cfg.evaluation.settings and not measures(cfg):
        return None
    return store.stage("evaluation", [*name, f"s{cfg.seed}"], key, build.cell(cfg))


def check_options(cfg: DictConfig) -> None:
    """Refuse invalid options.

    Raises:
        ConfigError: see `check_topn_options`; a metric that does not exist.
    """
    options = cfg.evaluation
    if options.settings:
        asked = options.ns, options.protocol, options.settings, options.ranking
        build.user_error(check_topn_options, *asked)
    for name in cfg.measurement.metrics or ():
        if name not in METRICS:
            for metric, measured in METRICS.items():
                if any(number.key == name for number in measured.numbers):
                    raise ConfigError(
                        f"measurement.metrics=[{name}]: {name} is one of the numbers of metric "
                        f"{metric}: write measurement.metrics=[{metric}]"
                    )
        build.user_error(METRICS.__getitem__, name)


def check(cfg: DictConfig, clip: FrozenCLIP, test_set: ImageDataset, *, finished: bool) -> None:
    """Refuse now what would be refused after the training.

    Args:
        finished: whether the results are there: then no image encoder is looked for.

    Raises:
        ConfigError: a backbone without a text tower or a tokenizer; `heldout` where both splits
            are the same images: nothing would be held out; metrics that lack what they need; an
            image encoder that cannot be had.
    """
    if measures(cfg) and not finished:
        options, encoders = cfg.measurement, encoder_names(cfg, test_set)
        metrics = build.user_error(
            check_metrics,
            clip,
            test_set,
            metrics=options.metrics,
            image_encoder=encoders,
            pooling=options.pooling,
            classifier=bool(cfg.evaluation.settings),
            tokens=cfg.features.tokens,
        )
        if any("embeddings" in METRICS[metric].needs for metric in metrics):
            for name in encoders:
                image_encoder(name, test_set)
    if not cfg.evaluation.settings:
        return
    _ = clip.tokenizer
    if len(test_set.classnames) == 1:
        log.warning(
            "%s has one class, %r: every accuracy will be 100 %%, as nothing competes with it; "
            "evaluation=none leaves them out",
            *(cfg.dataset.name, test_set.classnames[0]),
        )
    if cfg.evaluation.protocol != "heldout":
        return
    counted = build.build_dataset(cfg.dataset, "train", clip.image_size)
    if counted.fingerprint == test_set.fingerprint:
        raise ConfigError(
            f"evaluation.protocol=heldout: {cfg.dataset.name} has one split only, which would be "
            "counted and evaluated alike: use protocol=paper, or lay out train/ and test/"
        )


def counts_first(cfg: DictConfig) -> bool:
    """Whether the evaluation of a config begins with a pass that counts."""
    options = cfg.evaluation
    return topn.counts_first(options.protocol, options.ranking, options.settings)


def pass_key(cfg: DictConfig) -> str:
    """The same for what can be evaluated in one pass over the images."""
    nodes = cfg.clip, cfg.dataset, cfg.evaluation, cfg.measurement
    options = [build.plain(node) for node in nodes]
    options[2].pop("count_threshold", None)  # each SAE's own
    more = build.limit_images(cfg), precision.of_clip(cfg), cfg.features.tokens
    more = (*more, cfg.model.get("target_layer"))
    return json.dumps([*options, *more])


@dataclass(frozen=True)
class Due:
    """An evaluation to be made.

    Attributes:
        trained: the SAE's place in the store.
        stage, folder: the evaluation's, and the folder that it is written into.
    """

    cfg: DictConfig
    trained: Stage
    stage: Stage
    folder: Path


def make(
    due: Sequence[Due], clip: FrozenCLIP, classifier: Tensor | None, test_set: ImageDataset
) -> None:
    """Evaluate and measure trained SAEs in one pass over the images; write into their folders.

    Args:
        due: with the same `pass_key`.
        classifier: the classes' text embeddings [C, e]; None without `evaluation.settings`.
    """
    cfg = due[0].cfg
    options = cfg.evaluation
    log.info("%s", precision.described(cfg))
    if (limit := build.limit_images(cfg)) is not None:
        log.info(
            "evaluating %d of %d images only: %s",
            min(limit, len(test_set)),
            len(test_set),
            "evaluation.limit_images"
            if cfg.evaluation.limit_images is not None
            else "with random CLIP weights the numbers mean nothing",
        )

    def report(done: int, total: int) -> None:
        for one in due:
            one.stage.progress(done, total)

    saes = {one.stage.path.name: SAE.load(one.trained.path) for one in due}
    thresholds = {one.stage.path.name: one.cfg.evaluation.count_threshold for one in due}
    with Bar(f"evaluating {build.title(cfg, len(due))}", report) as bar:
        result = compute(cfg, clip, saes, thresholds, classifier, test_set, limit, bar)
    for one in due:
        if options.settings:
            write_topn(one.cfg, result, one.stage.path.name, one.folder)
        if measures(cfg):
            write_metrics(one.cfg, result, one.stage.path.name, one.folder)
        build.save_config(one.cfg, one.folder)


def compute(
    cfg: DictConfig,
    clip: FrozenCLIP,
    saes: Mapping[str, SAE],
    thresholds: Mapping[str, float],
    classifier: Tensor | None,
    test_set: ImageDataset,
    limit: int | None,
    progress: Progress,
) -> Evaluation:
    """Evaluate and measure SAEs as a config asks for, on the best device that is there.

    Args:
        thresholds: `evaluation.count_threshold` of each SAE.
        limit: images; None: all.
        progress: called with (done, total, what).
    """
    options, device = cfg.evaluation, build.best_device()
    precision.apply(cfg, clip)
    count_set = None
    if options.settings and options.protocol == "heldout":
        count_set = build.build_dataset(cfg.dataset, "train", clip.image_size)
    return evaluate(
        clip.to(device),
        {name: sae.to(device) for name, sae in saes.items()},
        test_set,
        classifier,
        ns=tuple(options.ns),
        settings=tuple(options.settings),
        protocol=options.protocol,
        ranking=options.ranking,
        count_dataset=count_set,
        count_threshold=thresholds,
        count_share=options.count_share,
        **build.plain(cfg.measurement) | {"image_encoder": encoder_names(cfg, test_set)},
        batch_size=options.batch_size,
        limit_images=limit,
        num_workers=cfg.features.num_workers,
        device=device,
        progress=progress,
    )


def write_topn(cfg: DictConfig, result: Evaluation, name: str, folder: Path) -> None:
    """What top-n classification found of one SAE."""
    rows = [
        {**build.cell(cfg), **{k: v for k, v in row.items() if k != "sae"}}
        for row in result.rows
        if row["sae"] in (None, name)
    ]
    pd.DataFrame(rows).to_csv(folder / "results.csv", index=False)
    write_json(
        folder / "diagnostics.json",
        {
            # None where no setting uses the SAE.
            "count_threshold": result.count_threshold.get(name),
            "share_above_threshold": result.share_above_threshold.get(name),
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


def write_metrics(cfg: DictConfig, result: Evaluation, name: str, folder: Path) -> None:
    """What was measured of one SAE: numbers, those of each latent, and of each concept."""
    about = {
        **build.cell(cfg),
        "images": result.images,
        "image_encoder": result.image_encoder,
        "pooling": result.pooling,
    }
    rows = [
        {**about, "metric": row["metric"], "value": row["value"]}
        for row in result.metrics
        if row["sae"] == name
    ]
    pd.DataFrame(rows).to_csv(folder / "metrics.csv", index=False)
    if scores := result.per_latent[name]:
        scores = {key: value.contiguous() for key, value in scores.items()}
        save_file(scores, folder / "latents.safetensors")
    if result.concepts[name]:
        pd.DataFrame(result.concepts[name]).to_csv(folder / "concepts.csv", index=False)


def read(folder: Path) -> tuple[pd.DataFrame, dict[str, float]]:
    """Of finished results the tidy rows of top-n classification and the measured numbers by name;
    empty where there are none."""
    rows, metrics = folder / "results.csv", folder / "metrics.csv"
    numbers = pd.read_csv(metrics) if metrics.is_file() else pd.DataFrame(columns=["metric"])
    return (
        pd.read_csv(rows) if rows.is_file() else pd.DataFrame(),
        {} if numbers.empty else dict(zip(numbers.metric, numbers.value, strict=True)),
    )


def ranking(
    cfg: DictConfig, store: Store, sae_stage: Stage, test_set: ImageDataset
) -> dict[int, list[int]] | None:
    """Each class's latents in the order in which `on_n` keeps them, the classes alone that had
    images, by a finished evaluation with this config and any measurement; None: there is none,
    or no latents were ranked."""
    asked = stage(cfg, store, sae_stage, test_set)
    if asked is None:
        return None
    wanted = json.loads(json.dumps(asked.key | {"measurement": None}))
    for folder in store.finished("evaluation"):
        mark, file = read_json(folder / MARK), folder / "ranking.safetensors"
        key = {**mark.get("key", {}), "measurement": None}
        if mark.get("schema") == SCHEMA and key == wanted and file.is_file():
            found = load_file(file)
            latents = found["latents"].tolist()
            counted = (found["images"] > 0).nonzero().flatten().tolist()
            return {label: latents[label] for label in counted}
    return None


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
            "CLIP's zero-shot accuracy on %s is %.2f %%, published for these weights is %.2f %%: "
            "check the split (dataset.split_source=%s), the class names (dataset.classnames=%s), "
            "the prompts (dataset.templates=%s), the resize (bicubic to %d pixels) and QuickGELU",
            cfg.dataset.name,
            found,
            published,
            getattr(test_set, "split_source", "as it comes"),
            cfg.dataset.get("classnames", "clean"),
            cfg.dataset.get("templates", "imagenet"),
            test_set.image_size,
        )
