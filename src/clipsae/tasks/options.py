"""What each key of `conf/` may be. Checked before torch is imported: a typo is answered within a
second.

What needs more than the value itself (files, the model, the dataset) is checked where it is used.
Groups that plugins extend have rules for the keys that are there; their classes know the others.
"""

import ast
import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import MissingConfigException
from omegaconf import DictConfig, OmegaConf

from clipsae.errors import ConfigError
from clipsae.overrides import near, renamed
from clipsae.rules import (
    CLIP,
    FLAG,
    HOOKS,
    NAME,
    NORM_RATIO,
    PRECISIONS,
    TEXT,
    TOKENS,
    Rule,
    check_layer,
    check_layers,
    either,
    is_whole,
    list_of,
    number,
    one_of,
    or_null,
    require,
    share,
    unset,
    whole,
)
from clipsae.store.files import read_json

SPLIT = one_of("train", "test")
TINY = Path(__file__).parents[1] / "clip" / "tiny"

SHARE = Rule("a share of them, up to 1.0", lambda v: isinstance(v, float) and 0 <= v <= 1)

AUTO = Rule("auto", lambda v: v == "auto")

# What `model.fit` may be: SAEs that are computed (clipsae.training.baselines), and whether the data
# decide how many latents there are.
FITS = {
    **dict.fromkeys(("neurons", "pca", "ica", "text"), True),
    **dict.fromkeys(("kmeans", "random"), False),
}
FIT_KEYS = {  # all that such a model has; `freeze` is refused in words of its own
    *("name", "fit", "architecture", "activation", "latents", "initial_images", "freeze"),
}

TRAINER = {
    "_target_": TEXT,
    "accelerator": TEXT,
    "devices": either(whole(1), list_of(whole(0), least=1)),
    "num_nodes": whole(1),
    "strategy": TEXT,
    "max_steps": whole(0),  # 0: as initialised
    "accumulate_grad_batches": whole(1),
    "gradient_clip_val": or_null(number(above=0)),
    "log_every_n_steps": whole(1),
    "val_check_interval": whole(1),
    "limit_val_batches": either(whole(0), SHARE),
    "num_sanity_val_steps": whole(0),
    "deterministic": one_of(True, False, "warn"),
    "limit_train_batches": or_null(either(whole(1), SHARE)),
    # What a run sets itself, or what would leave nothing to continue from.
    **dict.fromkeys(
        ("fast_dev_run", "max_epochs", "min_epochs", "min_steps", "barebones"),
        unset("the length of a training is trainer.max_steps"),
    ),
    **dict.fromkeys(
        ("logger", "enable_autolog_hparams"), unset("choose logger=wandb, csv or none")
    ),
    "callbacks": unset(
        "they are set by keys such as callbacks.reference_sheet_every_n_steps; "
        "a new one is created in tasks/watch.py"
    ),
    "enable_checkpointing": unset(
        "it is always on, every callbacks.checkpoint_every_n_steps and checkpoint_every_n_seconds"
    ),
    "check_val_every_n_epoch": unset("validations are every trainer.val_check_interval steps"),
    "enable_progress_bar": unset("it is callbacks.progress_bar"),
    "enable_model_summary": unset("there is none"),
    "default_root_dir": unset("it is paths.output_dir"),
    "plugins": unset("the run chooses them"),
    "model_registry": unset("SAEs are uploaded by logger.upload_sae or task=export"),
}

