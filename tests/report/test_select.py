"""Which result fills a cell; results that are not alike are never averaged or shown as one."""

import math

import pytest

from clipsae.report import collect
from clipsae.report.settings import Line, settings_of
from clipsae.report.tables import accuracy_tables


def value(selection, model, dataset, column):
    return selection.of(selection.main(model), dataset).set_index("metric").value[column]


def figures(selection, dataset, column="on_5"):
    rows = accuracy_tables(selection, dataset)[0].rows
    return {row.labels[0]: row.cells[column].ours for row in rows if row.cells[column].ours}


def test_the_mean_over_seeds_and_its_spread(store):
    for seed, accuracy in enumerate((10.0, 20.0, 60.0)):
        store.evaluation("relu", "scenes", {"no_sae": 90.0, "on_5": accuracy}, seed=seed)
    cell = store.selection().of(Line("relu"), "scenes").set_index("metric").loc["on_5"]
    assert cell.value == pytest.approx(30.0)
    assert cell["std"] == pytest.approx(math.sqrt((20**2 + 10**2 + 30**2) / 2))
    assert cell.seeds == 3


def test_the_newest_figure_of_a_seed_counts_regardless_of_its_name(store):
    first = {"cosine": 0.5, "fvu": 0.25}
    more = {"on_5": 1.0, "on_10": 7.0}
    store.evaluation("relu", "scenes", more, metrics=first, finished=300)
    store.evaluation("relu", "scenes", {"on_5": 2.0}, metrics={}, finished=500)
    store.evaluation("relu", "scenes", {"on_5": 3.0}, metrics={}, finished=400)
    store.measurement("relu", "scenes", {"cosine": 0.75, "cknna": 0.5}, finished=600)
    store.measurement("relu", "scenes", {"cknna": 0.25}, finished=900)
    selection = store.selection()
    assert value(selection, "relu", "scenes", "on_5") == 2.0
    # All have the same settings: a later one with fewer n takes no figure away.
    assert value(selection, "relu", "scenes", "on_10") == 7.0
    metrics = selection.metrics.set_index("metric").value
    assert metrics.to_dict() == {"cosine": 0.75, "cknna": 0.25, "fvu": 0.25}
    assert selection.lines[0] == Line("relu")
    assert (selection.superseded, selection.differences) == (1, ())


@pytest.mark.parametrize(
    "other",
    [{"clip": "ViT-B-16-quickgelu"}, {"weights": None}, {"latents": 256}],
)
def test_results_of_another_clip_or_size_do_not_mix(store, other):
    store.evaluation("relu", "scenes", {"on_5": 1.0}, finished=1)
    store.evaluation("relu", "scenes", {"on_5": 2.0}, finished=2, **other)
    selection = store.selection()
    assert value(selection, "relu", "scenes", "on_5") == 1.0
    assert (selection.unfitting, selection.superseded) == (1, 0)


@pytest.mark.parametrize("other", [{"protocol": "heldout"}, {"ranking": "contrast"}])
def test_results_by_another_protocol_or_ranking_stand_beside_those_of_the_same_sae(store, other):
    store.evaluation("relu", "scenes", {"on_5": 1.0})
    for seed, accuracy in ((0, 2.0), (0, 3.0), (1, 4.0)):
        store.evaluation("relu", "scenes", {"on_5": accuracy}, metrics={}, seed=seed, **other)
    unlike = {"metrics": {}, "max_steps": 3, **other}
    store.evaluation("relu", "scenes", {"on_5": 9.0}, **unlike)  # of no SAE in the tables
    selection = store.selection()
    assert value(selection, "relu", "scenes", "on_5") == 1.0
    ways = selection.ways
    assert sorted(ways.value) == [1.0, 3.0, 4.0]
    assert (selection.unfitting, selection.superseded, selection.differences) == (1, 1, ())
    (same,) = set(ways.line)
    assert same == selection.main("relu")
    mine = store.selection(**other)
    assert value(mine, "relu", "scenes", "on_5") in (3.5, 9.0)


