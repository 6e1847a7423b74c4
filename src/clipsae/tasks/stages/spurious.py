"""Kind "spurious": group accuracies with latents of the confounder taken out. `spurious.csv`,
`spurious.json`, `config.yaml`."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from clipsae.clip import FrozenCLIP
from clipsae.data import ImageDataset
from clipsae.errors import ConfigError
from clipsae.evaluation.passes import evenly_spaced
from clipsae.evaluation.spurious import (
    Probe,
    confounder_auroc,
    confounder_directions,
    embeddings_without,
    group_accuracy,
    projected,
)
from clipsae.naming import Names
from clipsae.naming.activity import Activity, collect_activity
from clipsae.progress import Bar
from clipsae.sae import SAE
from clipsae.store import Stage, Store, write_json
from clipsae.tasks import build, precision
from clipsae.tasks.pictures import Dictionary
from clipsae.tasks.stages import classifier, names

log = logging.getLogger(__name__)

OPTIONS = ("names", "counts", "draws", "images")


@dataclass(frozen=True)
class Removal:
    """A set of latents to take out.

    Attributes:
        method: who chose them: "name", "score", "random"; "none".
        latents: which.
        draw: of the random ones.
    """

    method: str
    latents: list[int]
    draw: int = 0


def check(cfg: DictConfig, clip: FrozenCLIP, dataset: ImageDataset) -> None:
    """Refuse a dataset without groups, and what cannot be named.

    Raises:
        ConfigError: as it says.
    """
    if not hasattr(dataset, "groups"):
        raise ConfigError(
            f"dataset={cfg.dataset.name} has no groups of class and confounder: use "
            "scenes_spurious, waterbirds or celeba, or a class with `groups`, `groupnames` and "
            "`confounder` as clipsae.data.published.groups has"
        )
    names.check(cfg, clip, dataset)
    known = {word for group in names.vocabulary(cfg, dataset) for word in group.words}
    for word in wanted_words(cfg, dataset):
        if word not in known:
            raise ConfigError(
                f"task.names has {word!r}: no latent can have that name, as it is not among the "
                f"{len(known):,} words of the vocabulary: add it to the file of naming.vocabulary, "
                "or choose other words"
            )


def wanted_words(cfg: DictConfig, dataset: Any) -> list[str]:
    """The names of the latents that are taken out."""
    return list(dataset.confounder if cfg.task.names is None else cfg.task.names)


def stage(
    cfg: DictConfig, store: Store, found: Dictionary, named: Stage, classes: str, test: ImageDataset
) -> Stage:
    """The place of the numbers: the names, the test images, the classes' embeddings and what is
    taken out are in the key."""
    key = {
        "names": named.path.name,
        "sae": found.trained.path.name,
        "classifier": classes,
        "test": build.dataset_key(cfg.dataset, test),
        "limit_images": build.limit_images(cfg),
        **{name: build.plain(cfg.task)[name] for name in OPTIONS},
    }
    return store.stage("spurious", [cfg.model.name, cfg.clip.name, cfg.dataset.name], key)


def make(
    cfg: DictConfig, store: Store, clip: FrozenCLIP, dataset: ImageDataset, found: Dictionary
) -> Stage:
    """The numbers from the store, made first if missing, as are the latents' names.

    Args:
        dataset: the training images.
    """
    named = names.make_names(cfg, store, clip, dataset, found.pictures, found.trained)
    test = build.build_dataset(cfg.dataset, "test", clip.image_size)
    rows = classifier.embeddings(cfg, store, clip, test)
    classes = classifier.stage(cfg, store, test, cfg.dataset.name).path.name
    place = stage(cfg, store, found, named, classes, test)

    def write(folder: Path) -> None:
        precision.apply(cfg, clip)
        clip.to(build.best_device())
        table, about = build.user_error(
            measure,
            cfg,
            clip,
            SAE.load(found.trained.path),
            dataset,
            test,
            rows,
            Names.load(named.path),
            place,
        )
        table.to_csv(folder / "spurious.csv", index=False)
        write_json(folder / "spurious.json", about)
        build.save_config(cfg, folder)

    place.make(write)
    return place


def removals(
    named: Sequence[int], scored: Sequence[int], alive: Tensor, counts: Sequence[int], draws: int
) -> list[Removal]:
    """What is taken out: nothing, and for each count as many latents by name, by score and at
    random; all that have a name, too.

    Args:
        named: the latents with one of the names, in the order in which they are taken.
        scored: latents, by their score.
        alive: LongTensor, those among which random ones are drawn.
    """
    found = [Removal("none", [])]
    sizes = sorted({n for n in counts if n <= len(alive)} | ({len(named)} - {0}))
    generator = torch.Generator().manual_seed(0)
    for n in sizes:
        if n <= len(named):
            found.append(Removal("name", list(named[:n])))
        if n <= len(scored):
            found.append(Removal("score", list(scored[:n])))
        for draw in range(draws):
            order = torch.randperm(len(alive), generator=generator)[:n]
            found.append(Removal("random", alive[order].tolist(), draw))
    return found


def named_latents(found: Names, words: Sequence[str], size: Tensor) -> list[int]:
    """The latents whose name is one of the words and can be trusted, the largest first: no label is
    needed to know it.

    Args:
        size: [M], how much of the tokens they are.
    """
    kept = [m for m in found.named.nonzero().flatten().tolist() if found.text[m] in words]
    return sorted(kept, key=lambda m: (-float(size[m]), m))


def scored_latents(activity: Activity, groups: Tensor, values: int) -> list[int]:
    """Latents by how well they tell one of the confounder's values, best first; those alone that do
    better than chance."""
    best = confounder_auroc(activity.codes, groups[activity.indices], values).nan_to_num().amax(1)
    order = best.argsort(descending=True, stable=True)
    return order[best[order] > 0.5].tolist()


def measure(
    cfg: DictConfig,
    clip: FrozenCLIP,
    sae: SAE,
    train: Any,
    test: Any,
    classes: Tensor,
    found: Names,
    place: Stage,
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Rows of all classifiers and removals, and which latents were taken out."""
    reading = {"batch_size": cfg.evaluation.batch_size, "num_workers": cfg.features.num_workers}
    limit = build.at_most(cfg, cfg.task.images)
    words, values = wanted_words(cfg, train), len(train.confounder)
    with Bar("codes of the training images", place.progress) as bar:
        activity = collect_activity(clip, sae, train, limit_images=limit, **reading, progress=bar)
    size = activity.codes.totals() * sae.decoder_rows().detach().norm(dim=1).cpu()
    named = named_latents(found, words, size)
    try:
        scored = scored_latents(activity, train.groups, values)
    except ValueError as error:
        log.warning("%s", error)
        scored = []
    alive = (activity.codes.count() > 0).nonzero().squeeze(1)
    if not named:
        log.warning("no latent has one of the names %s, as far as can be trusted", words)
    removed = removals(named, scored, alive, cfg.task.counts, cfg.task.draws)
    sets = [one.latents for one in removed]
    parts = {}
    for split, dataset in (("train", train), ("test", test)):
        indices = evenly_spaced(dataset.labels, limit)
        with Bar(f"{split} images without latents", place.progress) as bar:
            parts[split] = embeddings_without(
                clip, sae, dataset, sets, indices, **reading, progress=bar
            )
    (x, of_x), (y, of_y) = parts["train"], parts["test"]
    table = accuracies(
        removed,
        (x, train.labels[of_x], train.groups[of_x]),
        (y, test.labels[of_y], test.groups[of_y]),
        nn.functional.normalize(classes.float(), dim=-1),
        values,
    )
    for row in table:
        row["group"] = test.groupnames[row["group"]]
    about = {"words": words, "named": named, "scored": scored[: max(cfg.task.counts, default=0)]}
    return pd.DataFrame(table), about


