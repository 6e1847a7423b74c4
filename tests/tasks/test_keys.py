"""What decides a trained SAE is in its key: whatever is not listed."""

import pytest
from hydra import compose, initialize_config_dir

from clipsae.evaluation.metrics import METRICS
from clipsae.rules import HOOKS
from clipsae.sae import ACTIVATIONS
from clipsae.store import Store
from clipsae.tasks import build, plugins
from clipsae.tasks.stages import evaluation, sae
from run import ROOT


@pytest.fixture(scope="module")
def name(tmp_path_factory):
    store = Store(tmp_path_factory.mktemp("store"))

    def of(*overrides: str) -> str:
        cfg = compose("config", ["trainer.max_steps=20", "precision=float32", *overrides])
        images = build.build_dataset(cfg.train_dataset, "train", 64)
        trained = sae.stage(cfg, store, images)
        of.evaluation = evaluation.stage(cfg, store, trained, images).path.name
        return trained.path.name

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        yield of


@pytest.fixture(scope="module")
def plain(name):
    """The SAE's name without an override."""
    return name()


@pytest.mark.parametrize(
    "override",
    [
        *("+trainer.limit_train_batches=1", "+trainer.overfit_batches=2", "trainer.max_steps=21"),
        *("precision=bf16", "precision=tf32", "trainer.gradient_clip_val=1.0", "trainer.devices=2"),
        *("+trainer.gradient_clip_algorithm=value", "+trainer.a_key_of_tomorrow=1"),
        *("trainer.deterministic=true", "+trainer.reload_dataloaders_every_n_epochs=1"),
        *("trainer.accumulate_grad_batches=2", "features.batch_size=16", "seed=1"),
        *(
            "features.shuffle_buffer_images=64",
            "+features.an_option_of_tomorrow=1",
            "features=cached",
        ),
        *("model.normalize=mean_std", "model.statistics_images=5", "model.position_mean=true"),
        *("model.latents=64", "optimizer.learning_rate=1e-9", "optimizer.warmup_steps=7"),
        *("optimizer.reference_latents=64", "optimizer.decay_fraction=0.5"),
    ],
)
def test_what_may_change_the_weights_is_in_the_key(name, plain, override):
    assert name(override) != plain


@pytest.mark.parametrize(
    "override",
    [
        *(
            "trainer.accelerator=cpu",
            "trainer.log_every_n_steps=1",
            "+trainer.max_time=00:01:00:00",
        ),
        *(
            "trainer.val_check_interval=7",
            "trainer.limit_val_batches=1",
            "+trainer.profiler=simple",
        ),
        *("features.num_workers=3", "logger=csv", "dataset=scenes_shape", "resources.cpus=7"),
        *("callbacks.checkpoint_every_n_steps=3", "callbacks.prediction_images=0"),
        *("evaluation.ns=[2]", "measurement=none", "evaluation.count_threshold=0.7"),
    ],
)
def test_what_does_not_is_not(name, plain, override):
    assert name(override) == plain


def test_the_models_own_image_size_is_not_in_the_key(name):
    assert "image_size" not in build.clip_key(compose("config", ["precision=float32"]))
    assert name("clip.image_size=32") != name()


def test_where_the_tower_is_read_is_in_the_key(name):
    assert "hook" not in build.clip_key(compose("config", ["precision=float32"]))  # as ever
    found = {name(f"clip.hook={hook}") for hook in HOOKS}
    assert len(found) == len(HOOKS)
    assert name("clip.layer=-1", "clip.hook=embedding") == name("clip.hook=embedding")
    assert name("clip.layer=-1", "clip.hook=towers") == name("clip.hook=towers")
    assert name("clip.layer=-1", "clip.hook=mlp_out") != name("clip.hook=mlp_out")


def test_a_step_is_the_same_images_on_one_device_or_two(name):
    assert name("trainer.devices=2") == name("trainer.accumulate_grad_batches=2")


def test_a_new_metric_is_measured_on_finished_saes(name, monkeypatch):
    trained, before = name(), name.evaluation
    all_of_images = [one for one, metric in METRICS.items() if "captions" not in metric.needs]
    assert (name(f"measurement.metrics=[{','.join(all_of_images)}]"), name.evaluation) == (
        trained,
        before,
    )
    monkeypatch.setitem(METRICS, "of_tomorrow", METRICS["sparsity"])
    assert name() == trained
    assert name.evaluation != before
    # A plugin's is that of the runs that name it alone.
    others = type("Others", (), {"__module__": "clipsae_plugin_0_others"})
    monkeypatch.setitem(METRICS, "of_tomorrow", others)
    assert (name(), name.evaluation) == (trained, before)


@pytest.mark.parametrize(
    ("registered", "retrained"),
    [(["METRICS"], False), (["METRICS", "ACTIVATIONS"], True), ([], True)],
)
def test_a_plugin_of_metrics_alone_trains_nothing_anew(
    name, tmp_path, monkeypatch, registered, retrained
):
    without = name()
    monkeypatch.setattr(plugins, "_files", lambda cfg: [file])
    imports = (
        "from clipsae.evaluation.metrics import METRICS\nfrom clipsae.sae import ACTIVATIONS\n"
    )
    lines = [f"@{one}.register('made_up')\nclass MadeUp: ...\n" for one in registered]
    file = tmp_path / "plugin.py"
    found = []
    for version in (1, 2):
        file.write_text(f"# {version}\n{imports}{''.join(lines)}")
        found.append((name(), name.evaluation))
    for registry in (METRICS, ACTIVATIONS):
        registry.pop("made_up", None)
    assert (found[0][0] != found[1][0]) == retrained
    assert found[0][1] != found[1][1]
    assert (found[0][0] == without) != retrained