@pytest.mark.parametrize(
    ("more", "title"),
    [
        ({"max_steps": 0}, "ReLU, untrained"),
        ({"options": {"freeze": "decoder"}}, "ReLU, decoder frozen"),
        ({"options": {"freeze": "soft_decoder"}}, "ReLU, decoder softly frozen"),
        ({"options": {"fit": "pca"}, "latents": 256}, "ReLU"),
    ],
)
def test_what_has_not_learned_is_a_line_of_its_own_and_sets_nothing_else_apart(store, more, title):
    for name in ("relu", "topk"):
        key = {"training": {"max_steps": 600}, "sae": {"fit": None, "freeze": None}}
        sae = store.sae(f"{name}-a", key)
        store.evaluation(name, "scenes", {"on_5": 30.0}, k=4 if name == "topk" else None, sae=sae)
    other = store.sae("relu-b", {"training": {"max_steps": more.get("max_steps", 600)}})
    store.evaluation("relu", "scenes", {"on_5": 5.0}, sae=other, **more)
    selection = store.selection()
    assert [selection.title(line) for line in selection.baselines] == [title]
    assert selection.differences == ()
    assert value(selection, "relu", "scenes", "on_5") == 30.0
    untrained = selection.untrained(selection.main("relu"))
    assert (untrained is not None) == (title == "ReLU, untrained")
    assert selection.untrained(selection.main("topk")) is None
    asked = {"ReLU, untrained": ["trainer.max_steps=0"], "ReLU": []}
    freeze = f"model.freeze={more.get('options', {}).get('freeze')}"
    assert selection.baselines[0].overrides == asked.get(title, [freeze])


def test_the_tables_k_is_that_with_most_datasets_ties_to_the_smallest(store):
    for k, datasets in ((16, "ab"), (32, "abc"), (64, "bcd")):
        for dataset in datasets:
            store.evaluation("topk", dataset, {"on_5": float(k)}, k=k)
    selection = store.selection()
    assert value(selection, "topk", "a", "on_5") == 32.0
    assert (selection.k[Line("topk")], selection.k[Line("relu")]) == (32, 0)
    assert store.selection(k=64).k[Line("topk")] == 64


def test_rows_and_datasets(store):
    """The six and others found, in one order; the eleven once one has a result, and the ablation's
    two then in its table alone."""
    for model in ("mine", "abs_topk", "matryoshka", "attention_relu", "relu"):
        store.evaluation(model, "my_photos", {"on_5": 1.0})
    six = ("relu", "jumprelu", "gated", "topk", "batch_topk", "sparsemax")
    selection = store.selection()
    others = ("matryoshka", "abs_topk", "mine")
    assert selection.models == (*six, "attention_relu", *others)
    assert selection.expected == six
    assert selection.datasets == ("my_photos",)
    assert store.selection(models=("mine",)).models == ("mine",)
    store.evaluation("relu", "dtd", {"on_5": 1.0})
    assert len(store.selection().eleven) == 11
    assert store.selection().models == (*six, *others)
    assert store.selection().others == ("my_photos",)
    assert store.selection(datasets=("dtd",)).datasets == ("dtd",)


def test_a_dataset_that_was_measured_alone_lacks_no_accuracy(store):
    store.evaluation("topk", "a", {"on_5": 1.0})
    store.measurement("topk", "scenes", {"l0": 4.0})
    selection = store.selection(models=("topk",))
    assert (selection.datasets, selection.classified) == (("a", "scenes"), ("a",))
    report = store.report(models=("topk",))
    assert {gap.dataset for gap in report.missing} <= {"a"}
    assert [t.name for t in report.tables if t.name.startswith(("accuracy", "average"))] == [
        "accuracy_a"
    ]


def test_metrics_of_0_1_have_todays_names_and_meanings(store):
    store.measurement("topk", "scenes", {"l0": 0.75, "active": 32.0}, k=32)
    metrics = store.selection().metrics.set_index("metric").value
    assert metrics.to_dict() == {"zero_fraction": 0.75, "l0": 32.0}


# --- what cannot be read ---


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("results.csv", "model,dataset\nrelu,scenes\n", "lacks the columns clip"),
        ("results.csv", "", "No columns"),
        ("results.csv", "\x00\x01,,\n\n", ""),
        ("metrics.csv", "model,dataset\nrelu,scenes\n", "lacks the columns clip"),
        ("config.yaml", "a: [", ""),
        ("config.yaml", "- 1\n", "expected mappings"),
        ("meta.json", "[]", "expected mappings"),
        ("meta.json", "{}", "finished"),
    ],
)
def test_a_folder_that_cannot_be_read_is_named_in_one_line(store, name, content, says):
    store.evaluation("relu", "scenes", {"on_5": 1.0})
    broken = store.evaluation("topk", "scenes", {"on_5": 1.0}, k=8)
    (broken / name).write_text(content)
    found = collect(store.root)
    (line,) = found.problems
    assert line.startswith(f"evaluation/{broken.name}: ")
    assert says in line
    assert "\n" not in line
    assert set(found.figures.model) == {"relu"}