DATASET = {
    "_target_": TEXT,
    "name": NAME,
    "root": TEXT,
    "split_source": one_of("auto", "coop", "official"),
    "classnames": one_of("clean", "raw"),
    "classes": one_of("all", "present"),
    "templates": one_of("imagenet", "dataset"),
    "on_bad_image": one_of("error", "skip"),
    "ignored": list_of(whole(0)),
    "download": FLAG,
    "captions": or_null(TEXT),
    "kind": TEXT,
    "seed": whole(0),
    "size": either(
        whole(1),
        Rule(
            "such a number for train and test",
            lambda v: (
                isinstance(v, dict)
                and set(v) == {"train", "test"}
                and all(is_whole(n) and n >= 1 for n in v.values())
            ),
        ),
    ),
}
OPTIONS: dict[str, Mapping[str, Any]] = {
    "": {
        "seed": whole(0, 2**32 - 1),
        "plugins": list_of(TEXT),
        "together": FLAG,
        "sweep_name": NAME,
        "precision": one_of("auto", *PRECISIONS),
    },
    "paths": {"output_dir": TEXT, "data_dir": TEXT},
    "clip": CLIP,
    "trainer": TRAINER,
    "model": {
        "name": NAME,
        "architecture": TEXT,
        "activation": TEXT,
        "latents": or_null(whole(1)),  # null: see `_check_fit`
        "initial_images": whole(1),
        "statistics_images": whole(1),
        "compile": FLAG,
        "normalize": one_of("none", "unit", "layer_norm", "mean_std", "whiten"),
        "whitening": share("a number from 0 to 1"),
        "position_mean": FLAG,
        "target_layer": or_null(whole()),
        "freeze": or_null(one_of("decoder", "encoder", "soft_decoder")),
        "fit": or_null(one_of(*FITS)),
        "k": either(whole(1), AUTO),
        "target_l0": or_null(either(number(above=0), AUTO)),
        "prefixes": or_null(
            either(one_of("fixed", "drawn"), list_of(number(above=0), least=1)),
        ),
        "prefix_weights": or_null(list_of(number(least=0), least=1)),
        "n_prefixes": whole(1),
        "nested_k": or_null(list_of(whole(1), least=1)),
        "nested_k_weights": either(one_of("uniform", "reverse"), list_of(number(least=0), least=1)),
    },
    "dataset": DATASET,
    "train_dataset": DATASET,
    "optimizer": {
        "learning_rate": number(above=0),
        "betas": list_of(share("a number from 0 to below 1", one=False), least=2, most=2),
        "warmup_steps": whole(0),
        "decay": one_of("constant", "cosine", "linear"),
        "decay_fraction": share("a number above 0, up to 1", zero=False),
        "sparsity_warmup_steps": whole(0),
        "reference_latents": or_null(whole(1)),
    },
    "features": {
        "batch_size": whole(1),
        "shuffle_buffer_images": whole(0),
        "tokens": TOKENS,
        "max_norm_ratio": NORM_RATIO,
        "num_workers": whole(0),
        "block_images": whole(1),
        "buffer_images": whole(0),
        "cache": {
            "folder": TEXT,
            "dtype": one_of("bf16", "fp16", "fp32"),
            "order_seed": whole(0),
            "shard_gb": number(above=0),
        },
        "image_cache": {"folder": TEXT, "shard_gb": number(above=0)},
    },
    "callbacks": {
        "checkpoint_every_n_steps": whole(1),
        "checkpoint_every_n_seconds": number(above=0),
        "progress_bar": FLAG,
        "prediction_images": whole(0),
        "reference_sheet_every_n_steps": whole(0),
        "reference_sheet_images": whole(1),
    },
    "evaluation": {
        "protocol": one_of("paper", "heldout"),
        "ranking": one_of("frequency", "contrast"),
        "ns": list_of(whole(1), least=1),
        "settings": list_of(one_of("no_sae", "on", "off", "self")),
        "count_threshold": number(least=0),
        "count_share": or_null(share("a share above 0, up to 1", zero=False)),
        "split": SPLIT,
        "batch_size": whole(1),
        "limit_images": or_null(whole(1)),
        "renormalize_text": FLAG,
    },
    "measurement": {
        "metrics": or_null(list_of(TEXT)),
        "image_encoder": or_null(either(TEXT, list_of(TEXT, least=1))),
        "pooling": one_of("mean", "max", "cls"),
        "sample_tokens": whole(1),
        "sample_images": whole(1),
        "k": whole(1),
        "threshold": share("a number from 0 to 1"),
        "seed": whole(0),
    },
    "naming": {
        "vocabulary": or_null(TEXT),
        "prompts": or_null(list_of(TEXT, least=1)),
        "regions": FLAG,
        "images": whole(2),
        "judge": one_of("clip", "truth", "explainer"),
        "explainer": or_null(one_of("openai", "oracle", "recording")),
        "model": or_null(TEXT),
        "address": Rule(
            "an address such as http://localhost:8000/v1",
            lambda v: isinstance(v, str) and v.startswith(("http://", "https://")),
        ),
        "requests": whole(1),
        "gated": FLAG,
        "recording": or_null(TEXT),
    },
    "logger": {
        "_target_": TEXT,
        "project": NAME,
        "entity": or_null(NAME),
        "mode": or_null(one_of("online", "offline", "disabled")),
        "group": or_null(NAME),
        "tags": list_of(NAME),
        "upload_sae": FLAG,
        "finish_timeout": number(least=0),
    },
    "resources": {
        "gpus": or_null(whole(0)),
        "cpus": whole(1),
        "mem_gb": or_null(number(above=0)),
        "minutes": whole(1),
    },
}

