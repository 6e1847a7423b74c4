"""Kind "steering": what interventions on an SAE's latents do to zero-shot predictions.
`steering.csv`, `steering.json`, `config.yaml`."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import DictConfig
from torch import Tensor

from clipsae.clip import FrozenCLIP
from clipsae.data import ImageDataset
from clipsae.errors import ConfigError
from clipsae.evaluation.steering import Steering, measure_steering, threshold
from clipsae.progress import Bar
from clipsae.sae import SAE
from clipsae.store import Stage, Store, write_json
from clipsae.tasks import build, precision
from clipsae.tasks.pictures import Dictionary
from clipsae.tasks.stages import classifier
from clipsae.visualization import References


def check(cfg: DictConfig, clip: FrozenCLIP, dataset: ImageDataset) -> None:
    """Refuse what cannot be steered, before anything slow begins.

    Raises:
        ConfigError: a CLIP without texts, a dataset with one class.
    """
    clip.require_text()
    if len(dataset.classnames) < 2:
        raise ConfigError(
            f"dataset={cfg.dataset.name} has one class: a prediction can be steered between two or "
            "more; choose another dataset"
        )


def stage(
    cfg: DictConfig, store: Store, clip: FrozenCLIP, found: Dictionary, classes: str
) -> Stage:
    """The place of the numbers: the SAE's pictures, the classes' embeddings (their stage's name)
    and what is measured are in the key."""
    options = ("latents", "strengths", "images", "random")
    key = {
        "pictures": found.pictures.path.name,
        "sae": found.trained.path.name,
        "classifier": classes,
        "limit_images": build.limit_images(cfg),
        **{name: build.plain(cfg.task)[name] for name in options},
    }
    name = [cfg.model.name, clip.name, cfg.dataset.name, f"s{cfg.seed}"]
    return store.stage("steering", name, key)


def chosen_sets(latents: Any, references: References) -> list[list[int]]:
    """The sets of latents that `task.latents` asks for.

    Raises:
        ConfigError: a latent that does not exist or is never active, or comes twice in a set.
    """
    alive = references.alive
    if latents == "alive" or isinstance(latents, int):
        order = references.token_frequency.argsort(descending=True, stable=True)
        kept = order[alive[order]].tolist()
        return [[m] for m in kept[: None if latents == "alive" else latents]]
    sets = [[one] if isinstance(one, int) else list(one) for one in latents]
    for one in sets:
        for m in one:
            if m >= references.latents or not alive[m]:
                raise ConfigError(
                    f"task.latents has {m}: expected latents of 0 to {references.latents - 1} that "
                    f"are active on these images, as {int(alive.sum()):,} are"
                )
        if len(set(one)) < len(one):
            raise ConfigError(f"task.latents has {one}: expected each latent of a set once")
    return sets


def make(
    cfg: DictConfig,
    store: Store,
    clip: FrozenCLIP,
    dataset: ImageDataset,
    found: Dictionary,
) -> Stage:
    """The numbers from the store, made first if missing.

    Raises:
        ConfigError: see `check` and `chosen_sets`.
    """
    references = References.load(found.pictures.path)
    sets = chosen_sets(build.plain(cfg.task)["latents"], references)
    rows = classifier.embeddings(cfg, store, clip, dataset)
    classes = classifier.stage(cfg, store, dataset, cfg.dataset.name).path.name
    place = stage(cfg, store, clip, found, classes)

    def write(folder: Path) -> None:
        precision.apply(cfg, clip)
        clip.to(build.best_device())
        with Bar("steering", place.progress) as bar:
            table, numbers = measure(
                cfg,
                clip,
                SAE.load(found.trained.path),
                dataset,
                rows,
                sets,
                references,
                scratch=place.scratch,
                progress=bar,
            )
        table.to_csv(folder / "steering.csv", index=False)
        write_json(folder / "steering.json", numbers)
        build.save_config(cfg, folder)

    place.make(write)
    return place


def measure(
    cfg: DictConfig,
    clip: FrozenCLIP,
    sae: SAE,
    dataset: ImageDataset,
    rows: Tensor,
    sets: list[list[int]],
    references: References,
    **options: Any,
) -> tuple[pd.DataFrame, dict[str, float]]:
    """One row for each strength and set, and the numbers of the dictionary by strength."""
    strengths = [float(one) for one in cfg.task.strengths]
    most = references.values[:, 0].double().tolist()
    steered, random = build.user_error(
        measure_steering,
        clip,
        sae,
        dataset,
        rows,
        sets * len(strengths),
        [[s * most[m] for m in one] for s in strengths for one in sets],
        random=cfg.task.random * len(strengths),
        seed=cfg.seed,
        images=build.at_most(cfg, cfg.task.images),
        batch_size=cfg.evaluation.batch_size,
        num_workers=cfg.features.num_workers,
        **options,
    )
    # They are evenly spaced among all: as many of each strength.
    share = len(random.images) // len(strengths) if strengths else 0
    table: list[dict[str, Any]] = []
    numbers: dict[str, float] = {}
    for i, strength in enumerate(strengths):
        own = steered.chosen(slice(i * len(sets), (i + 1) * len(sets)))
        floor = random.chosen(slice(i * share, (i + 1) * share))
        table += csv_rows(own, floor, sets, strength, dataset.classnames)
        numbers |= {f"{k}_at_{strength:g}": v for k, v in summary(own, floor).items()}
    return pd.DataFrame(table), numbers


def csv_rows(
    steered: Steering,
    random: Steering,
    sets: list[list[int]],
    strength: float,
    classnames: Sequence[str],
) -> list[dict[str, Any]]:
    """A row for each set at one strength."""
    floor, found = threshold(random), []
    for v, one in enumerate(sets):
        target = int(steered.target[v])
        others = steered.others(v) if target >= 0 else []
        found.append(
            {
                "latents": "+".join(map(str, one)),
                "strength": strength,
                "images": int(steered.images[v]),
                "target": classnames[target] if target >= 0 else "",
                **{
                    name: float(getattr(steered, name)[v])
                    for name in ("steerability", "low", "high", "specificity", "flipped")
                },
                "random": floor,
                "steers": bool(steered.low[v] > floor),
                "others": ", ".join(f"{classnames[k]} {e:+.2f}" for k, e in others),
            }
        )
    return found


def summary(steered: Steering, random: Steering) -> dict[str, float]:
    """Numbers of all sets at one strength: means over those that are measured, and the same of
    random directions; the share that steers."""
    found = {}
    floor = threshold(random)
    for suffix, one in (("", steered), ("_random", random)):
        known = one.steerability.isfinite()
        few = not bool(known.any())
        for name in ("steerability", "specificity", "flipped"):
            values = getattr(one, name)[known]
            found[f"{name}{suffix}"] = math.nan if few else float(values.double().mean())
    known = steered.low.isfinite()
    if bool(known.any()):
        found["steers"] = float((steered.low[known] > floor).double().mean())
    return found