def test_a_missing_file_and_text_in_place_of_a_number_are_problems_too(store):
    folder = store.evaluation("relu", "scenes", {"on_5": 1.0}, metrics={})
    (folder / "results.csv").unlink()
    folder = store.measurement("relu", "scenes", {"fvu": 1.0})
    text = (folder / "metrics.csv").read_text().replace("1.0", "much")
    (folder / "metrics.csv").write_text(text)
    found = collect(store.root)
    assert len(found.problems) == 2
    assert found.figures.empty


def test_unfinished_folders_and_measurements_of_an_earlier_version_are_left_out(store):
    partial = store.evaluation("relu", "scenes", {"on_5": 1.0})
    partial.rename(partial.with_name(f".{partial.name}.partial"))
    folder = store.measurement("relu", "scenes", {"l0": 0.75})
    (store.root / "measurement").mkdir()
    folder.rename(store.root / "measurement" / folder.name)
    found = collect(store.root)
    (line,) = found.problems
    assert "1 of an earlier version" in line
    assert found.figures.empty


# --- settings that differ ---


def trained(
    store, name, *, learning_rate=0.001, fingerprint="f" * 16, seed=0, clip=None, **trainer
):
    """An SAE's record, as the store has it."""
    key = {
        "clip": {"name": "clipsae-tiny", "pretrained": "builtin", "layer": -2} | (clip or {}),
        "train_dataset": {"name": "scenes", "fingerprint": fingerprint},
        "sae": {"latents": 128, "k": 8},
        "training": {
            "learning_rate": learning_rate,
            "batch_size": 32,
            "seed": seed,
            "trainer": {"max_steps": 600, **trainer},
        },
    }
    return store.sae(name, key)


def test_names_are_those_of_the_config():
    topn = {"ns": [1, 5], "settings": ["on"], "count_threshold": 2.0, "split": "test"}
    key = {"sae": "x", "dataset": {"name": "a"}, "evaluation": topn}
    training = {"batch_size": 4, "precision": "32-true", "seed": 3, "cache": {"dtype": "bf16"}}
    of_sae = {"sae": {"latents": 8, "scale": 1.0}, "training": training}
    assert dict(settings_of(key, of_sae, {"train_dataset": {"_target_": "x"}}, 3)) == {
        "dataset.name": "a",
        "evaluation.split": "test",
        "features.batch_size": "4",
        "features.cache.dtype": "bf16",
        "evaluation.count_threshold": "2.0",
        "model.scale": "1.0",
        "precision": "float32",
        "schema": "3",
    }


def test_a_smoke_run_replaces_nothing_and_is_averaged_with_nothing(store):
    for dataset in "ab":
        for seed, more in ((0, 0.0), (1, 2.0)):
            store.evaluation("sparsemax", dataset, {"on_5": 33.0 + more}, seed=seed)
            store.evaluation("relu", dataset, {"on_5": 20.0 + more}, seed=seed)
    store.evaluation("sparsemax", "a", {"on_5": 1.25}, max_steps=3, seed=0)
    selection = store.selection()
    full = {"ReLU, trainer.max_steps=600": 21.0, "Sparsemax, trainer.max_steps=600": 34.0}
    assert figures(selection, "a") == full | {"Sparsemax, trainer.max_steps=3": 1.25}
    assert figures(selection, "b") == full
    assert selection.differences == (
        "trainer.max_steps is 600 in 8 results and 3 in 1 result (Sparsemax on a).",
    )
    # The report on those alone that have a setting.
    asked = store.selection(settings={"trainer.max_steps": "600"})
    assert figures(asked, "a") == {"ReLU": 21.0, "Sparsemax": 34.0}
    assert (asked.differences, asked.unfitting) == ((), 1)


