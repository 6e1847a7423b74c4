"""Every choice of every group composes; what does not exist, and what no run can use, is one
sentence that names it."""

import copy
import inspect
import re
import subprocess
import sys
from functools import cache

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException, HydraException
from omegaconf import OmegaConf, open_dict

from clipsae.errors import ConfigError
from clipsae.overrides import explain, with_bases
from clipsae.tasks import build, options
from clipsae.tasks.stages import evaluation, sae
from run import ROOT  # (and the resolvers that the configs use)
from tests.warm import run_py

GROUPS = [
    *("paths", "clip", "model", "optimizer", "dataset", "train_dataset", "features", "task"),
    *("trainer", "callbacks", "evaluation", "measurement", "naming", "logger"),
]
CHOICES = {
    f"{group}={file.stem}": OmegaConf.to_container(with_bases(file))
    for group in GROUPS
    for file in sorted((ROOT / "conf" / group).glob("[!_]*.yaml"))
}
MODELS = [choice[6:] for choice in CHOICES if choice.startswith("model=")]
SWEEPS = [file.stem for file in sorted((ROOT / "sweeps").glob("*.yaml"))]
# Chosen by `defaults:` alone, or not a value that a user gives.
NOT_VALUES = ("defaults", "_target_")


@pytest.fixture(scope="module")
def composed():
    @cache
    def once(*overrides: str):
        rootless = {"dataset=image_folder", "dataset=mask_folder"} & set(overrides)
        needed = ["dataset.root=x"] if rootless else []
        return compose("config", [*overrides, *needed])

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        yield lambda *overrides: copy.deepcopy(once(*overrides))


def leaves(node: dict, prefix: str = "") -> dict[str, object]:
    found = {}
    for key, value in node.items():
        if isinstance(value, dict) and value and not {"train", "test"} <= set(value):
            found |= leaves(value, f"{prefix}{key}.")
        elif key not in NOT_VALUES and value != "${dataset}":
            found[f"{prefix}{key}"] = value
    return found


def check(cfg, *overrides: str) -> None:
    """What a run asks of its config before it loads the CLIP."""
    options.check(cfg, overrides)
    sae.check_options(cfg)


def refusal(cfg, *overrides: str) -> str:
    """The one sentence that answers a config."""
    with pytest.raises(ConfigError) as caught:
        check(cfg, *overrides)
    said = str(caught.value)
    assert "\n" not in said
    return said


# --- what is there ---


@pytest.mark.parametrize("group", GROUPS)
def test_every_choice_composes_and_a_wrong_value_of_its_keys_is_refused_by_name(composed, group):
    seen = set()
    for choice, content in CHOICES.items():
        if choice.partition("=")[0] != group:
            continue
        cfg = composed(choice)
        options.check(cfg)  # as it is, it is right
        for key in OmegaConf.load(ROOT / "conf" / f"{choice.replace('=', '/')}.yaml") or {}:
            assert key == "defaults" or key in [*cfg[group], *cfg]
        for key, value in leaves(content.get("task", content)).items():
            if key not in seen:
                refuse_wrong(cfg, f"{group}.{key}", value)
            seen.add(key)


def test_a_wrong_value_of_a_key_at_the_top(composed):
    top = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "config.yaml"))
    for key, value in leaves(
        {k: v for k, v in top.items() if k not in ("hydra", "defaults")}
    ).items():
        refuse_wrong(composed(), key, value)


def refuse_wrong(cfg, key: str, value: object) -> None:
    """Of a kind that the key cannot have."""
    free = value is None or (isinstance(value, str) and not value.startswith("${oc.select:model"))
    cfg = copy.deepcopy(cfg)
    with open_dict(cfg):
        OmegaConf.update(cfg, key, ["not", {"a": "text"}] if free else "nonsense!", merge=False)
    said = refusal(cfg)
    assert key.rpartition(".")[2] in said, said