RUN = {"_target_": TEXT, "hydra_mode": one_of("RUN", "MULTIRUN")}
NAMES = or_null(list_of(NAME))
TASKS: dict[str, Mapping[str, Any]] = {
    "cache": {"verify": FLAG},
    "check": {"json": FLAG, "seconds": number(above=0), "run_dir": TEXT, "sweep_dir": TEXT},
    "dashboard": {
        "project": NAME,
        "entity": or_null(NAME),
        "sweep": NAME,
        "datasets": NAMES,
        "ns": list_of(whole(1), least=1),
        "file": TEXT,
    },
    "data": {"datasets": NAMES},
    "evaluate": {"sae": or_null(TEXT), "name": or_null(NAME), "count_threshold": number(least=0)},
    "experiment": {},
    "explore": {
        "sae": or_null(TEXT),
        "models": NAMES,
        "split": SPLIT,
        "pages": whole(0),
        "thumbnails": FLAG,
        "effect_images": whole(0, 10),  # of 10 reference images
        "neighbours": whole(0),
        "names": FLAG,
        "upload": FLAG,
        "serve": FLAG,
        "port": whole(0, 65535),
    },
    "explain": {"sae": or_null(TEXT), "split": SPLIT},
    "export": {
        "sae": or_null(TEXT),
        "to": one_of("clipsae", "saelens", "visaebench"),
        "folder": or_null(TEXT),
        "push": or_null(TEXT),
        "private": FLAG,
    },
    "findings": {"folder": TEXT, "sweep_dir": TEXT},
    "gc": {"delete": FLAG, "unused": FLAG},
    "report": {
        "clip": TEXT,
        "weights": or_null(TEXT),
        "layer": whole(),
        "hook": one_of(*HOOKS),
        "protocol": one_of("paper", "heldout"),
        "ranking": one_of("frequency", "contrast"),
        "latents": or_null(whole(1)),
        "models": NAMES,
        "datasets": NAMES,
        "k": or_null(whole(1)),
        "folder": TEXT,
    },
    "name": {"sae": or_null(TEXT), "split": SPLIT, "rows": whole(0)},
    "spurious": {
        "sae": or_null(TEXT),
        "split": Rule("train", lambda v: v == "train"),
        "names": or_null(list_of(TEXT, least=1)),
        "counts": list_of(whole(1), least=1),
        "draws": whole(0),
        "images": whole(1),
    },
    "status": {"json": FLAG, "sweep_dir": TEXT},
    "steer": {
        "sae": or_null(TEXT),
        "split": SPLIT,
        "latents": either(
            Rule("alive", lambda v: v == "alive"),
            either(whole(1), list_of(either(whole(0), list_of(whole(0), least=1)), least=1)),
        ),
        "strengths": list_of(number(least=0), least=1),
        "images": whole(2),
        "random": whole(0),
        "rows": whole(0),
    },
    "visualize": {
        "sae": or_null(TEXT),
        "images": list_of(TEXT),
        "indices": or_null(list_of(whole(0))),
        "models": NAMES,
        "split": SPLIT,
        "top": whole(1),
        "references": whole(1, 10),
        "mask_references": FLAG,
        "filter": one_of("frequency", "strength", "none"),
        "max_frequency": share("a share, 0 to 1"),
        "max_strength": number(least=0),
    },
}
OPEN = ("", "trainer", "model", "dataset", "train_dataset")  # may have more keys
# These need no dataset.
WITHOUT_DATASET = ("dashboard", "data", "gc", "report", "status")