def test_the_report_on_measurements_with_a_setting(store):
    for threshold, found in ((0.9, 0.5), (0.8, 0.75)):
        key = {"dataset": {"name": "a"}, "measurement": {"threshold": threshold}}
        store.evaluation("relu", "a", {"on_5": 1.0}, metrics={"image_auroc": found}, key=key)
    selection = store.selection(settings={"measurement.threshold": "0.8"})
    assert selection.metrics.value.tolist() == [0.75]
    assert figures(selection, "a") == {"ReLU": 1.0}


def test_many_smoke_runs_do_not_decide_what_is_missing(store):
    for dataset in "abc":
        store.evaluation("sparsemax", dataset, {"on_5": 1.0}, max_steps=3)
        store.evaluation("topk", dataset, {"on_5": 1.0}, max_steps=3, k=8)
    store.evaluation("sparsemax", "a", {"on_5": 33.0})
    models = ("sparsemax", "topk")
    selection = store.selection(usual={"trainer.max_steps": "600"}, models=models)
    assert [(line.model, line.common) for line in selection.lines] == [
        ("sparsemax", "trainer.max_steps=600"),
        ("sparsemax", "trainer.max_steps=3"),
        ("topk", "trainer.max_steps=3"),
    ]
    # Without a config that says what is usual the most results do.
    assert store.selection(models=models).lines[0].common == "trainer.max_steps=3"


def test_a_precision_is_called_as_the_command_calls_it(store):
    for of_clip, of_training in (("fp32", "32-true"), ("bf16-mixed", "tf32")):
        clip = {"precision": of_clip}
        sae = trained(store, of_training, clip=clip, precision=of_training)
        store.evaluation("topk", "a", {"on_5": 1.0}, k=8, sae=sae)
    lines = store.selection(usual={"precision": "tf32"}, models=("topk",)).lines
    assert [line.overrides for line in lines] == [["precision=tf32"], ["precision=float32"]]


def test_what_is_usual_is_told_by_all_settings_not_by_those_that_a_label_names(store):
    """Two settings change together, and the label names the one that says nothing."""
    for name, steps, precision in (("old", 600, "16"), ("new", 600, "32")):
        sae = trained(store, name, max_steps=steps, precision=precision, zeta=name)
        for dataset in "ab" if name == "old" else "a":
            store.evaluation("topk", dataset, {"on_5": 1.0}, k=8, sae=sae)
    line = store.selection(usual={"trainer.zeta": "new"}).main("topk")
    assert line.common == "trainer.precision=32"


@pytest.mark.parametrize(
    ("changed", "label"),
    [
        ({"max_time": {"minutes": 1}}, "trainer.max_time.minutes=1"),
        ({"limit_train_batches": 0.5}, "trainer.limit_train_batches=0.5"),
        ({"learning_rate": 0.01}, "optimizer.learning_rate=0.01"),
        ({"fingerprint": "0" * 16}, "train_dataset.fingerprint=00000000"),
    ],
)
def test_everything_in_the_key_sets_results_apart(store, changed, label):
    first, second = trained(store, "x-1"), trained(store, "x-2", **changed)
    store.evaluation("topk", "a", {"on_5": 10.0}, k=8, sae=first)
    store.evaluation("topk", "a", {"on_5": 30.0}, k=8, sae=second)
    selection = store.selection()
    labels = {line.variant for line in selection.lines if line.model == "topk"}
    assert label in labels
    assert len(labels) == 2
    assert sorted(figures(selection, "a").values()) == [10.0, 30.0]


def test_seeds_and_the_models_own_recipes_set_nothing_apart(store):
    for seed in (0, 1):
        for model, rate in (("relu", 0.1), ("topk", 0.2)):
            name = trained(store, f"{model}-{seed}", learning_rate=rate, seed=seed)
            k = 8 if model == "topk" else None
            key = {"dataset": {"name": "a"}, "evaluation": {"count_threshold": rate}}
            store.evaluation(model, "a", {"on_5": 10.0 + seed}, k=k, seed=seed, sae=name, key=key)
    selection = store.selection()
    assert selection.differences == ()
    assert figures(selection, "a") == {"ReLU": 10.5, "TopK (k = 8)": 10.5}