def accuracies(
    removed: Sequence[Removal],
    train: tuple[Tensor, Tensor, Tensor],
    test: tuple[Tensor, Tensor, Tensor],
    classes: Tensor,
    values: int,
) -> list[dict[str, Any]]:
    """Group accuracies of each classifier on the test images.

    Classifiers are "zero_shot" by the texts; "probe", fitted on the training images as they are;
    "refit", fitted with the same taken out of these, too. Beside the removals are "projection",
    where what lies in the confounder's directions is taken out of the embeddings, and "balanced", a
    probe for which each training group has the same weight.

    Args:
        removed: V removals, the first of nothing.
        train, test: embeddings [V, N, e], labels [N], groups [N].
        classes: unit text embeddings [C, e].
        values: A.
    """
    (x, label, group), (y, truth, groups) = train, test
    probe, rows = Probe(x[0], label), []

    def add(
        method: str, of: Mapping[str, Tensor], latents: Sequence[int] = (), draw: int = 0
    ) -> None:
        for name, said in of.items():
            found = group_accuracy(said, truth, groups)
            rows.append(
                {
                    "method": method,
                    "n": len(latents),
                    "draw": draw,
                    "classifier": name,
                    "average": 100 * found.average,
                    "worst": 100 * found.worst,
                    "low": 100 * found.low,
                    "high": 100 * found.high,
                    "group": found.group,
                    "latents": "+".join(map(str, latents)),
                }
            )

    def by_all(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {
            "zero_shot": (y @ classes.T).argmax(dim=1),
            "probe": probe.predict(y),
            "refit": Probe(x, label).predict(y),
        }

    for v, one in enumerate(removed):
        add(one.method, by_all(x[v], y[v]), one.latents, one.draw)
    add("balanced", {"refit": Probe(x[0], label, group).predict(y[0])})
    try:
        directions = confounder_directions(x[0], group, values)
    except ValueError as error:
        log.warning("%s", error)
    else:
        add("projection", by_all(projected(x[0], directions), projected(y[0], directions)))
    return rows