@pytest.mark.parametrize("clip", ["tiny", "vit_b_16", "vit_l_14"])
def test_every_model_with_every_clip(composed, clip):
    for model in MODELS:
        cfg = composed(f"clip={clip}", f"model={model}")
        assert cfg.model.name == model
        own = {"kmeans": 512, **dict.fromkeys(("neurons", "pca", "ica", "text"))}
        if clip == "tiny":
            own["random"] = 2048
        assert cfg.model.latents == own.get(model, 512 if clip == "tiny" else 49152)
        # Gradients are clipped where the source clips them.
        rivals = ("relu", "jumprelu", "gated", "topk", "batch_topk")
        rivals += ("matryoshka", "abs_topk", "matching_pursuit")
        clipped = {"vit_b_16": 0.02, "tiny": 0.3}.get(clip) if model in rivals else None
        assert cfg.trainer.gradient_clip_val == clipped or clip == "vit_l_14"


def test_what_beats_what(composed):
    assert composed("model=topk", "model.latents=77").model.latents == 77
    assert composed("trainer.max_steps=3").trainer.max_steps == 3
    clipped = composed("clip=vit_b_16", "model=topk", "trainer.gradient_clip_val=0.5")
    assert clipped.trainer.gradient_clip_val == 0.5
    # A model names its optimizer, and the command line another.
    chosen = "clip=vit_l_14", "model=topk"  # a pair without a recipe
    assert composed(*chosen).optimizer.learning_rate == 1.15e-4
    assert composed(*chosen, "optimizer=default").optimizer.learning_rate == 4e-4
    assert composed("clip=vit_l_14", "model=relu").optimizer.warmup_steps == 500
    # Which images train the SAE.
    assert composed("dataset=scenes_colour").train_dataset.name == "scenes"
    cfg = composed("dataset=image_folder")
    assert cfg.train_dataset == cfg.dataset


def test_sweeps_are_chosen_by_name_and_their_axes_exist(composed):
    tried = set()
    for sweep in SWEEPS:
        cfg = compose("config", [f"sweeps={sweep}"], return_hydra_config=True)
        assert cfg.sweep_name == sweep
        assert str(cfg.hydra.mode) == "RunMode.MULTIRUN"
        grids = cfg.hydra.sweeper.get("grids") or {}
        for axes in (cfg.hydra.sweeper.params, *grids.values()):
            models = str(axes.get("model", "topk")).split(",")
            for key, values in axes.items():
                more = [f"model={models[0]}"] if key.startswith("model.") else []
                each = re.split(r",(?![^\[]*\])", str(values))  # not within a list
                tried |= {(*more, f"{key}={value}") for value in each}
    for overrides in tried:
        composed(*overrides)


def test_the_benchmark_is_six_models_on_eleven_datasets():
    from clipsae.data.published import DATASETS

    params = OmegaConf.load(ROOT / "sweeps" / "benchmark.yaml").hydra.sweeper.params
    assert params.dataset.split(",") == list(DATASETS)
    assert len(params.model.split(",")) == 6
    assert params.model.startswith("sparsemax,")  # of which JumpReLU's target_l0=auto learns


def test_only_the_baselines_rates_decay_and_only_penalties_warm_up(composed):
    for model in MODELS:
        cfg = composed("clip=vit_b_16", f"model={model}")
        if cfg.model.fit is not None:
            continue
        optimizer = cfg.optimizer
        decays = "sparsemax" not in model
        expected = ("linear", 0.2) if decays else ("constant", 1.0)
        assert (optimizer.decay, optimizer.decay_fraction) == expected, model
        penalised = model in ("relu", "jumprelu", "gated", "attention_relu")
        assert optimizer.sparsity_warmup_steps == (4096 if penalised else 0), model
        scaled = model in ("topk", "batch_topk", "matryoshka", "abs_topk", "matching_pursuit")
        assert optimizer.reference_latents == (49152 if scaled else None), model
        tiny = composed("clip=tiny", f"model={model}").optimizer
        assert tiny.sparsity_warmup_steps == (120 if penalised else 0), model
        assert tiny.reference_latents == (512 if scaled else None), model