def check(cfg: DictConfig, overrides: Sequence[str] = (), *, of_sweep: Sequence[str] = ()) -> None:
    """Refuse values that no run can use, and unknown keys.

    Args:
        cfg: composed, as `run.py` has it.
        overrides: of the command line; a new key at the config's top (`+name=...`) is refused.
        of_sweep: those of Hydra's own part where no sweep reads them: chosen grids are refused.

    Raises:
        ConfigError: the first, by its name: the value, what was expected.
    """
    # Hydra's own part, which a launcher's configs have, cannot be resolved before a job.
    cfg = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])
    for override in of_sweep:
        if override.lstrip("+").startswith("hydra.sweeper.only="):
            raise ConfigError(
                f"{override}: this command runs one config, and no sweep that has grids: add "
                "sweeps=findings, or another, or leave it out"
            )
    # What is missing first: an interpolation of it could not be resolved.
    target = str(OmegaConf.to_container(cfg.task, resolve=False).get("_target_"))
    task = target.removeprefix("clipsae.tasks.").removesuffix(".run")
    if task not in WITHOUT_DATASET:
        for key in sorted(OmegaConf.missing_keys(cfg)):
            raise ConfigError(f"{key} is not given: add {key}=... to the command")
    node = OmegaConf.to_container(cfg, resolve=True)
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        if override.startswith("+") and "." not in key and not isinstance(node.get(key), dict):
            raise unknown_key("", key, [one for one in node if one != key], value)
    for old, (new, value) in renamed(node).items():
        raise ConfigError(f"{old}={_shown(value)}: {old} is now {new}")
    measurement = node.get("measurement") or {}
    if measurement.get("metrics") and "pooling" not in measurement:
        raise ConfigError(
            f"measurement.metrics={_shown(measurement['metrics'])} with measurement=none, which "
            "measures nothing: leave out measurement=none"
        )
    for group in ("dataset", "train_dataset"):
        if "_target_" not in node[group]:
            raise ConfigError(f"{group} has no _target_: with train_dataset=same set dataset's")
    if (new := node["trainer"].keys() - TRAINER.keys()) and (known := _trainer_options()):
        for key in sorted(new - set(known)):
            raise unknown_key("trainer", key, known, node["trainer"][key])
    of_task = {"task": {**RUN, **TASKS[task]}} if task in TASKS else {}
    for group, rules in {**OPTIONS, **of_task}.items():
        values = node[group] if group else {key: node[key] for key in rules}
        if str(values.get("_target_", "clipsae")).startswith(("clipsae", "lightning")):
            _check_group(group, values, rules, group not in OPEN)
    if blocks := _blocks(node["clip"]["name"]):
        check_layer(node["clip"]["name"], node["clip"]["layer"], blocks)
    if (target := node["model"].get("target_layer")) is not None:
        check_layers(node["clip"].get("hook", "resid"), (node["clip"]["layer"], target))
    _check_fit(node["model"])
    if is_whole(k := node["model"].get("k")):
        most = whole(1, node["model"]["latents"], "model.latents")
        require("model.k", k, most, shown=_shown)