def test_changed_images_are_told_apart_by_their_hash_on_that_dataset_alone(store):
    """Unless an option says why they are others, as on c."""
    for dataset, digit in (("a", "1"), ("a", "2"), ("b", "3")):
        key = {"dataset": {"name": dataset, "fingerprint": digit * 16}}
        store.evaluation("relu", dataset, {"on_5": float(digit)}, key=key)
    selection = store.selection()
    assert figures(selection, "a") == {
        "ReLU, dataset.fingerprint=11111111": 1.0,
        "ReLU, dataset.fingerprint=22222222": 2.0,
    }
    assert figures(selection, "b") == {"ReLU": 3.0}
    for size in (100, 200):
        options = {"name": "c", "size": {"test": size}, "fingerprint": f"{size:016x}"}
        store.evaluation("relu", "c", {"on_5": 1.0 * size}, key={"dataset": options})
    assert figures(store.selection(datasets=("c",)), "c") == {
        "ReLU, dataset.size.test=100": 100.0,
        "ReLU, dataset.size.test=200": 200.0,
    }


def test_a_measurement_is_in_the_row_of_the_evaluation_of_its_sae(store):
    for steps in (3, 600):
        more = {"max_steps": steps}
        store.evaluation("relu", "a", {"on_5": 1.0 * steps}, metrics={"cosine": 0.5}, **more)
        store.measurement("relu", "a", {"cknna": 0.001 * steps}, **more)
    selection = store.selection()
    assert len([line for line in selection.lines if line.model == "relu"]) == 2
    rows = selection.rows(selection.metrics, Line("relu", "trainer.max_steps=3"))
    assert rows.set_index("metric").value.to_dict() == {"cosine": 0.5, "cknna": 0.003}


# --- what is not trained, or in part ---


def test_frozen_and_untrained_saes_are_lines_of_their_own(store):
    """Named, behind the trained one of however few seeds, and alone, too."""

    def sae(steps: int = 600, **model) -> str:
        key = {"sae": {"freeze": None, **model}, "training": {"trainer": {"max_steps": steps}}}
        return store.sae(f"sae-{store.made}", key)

    store.evaluation("topk", "scenes", {"on_5": 1.0}, sae=sae())
    for seed in range(3):
        frozen = sae(freeze="decoder")
        more = {"seed": seed, "options": {"freeze": "decoder"}}
        store.evaluation("topk", "scenes", {"on_5": 2.0}, sae=frozen, **more)
    store.evaluation("topk", "scenes", {"on_5": 3.0}, sae=sae(steps=0), max_steps=0)
    store.evaluation("relu", "scenes", {"on_5": 4.0}, sae=sae(steps=0), max_steps=0)
    store.evaluation("gated", "scenes", {"on_5": 5.0}, sae=sae())
    assert figures(store.selection(), "scenes") == {
        "TopK": 1.0,
        "TopK, decoder frozen": 2.0,
        "TopK, untrained": 3.0,
        "ReLU, untrained": 4.0,
        "Gated": 5.0,  # nothing sets it apart
    }
    selection = store.selection()
    assert selection.main("topk") == Line("topk")
    assert selection.main("topk").overrides == []
    overrides = [line.overrides for line in selection.baselines if line.model == "topk"]
    assert overrides == [["model.freeze=decoder"], ["trainer.max_steps=0"]]


def test_fitted_saes_are_in_reports_of_any_number_of_latents(store):
    def sae(**key) -> str:
        return store.sae(f"sae-{store.made}", {"sae": key, "training": {"initial_images": 9}})

    trained = {"sae": {"freeze": None}, "training": {"trainer": {"max_steps": 600}}}
    accuracy = {"on_5": 1.0, "on_all": 9.0}
    store.evaluation("relu", "scenes", accuracy, sae=store.sae("trained", trained))
    pca = {"latents": 24, "options": {"fit": "pca"}}
    store.evaluation("pca", "scenes", {"on_all": 2.0}, sae=sae(fit="pca"), **pca)
    for m in (16, 128):
        more = {"latents": m, "options": {"fit": "random"}}
        fitted = sae(fit="random", latents=m)
        store.evaluation("random", "scenes", {"on_all": 3.0 + m}, sae=fitted, **more)
    found = figures(store.selection(), "scenes", "on_all")
    assert found == {
        "ReLU": 9.0,
        "PCA": 2.0,
        "Random directions, model.latents=16": 19.0,
        "Random directions, model.latents=128": 131.0,
    }
    assert figures(store.selection(), "scenes") == {"ReLU": 1.0}  # and nothing sets it apart