# --- what is refused ---


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed=-1", "seed=-1: expected an integer from 0 to 4294967295"),
        ("seed=true", "seed=true: expected an integer"),
        ("together=1", "together=1: expected true or false"),
        ("trainer.max_steps=-1", "trainer.max_steps=-1: expected an integer of at least 0"),
        (
            "model.freeze=all",
            "model.freeze=all: expected decoder, encoder or soft_decoder, or",
        ),
        ("model.fit=lda", "model.fit=lda: expected neurons, pca, ica, text, kmeans or random, or"),
        ("model.latents=null", "model.latents=null: expected an integer of at least 1"),
        ("model.freeze=soft_decoder", "model.freeze='soft_decoder': architecture=attention has no"),
        (
            "model.prefixes=all",
            "model.prefixes=all: expected fixed or drawn, or a list of at least 1",
        ),
        ("model.prefixes=[0]", "model.prefixes=[0]"),
        ("model.prefixes=[2.5]", "model.prefixes=[2.5]: expected fixed, drawn, or a list of sizes"),
        ("model.prefix_weights=[-1]", "model.prefix_weights=[-1]: expected a list"),
        ("model.prefix_weights=[1,2]", "model.prefix_weights=[1, 2] does nothing while prefixes"),
        ("model.n_prefixes=0", "model.n_prefixes=0: expected an integer of at least 1"),
        ("model.n_prefixes=5", "model.n_prefixes=5 does nothing while prefixes is None"),
        ("model.nested_k=[0.5]", "model.nested_k=[0.5]: expected a list of at least 1"),
        ("model.nested_k=[2]", "model.nested_k=[2] needs an activation that keeps the largest"),
        ("model.nested_k_weights=revers", "expected uniform or reverse, or a list"),
        ("model.monosemanticity=-1", "monosemanticity=-1: expected a number of at least 0"),
        ("model.orthogonality=-1", "orthogonality=-1: expected a number of at least 0"),
        ("model.pre_activation=-1", "pre_activation=-1: expected a number of at least 0"),
        ("model.p_end=0.5", "p_end=0.5: architecture=attention with activation=sparsemax has no"),
        ("model.normalize=l2", "model.normalize=l2: expected none, unit, layer_norm, mean_std"),
        ("model.whitening=1.5", "model.whitening=1.5: expected a number from 0 to 1"),
        ("model.whitening=0.5", "model.whitening=0.5 does nothing with normalize=unit"),
        ("model.position_mean=1", "model.position_mean=1: expected true or false"),
        ("model.position_mean=true", "model.position_mean=True: normalize=unit divides each token"),
        ("model.statistics_images=0", "model.statistics_images=0: expected an integer of at least"),
        ("+model.normalize_input=true", "model.normalize_input is now model.normalize"),
        ("trainer.max_steps=1e3", "trainer.max_steps=1000.0: expected an integer"),
        ("precision=fp32", "precision=fp32: expected auto, float32, tf32 or bf16"),
        (
            "+clip.precision=bf16",
            "clip.precision=bf16: clip.precision is now precision=float32|tf32|bf16",
        ),
        ("trainer.devices=[]", "trainer.devices=[]"),
        ("trainer.gradient_clip_val=0", "trainer.gradient_clip_val=0: expected a number above 0"),
        ("trainer.limit_val_batches=1.5", "trainer.limit_val_batches=1.5"),
        ("features.tokens=image", "features.tokens=image: expected all, patches or cls"),
        ("features.max_norm_ratio=0.5", "max_norm_ratio=0.5: expected a number of at least 1"),
        ("model.target_layer=0.5", "model.target_layer=0.5: expected an integer, or null"),
        ("optimizer.learning_rate=nan", "optimizer.learning_rate=nan"),
        ("optimizer.betas=[0.9,1]", "optimizer.betas=[0.9,1]"),
        ("optimizer.decay_fraction=0", "decay_fraction=0: expected a number above 0, up to 1"),
        ("optimizer.decay_fraction=1.1", "optimizer.decay_fraction=1.1: expected a number above 0"),
        ("optimizer.reference_latents=0.5", "reference_latents=0.5: expected an integer of at"),
        (
            "model.target_l0=most",
            "model.target_l0=most: expected a number above 0, or auto",
        ),
        ("optimizer.sparsity_warmup_steps=3", "optimizer.sparsity_warmup_steps=3 does nothing"),
        ("optimizer.sparsity_warmup_steps=-3", "sparsity_warmup_steps=-3: expected an integer"),
        ("optimizer.decay=cosin", "optimizer.decay=cosin: expected constant, cosine or linear"),
        ("evaluation.count_share=0", "evaluation.count_share=0: expected a share above 0"),
        ("evaluation.count_threshold=-0.1", "evaluation.count_threshold=-0.1"),
        ("evaluation.protocol=papers", "evaluation.protocol=papers: expected paper or heldout"),
        ("evaluation.ranking=tfidf", "evaluation.ranking=tfidf: expected frequency or contrast"),
        ("evaluation.ns=[5,0]", "evaluation.ns=[5,0]"),
        ("evaluation.ns=5", "evaluation.ns=5: expected a list"),
        ("measurement.threshold=1.1", "measurement.threshold=1.1"),
        ("measurement.image_encoder=[]", "measurement.image_encoder=[]: expected"),
        ("+dataset.ignored=[-1]", "dataset.ignored=[-1]: expected a list"),
        ("measurement.pooling=sum", "measurement.pooling=sum: expected mean, max or cls"),
        ("logger.mode=upload", "logger.mode=upload: expected online, offline or disabled, or null"),
        ("dataset.size.train=-1", "dataset.size={'train': -1"),
        ("+model.decay=linear", "model.decay=linear: model.decay is now optimizer.decay"),
        ("+foo=1", "foo=1: there is no such option"),
        ("+task.foo=1", "task.foo=1: there is no such option"),
        ("+evaluation.n=[1]", "did you mean evaluation.ns"),
        ("+callbacks.checkpoint_every=1", "callbacks.checkpoint_every=1: there is no such option"),
        ("+trainer.limit_train_batchs=1", "did you mean trainer.limit_train_batches"),
        ("+trainer.fast_dev_run=true", "trainer.fast_dev_run=true: expected null"),
        ("+trainer.callbacks=[x]", "they are set by keys such as callbacks.reference_sheet"),
        (
            "+trainer.enable_checkpointing=false",
            "always on, every callbacks.checkpoint_every_n_steps",
        ),
        ("+trainer.max_epochs=2", "the length of a training is trainer.max_steps"),
        ("+trainer.max_time=soon", "trainer.max_time=soon"),
        ("+trainer.limit_train_batches=0", "trainer.limit_train_batches=0: expected"),
        ("trainer.accelerator=gpux", "trainer.accelerator=gpux"),
    ],
)
def test_what_is_out_of_range_or_unknown(composed, override, expected):
    cfg = composed()
    OmegaConf.set_struct(cfg, False)
    cfg.merge_with_dotlist([override.lstrip("+")])
    assert expected in refusal(cfg, override)


