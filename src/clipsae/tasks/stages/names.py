"""Kind "names": what the latents of an SAE are called, on the images of its pictures.
`names.safetensors`, `names.json`, `names.csv`, `config.yaml`."""

import logging
import re
from dataclasses import replace
from pathlib import Path

from omegaconf import DictConfig

from clipsae.clip import FrozenCLIP
from clipsae.data import ImageDataset
from clipsae.errors import ConfigError
from clipsae.evaluation.truth import has_truth
from clipsae.naming.explain import Shown
from clipsae.naming.explainers import Explainer, OpenAI, Oracle, Recording
from clipsae.naming.make import Explaining, name_latents
from clipsae.naming.truth import named_right
from clipsae.naming.vocabulary import PROMPTS, Vocabulary, Words, digest, read_words, scenes_words
from clipsae.progress import Bar
from clipsae.sae import SAE
from clipsae.store import Stage, Store
from clipsae.store.files import sha256
from clipsae.tasks import build, precision
from clipsae.visualization import References

log = logging.getLogger(__name__)


def check(cfg: DictConfig, clip: FrozenCLIP, dataset: ImageDataset) -> None:
    """Refuse what cannot be named here, before anything slow begins.

    Raises:
        ConfigError: a CLIP without texts, a vocabulary that cannot be read, a prompt without a
            place for the word, regions where there are no patches, a judge that does not know the
            images.
    """
    if not clip.has_text:
        raise ConfigError(
            f"clip.name={clip.name!r} has no text tower, so its latents cannot be compared with "
            "words: choose a CLIP"
        )
    vocabulary(cfg, dataset)
    looks = explainer(cfg, Store(cfg.paths.output_dir), dataset)
    needed = looks.requests_of_a_latent(cfg.naming.judge) if looks is not None else 0
    if needed > cfg.naming.requests:
        raise ConfigError(
            f"naming.requests={cfg.naming.requests} with naming.judge={cfg.naming.judge}: expected "
            f"{needed} or more, which one latent takes"
        )
    if cfg.naming.judge == "explainer" and cfg.naming.explainer is None:
        raise ConfigError(
            "naming.judge=explainer without naming.explainer: choose openai, oracle or recording"
        )
    if cfg.naming.regions and not clip.has_patches:
        raise ConfigError(
            "naming.regions=true with clip.hook=embedding: latents of an image embedding act on "
            "whole images: leave it out"
        )
    if cfg.naming.judge == "truth" and not has_truth(dataset):
        raise ConfigError(
            f"naming.judge=truth: what the images of dataset={cfg.dataset.name} show is not known, "
            "as it is of the built-in scenes: use naming.judge=clip"
        )


def vocabulary(cfg: DictConfig, dataset: ImageDataset) -> list[Words]:
    """The words that latents may be named with.

    Raises:
        ConfigError: a file that cannot be read, or a prompt without a place for the word.
    """
    prompts, file = cfg.naming.prompts, cfg.naming.vocabulary
    for prompt in prompts or ():
        if prompt.count("{}") != 1 or set("{}") & set(prompt.replace("{}", "")):
            raise ConfigError(
                f"naming.prompts has {prompt!r}: expected one {{}} in each, where the word goes"
            )
    if file is None and has_truth(dataset):
        groups = list(scenes_words().values())
        return [replace(one, prompts=tuple(prompts)) for one in groups] if prompts else groups
    if file is None:
        words = list(dict.fromkeys(dataset.classnames))  # classes may share a name
        if len(words) < 2:
            raise ConfigError(
                f"dataset={cfg.dataset.name} has a single class, whose name every latent would "
                "have: set naming.vocabulary to a text file, one word a line"
            )
    else:
        try:
            words = read_words(file)
        except ValueError as error:
            raise ConfigError(f"naming.vocabulary={error}") from error
    return [Words(words, tuple(prompts or PROMPTS))]