def _check_fit(model: Mapping[str, Any]) -> None:
    """Refuse to fit what has options of a training, a number of latents where the data decide it,
    and none where they do not."""
    fit, latents = model.get("fit"), model.get("latents")
    if fit is not None and (others := sorted(model.keys() - FIT_KEYS)):
        if model["name"] != fit:
            raise ConfigError(
                f"model.fit={fit}: write model={fit}, which sets it, in place of "
                f"model={model['name']}, which is trained"
            )
        raise ConfigError(
            f"model.{others[0]}={_shown(model[others[0]])}: model={fit} has no such option: leave "
            "it out"
        )
    if FITS.get(fit, False) != (latents is None):
        raise ConfigError(
            f"model.latents={_shown(latents)}: "
            + (
                f"the tokens and texts decide how many model.fit={fit} has: leave it out"
                if latents is not None
                else "expected an integer of at least 1"
            )
        )
    if fit == "random" and latents % 2:
        raise ConfigError(
            f"model.latents={latents}: expected an even number with model=random, half of whose "
            f"latents are the others with the opposite sign: write model.latents={latents + 1}"
        )
    if fit is not None and model.get("freeze") is not None:
        raise ConfigError(
            f"model.freeze={model['freeze']}: model.fit={fit} is not trained: leave one of them out"
        )


def set_by_recipe(cfg: DictConfig) -> str | None:
    """What the recipe of this CLIP and model sets, in a line; None: there is none."""
    choice = HydraConfig.get().runtime.choices.get("recipe")
    if not GlobalHydra.instance().is_initialized():  # called as a library
        return None
    try:
        node = compose(f"recipe/{choice}")
    except MissingConfigException:
        return None
    values = [(f"{group}.{key}", value) for group in node for key, value in node[group].items()]
    kept = [f"{key}={value}" for key, value in values if OmegaConf.select(cfg, key) == value]
    return f"recipe={choice} sets {' '.join(kept)}" if kept else None


def _trainer_options() -> list[str]:
    """The arguments of Lightning's Trainer, read from its source: to import it takes seconds.

    Empty where the source does not have the form that is expected.
    """
    package = importlib.util.find_spec("lightning")
    for folder in (package and package.submodule_search_locations) or []:
        source = Path(folder, "pytorch", "trainer", "trainer.py")
        if source.is_file():
            for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef) and node.name == "__init__":
                    return [a.arg for a in (*node.args.args, *node.args.kwonlyargs)][1:]
    return []


def _blocks(clip: str) -> int | None:
    """The blocks of a model's image tower, by the file that describes it: torch is not imported.
    None: there is no such file, or the model is no plain ViT, which is refused when it is built."""
    package = importlib.util.find_spec("open_clip")
    of_open_clip = (package and package.submodule_search_locations) or []
    for folder in (TINY, *(Path(folder, "model_configs") for folder in of_open_clip)):
        described = read_json(folder / f"{clip.replace('/', '-')}.json")
        if is_whole(layers := described.get("vision_cfg", {}).get("layers")):
            return layers
    return None


def unknown_key(group: str, key: str, known: Iterable[str], value: Any = None) -> ConfigError:
    """The error for an unknown key, with similar names."""
    name = f"{group}.{key}" if group else key
    given = name if value is None else f"{name}={_shown(value)}"
    return ConfigError(f"{given}: there is no such option; {near(key, known, group)}")


def _check_group(
    group: str, node: Mapping[str, Any], rules: Mapping[str, Any], closed: bool
) -> None:
    for key, value in node.items():
        name, rule = f"{group}.{key}" if group else key, rules.get(key)
        if isinstance(rule, Rule):
            require(name, value, rule, shown=_shown)
        elif isinstance(value, Mapping) and rule:
            _check_group(name, value, rule, closed)
        elif rule and value is not None:
            raise ConfigError(f"{name}={_shown(value)}: expected {', '.join(rule)} in it")
        elif rule is None and closed:
            raise unknown_key(group, key, rules, value)


def _shown(value: Any) -> str:
    """A value as it is written on the command line."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list):
        return f"[{','.join(map(_shown, value))}]"
    return str(value)