def test_a_penalty_that_would_never_reach_its_strength(composed):
    said = refusal(composed("model=relu", "trainer.max_steps=120"))
    assert said.startswith(
        "optimizer.sparsity_warmup_steps=120: in a training of max_steps=120 the"
    )
    for override in ("optimizer.sparsity_warmup_steps=119", "optimizer.sparsity_warmup_steps=0"):
        check(composed("model=relu", "trainer.max_steps=120", override))
    check(composed("model=relu", "trainer.max_steps=0"))
    check(composed("model=topk", "trainer.max_steps=1"))  # has no penalty


def test_metrics_without_a_measurement_are_refused(composed):
    found = refusal(composed("measurement=none", "measurement.metrics=[cknna]"))
    assert "measurement.metrics=[cknna] with measurement=none, which measures nothing" in found


def test_a_number_is_not_a_metric(composed):
    said = "fvu is one of the numbers of metric sparsity: write measurement.metrics=[sparsity]"
    cfg = composed("measurement.metrics=[fvu]")
    with pytest.raises(ConfigError, match=re.escape(said)):
        evaluation.check_options(cfg)


def test_what_fitted_saes_refuse(composed):
    for model, override, expected in (
        ("pca", "model.latents=64", "model.latents=64: the tokens and texts decide how many"),
        ("random", "model.latents=65", "=65: expected an even number with model=random, "),
        ("random", "model.latents=65", "write model.latents=66"),
        ("topk", "model.fit=pca", "model.fit=pca: write model=pca, which sets it, in place of"),
        ("topk", "model.fit=kmeans", "in place of model=topk, which is trained"),
        ("pca", "+model.auxk=1.0", "model.auxk=1.0: model=pca has no such option: leave it out"),
        ("kmeans", "model.latents=null", "model.latents=null: expected an integer of at least 1"),
        ("pca", "+model.freeze=decoder", "model.freeze=decoder: model.fit=pca is not trained"),
        ("pca", "+model.normalize=whiten", "model.normalize=whiten: model=pca has no such option"),
    ):
        assert expected in refusal(composed(f"model={model}", override))