def explainer(cfg: DictConfig, store: Store, dataset: ImageDataset) -> Explainer | None:
    """Who names latents by looking at their examples; None: nobody.

    Raises:
        ConfigError: options that are missing or of no use, a dataset whose images may not be sent.
    """
    naming = cfg.naming
    for option, owner in (("model", "openai"), ("recording", "recording")):
        if naming[option] is None and naming.explainer == owner:
            raise ConfigError(f"naming.explainer={owner} without naming.{option}: set it, too")
        if naming[option] is not None and naming.explainer != owner:
            raise ConfigError(
                f"naming.{option}={naming[option]} with naming.explainer="
                f"{naming.explainer or 'null'}: it is of naming.explainer={owner} alone"
            )
    if naming.explainer == "oracle":
        return Oracle(dataset=dataset)
    if naming.explainer == "recording":
        return Recording(recording=naming.recording)
    if naming.explainer is None:
        return None
    about = getattr(dataset, "about", None)
    if about is not None and not about.free and not naming.gated:
        raise ConfigError(
            f"naming.explainer=openai would send images of {about.title} (licence: "
            f"{about.licence}) to {naming.address}: naming.gated=true allows it"
        )
    file = re.sub(r"[^A-Za-z0-9.]+", "-", naming.model)
    return OpenAI(
        model=naming.model,
        address=naming.address,
        answers=store.root / "answers" / f"{file}.jsonl",
        requests=naming.requests,
    )


def stage(cfg: DictConfig, store: Store, dataset: ImageDataset, pictures: Stage) -> Stage:
    """The place of the names: the pictures, the words in their prompts and the options of `naming`
    are in the key."""
    naming = cfg.naming
    recording = naming.recording and sha256(Path(naming.recording).expanduser())
    key = {
        **{name: naming[name] for name in ("regions", "judge", "explainer", "model")},
        "requests": naming.requests if naming.explainer == "openai" else None,
        "recording": recording,
        "images": build.at_most(cfg, naming.images),
        "words": digest(vocabulary(cfg, dataset)),
        "pictures": pictures.path.name,
        "sae": pictures.key["sae"],
    }
    name = [cfg.model.name, cfg.clip.name, cfg.dataset.name, f"s{cfg.seed}"]
    return store.stage("names", name, key)


def make_names(
    cfg: DictConfig,
    store: Store,
    clip: FrozenCLIP,
    dataset: ImageDataset,
    pictures: Stage,
    trained: Stage,
) -> Stage:
    """The names of an SAE's latents, from the store, made first if missing.

    Args:
        dataset: the images of `pictures`.
        pictures: its reference images, finished.
        trained: the SAE, finished.

    Raises:
        ConfigError: see `check`.
    """
    place = stage(cfg, store, dataset, pictures)

    def write(folder: Path) -> None:
        looks = explainer(cfg, store, dataset)
        _make(cfg, clip, dataset, pictures, trained, looks, place, folder)

    place.make(write)
    return place


def _make(
    cfg: DictConfig,
    clip: FrozenCLIP,
    dataset: ImageDataset,
    pictures: Stage,
    trained: Stage,
    looks: Explainer | None,
    place: Stage,
    folder: Path,
) -> None:
    precision.apply(cfg, clip)
    clip.to(build.best_device())
    references = References.load(pictures.path)
    with Bar("embedding the vocabulary", place.progress) as bar:
        words = Vocabulary.embed(clip, vocabulary(cfg, dataset), progress=bar)
    log.info("naming %s latents with %s words", f"{references.latents:,}", f"{len(words):,}")
    explaining = None
    if looks is not None:
        top = Shown(references.index, references.values, references.maps)
        sample = Shown(references.sample_index, references.sample_values, references.sample_maps)
        explaining = Explaining(looks, top, sample, cfg.naming.requests)
    with Bar("naming latents", place.progress) as bar:
        names = build.user_error(
            name_latents,
            clip,
            SAE.load(trained.path),
            dataset,
            words,
            references.index,
            references.maps if cfg.naming.regions else None,
            images=build.at_most(cfg, cfg.naming.images),
            judge=cfg.naming.judge,
            explaining=explaining,
            batch_size=cfg.evaluation.batch_size,
            num_workers=cfg.features.num_workers,
            progress=bar,
        )
    numbers = {"named": float(names.named.float().mean())}
    if references.leading is not None and references.concept is not None:
        numbers |= named_right(
            names.text, references.source.concepts, references.leading, references.concept
        )
    replace(names, numbers=numbers).save(folder)
    build.save_config(cfg, folder)