def test_another_layer_of_the_image_embedding_is_refused(composed):
    command = "clip.hook=embedding", "clip.layer=-2", "model.target_layer=-1"
    said = "clip.hook=embedding: the image embedding is the same for every layer"
    assert said in refusal(composed(*command))


def test_mixed_tokens_have_no_position(composed):
    mixed = "model=topk", "model.position_mean=true", "features.shuffle_buffer_images=64"
    assert "tokens that are mixed have no position" in refusal(composed(*mixed))


def test_options_that_would_do_nothing_are_refused(composed):
    towers = "clip.hook=towers", "features.max_norm_ratio=3.0"
    assert "max_norm_ratio=3.0: at clip.hook=towers all tokens have norm 1" in refusal(
        composed(*towers)
    )
    alone = "features.batch_size=1", "model.monosemanticity=0.1"
    assert "model.monosemanticity=0.1 compares the images of a step" in refusal(composed(*alone))


def test_weights_of_other_prefixes_than_the_recipe_s(composed):
    other = "model=matryoshka", "model.prefixes=drawn", "clip=tiny"
    assert "each of the 10 prefixes, not all of them 0, or null, which" in refusal(composed(*other))


def test_an_error_without_words_is_shown_by_what_caused_it():
    error = HydraException("")
    error.__cause__ = KeyError("no HOME")
    assert explain(error, ROOT / "conf") == "'no HOME'"
    assert explain(HydraException(""), ROOT / "conf") == "HydraException"


def test_what_others_define_is_theirs(composed):
    cfg = composed()
    with open_dict(cfg):
        cfg.dataset = {"_target_": "theirs.Noise", "name": "noise", "size": "large"}
        cfg.logger = {"_target_": "theirs.logger", "level": 3}
        cfg.task = {"_target_": "theirs.run", "depth": 2}
        cfg.model.temperature = 0.5  # a plugin's, which the SAE's class knows or refuses
        cfg.note = "of a config file of their own"
    options.check(cfg)


@pytest.mark.parametrize("target", ["noise_of_mine.Noise", "clipsae.data.Noise"])
def test_a_dataset_s_module_that_is_not_found(composed, target):
    cfg = composed()
    cfg.dataset._target_ = target
    expected = f"dataset._target_={target}: No module named .*PYTHONPATH"
    with pytest.raises(ConfigError, match=expected):
        build.check_keys(cfg)


def test_the_trainer_s_options_are_those_of_lightning():
    from lightning import Trainer

    assert sorted(options._trainer_options()) == sorted(inspect.signature(Trainer).parameters)


def test_what_does_not_compose_or_is_not_given(composed):
    for override in ("modle.k=3", "model.laten=3"):
        with pytest.raises(ConfigCompositionException, match=override.partition("=")[0]):
            composed(override)
    with pytest.raises(Exception, match="batch_topk"):  # the message lists what exists
        composed("model=topkk")
    with pytest.raises(ConfigError, match=r"dataset\.root is not given"):
        options.check(compose("config", ["dataset=image_folder"]))
    options.check(compose("config", ["dataset=image_folder", "task=status"]))


@pytest.mark.parametrize(
    ("name", "layer", "blocks"),
    [("clipsae-tiny", 4, 4), ("clipsae-tiny", -5, 4), ("ViT-B-16-quickgelu", 12, 12)],
)
def test_a_block_that_is_not_there(composed, name, layer, blocks):
    cfg = composed()
    cfg.clip.name, cfg.clip.layer = name, layer
    with pytest.raises(ConfigError, match=f"clip.layer={layer}: {name} has {blocks} blocks"):
        options.check(cfg)
    cfg.clip.layer = blocks - 1
    options.check(cfg)
    cfg.clip.name, cfg.clip.layer = "RN50", 99  # no plain ViT: what builds it says so
    options.check(cfg)


# --- the command ---


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["mdel=topk"], "mdel=topk: there is no such option; did you mean model?"),
        (["model.laten=3"], "model.laten=3: there is no such option; did you mean model.latents"),
        (
            ["model.learning_rate=1"],
            "model.learning_rate=1: model.learning_rate is now optimizer.learning_rate",
        ),
        (
            ["trainer.precision=bf16-mixed"],
            "trainer.precision=bf16-mixed: trainer.precision is now precision=float32|tf32|bf16",
        ),
        (["clip=vitb16"], "clip=vitb16: there is no such choice; "),
        (["model=topk,relu"], "model=topk,relu: several values are a sweep: add -m"),
        (["topk"], "'topk' is not key=value"),
        (["seed=abc"], "seed=abc: expected an integer"),
        (["+trainer.accelerator=gpu"], "+trainer.accelerator=gpu: it is there already: leave out"),
        (["dataset=image_folder"], "dataset.root is not given"),
        (
            ["+dataset.foo=1"],
            "dataset.foo=1: there is no such option; dataset has kind",
        ),
        (["dataset.kind=shap"], "unknown kind of scenes 'shap'"),
        (
            ["model.k=16"],
            "it is an option of model=abs_topk, batch_topk, matching_pursuit, matryoshka, topk",
        ),
        (
            ["model=pca", "model.freeze=decoder"],
            "model=pca is fitted, not trained; it is an option of",
        ),
        (["hydra.sweeper.only=[main]"], "only=[main]: this command runs one config, and no sweep"),
        (["resources.cpuz=1"], "did you mean resources.cpus?"),
        (["features=cached", "features.cache.shard_bg=1"], "did you mean features.cache.shard_gb?"),
        (["hydra.launcher.foo=1", "hydra/launcher=slurm"], "hydra.launcher has account"),
    ],
)
def test_the_command_answers_in_one_line(tmp_path, arguments, expected):
    done = run_py(f"paths.output_dir={tmp_path}", *arguments)
    said = (done.stdout + done.stderr).strip()
    assert done.returncode == 1
    assert expected in said
    assert len(said.splitlines()) == 1, said


def python(code: str, **options) -> subprocess.CompletedProcess[str]:
    options = {"cwd": ROOT, "capture_output": True, "text": True} | options
    return subprocess.run([sys.executable, "-c", code], **options)


@pytest.mark.parametrize(
    ("arguments", "status"),
    [(["seed=abc"], 1), (["task=status"], 0), (["task=gc", "sweeps=demo"], 0)],
)
def test_a_typo_and_a_look_at_the_store_do_not_import_torch(tmp_path, arguments, status):
    arguments = [*arguments, f"paths.output_dir={tmp_path}"]
    code = f"import sys, run; sys.argv[1:] = {arguments}\ntry: run.main()\n"
    done = python(code + "finally: print('torch' in sys.modules or 'lightning' in sys.modules)")
    assert done.returncode == status, done.stderr
    assert done.stdout.splitlines()[-1] == "False"


def test_ctrl_c_is_answered_where_a_shell_has_it_ignored():
    """As it does for a command in the background."""
    done = python(
        "import signal, sys, run; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "sys.argv[1:] = ['--info', 'searchpath']; run.main()\n"
        "print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    )
    assert done.stdout.splitlines()[-1] == "True", done.stderr


def test_help_works_from_any_folder(tmp_path):
    done = run_py("--help", cwd=tmp_path)
    assert done.returncode == 0
    assert "batch_topk" in done.stdout
    assert list(tmp_path.iterdir()) == []
