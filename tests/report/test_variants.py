"""Results that are not alike are never averaged, ranked or shown as one."""

import io

import pytest
from rich.console import Console

from clipsae.report import Commands, Wanted, collect, make_report, select, write_report
from clipsae.report.settings import settings_of
from clipsae.report.tables import average_table, compared, dataset_table, rank_table
from clipsae.report.variants import Line
from clipsae.tasks.report import in_parts

TINY = Wanted("clipsae-tiny", "builtin", -2, "paper", 128)


def choose(store, **more):
    return select(collect(store.root), Wanted(**{**vars(TINY), **more}))


def figures(selection, dataset, column="on_5"):
    rows = dataset_table(selection, dataset).rows
    return {row.labels[0]: row.cells[column].ours for row in rows if row.cells[column].ours}


def trained(store, name, *, learning_rate=0.001, fingerprint="f" * 16, seed=0, **trainer):
    """An SAE's record, as the store has it."""
    key = {
        "clip": {"name": "clipsae-tiny", "pretrained": "builtin", "layer": -2},
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


def test_a_smoke_run_replaces_nothing_and_is_averaged_with_nothing(store):
    for dataset in "abc":
        for seed, more in ((0, 0.0), (1, 2.0)):
            store.evaluation("sparsemax", dataset, {"on_5": 33.0 + more}, seed=seed)
            store.evaluation("relu", dataset, {"on_5": 20.0 + more}, seed=seed)
    store.evaluation("sparsemax", "a", {"on_5": 1.25}, max_steps=3, seed=0)
    selection = choose(store)
    assert figures(selection, "a") == {
        "ReLU, trainer.max_steps=600": 21.0,
        "Sparsemax, trainer.max_steps=600": 34.0,
        "Sparsemax, trainer.max_steps=3": 1.25,
    }
    assert figures(selection, "b") == {
        "ReLU, trainer.max_steps=600": 21.0,
        "Sparsemax, trainer.max_steps=600": 34.0,
    }
    assert selection.differences == (
        "trainer.max_steps is 600 in 12 results and 3 in 1 result (Sparsemax on a).",
    )
    (of,) = compared(selection, selection.others)
    table = rank_table(selection, of, "rank")
    assert table.title == "Mean rank over 3 datasets: trainer.max_steps=600"
    assert [row.cells["on_5"].ours for row in table.rows] == [2.0, 1.0]


def test_many_smoke_runs_do_not_decide_what_is_missing(store):
    for dataset in "abc":
        store.evaluation("sparsemax", dataset, {"on_5": 1.0}, max_steps=3)
        store.evaluation("topk", dataset, {"on_5": 1.0}, max_steps=3, k=8)
    store.evaluation("sparsemax", "a", {"on_5": 33.0})
    usual = {"trainer.max_steps": "600"}
    found = collect(store.root)
    models = ("sparsemax", "topk")
    selection = choose(store, usual=usual, models=models)
    assert [(line.model, line.common) for line in selection.lines] == [
        ("sparsemax", "trainer.max_steps=600"),
        ("sparsemax", "trainer.max_steps=3"),
        ("topk", "trainer.max_steps=3"),
    ]
    report = make_report(store.root, found, selection, Commands(["clip=tiny"]))
    gaps = [(gap.model, gap.dataset) for gap in report.missing]
    assert [gap for gap in gaps if gap[0] == "sparsemax"] == [("sparsemax", d) for d in "bc"]
    assert all("max_steps=600" in g.command for g in report.missing if g.model == "sparsemax")
    # Without a config that says what is usual the most results do.
    assert choose(store, models=models).lines[0].common == "trainer.max_steps=3"


def test_a_narrow_terminal_cuts_no_figure(store):
    datasets = [f"dataset_{i}" for i in range(9)]
    for i, dataset in enumerate(datasets):
        store.evaluation("sparsemax", dataset, {"on_5": 33.25 + i, "on_10": 41.5 + i})
        store.evaluation("sparsemax", dataset, {"on_5": 1.25 + i}, max_steps=3)
    table = average_table(choose(store), tuple(datasets), "average", "nine datasets")
    for width in (40, 60, 80, 200):
        console = Console(width=width, file=io.StringIO())
        for part in in_parts(table, console):
            console.print(part)
        said = console.file.getvalue()
        assert max(map(len, said.splitlines())) <= width
        for row in table.rows:
            figures = [row.cells[name].ours for name in ("on_5", "on_10") if name in row.cells]
            assert all(f"{x:.2f}" in said for x in figures if x is not None)
        assert "…" not in said


def test_the_report_on_what_has_a_setting(store):
    store.evaluation("sparsemax", "a", {"on_5": 33.0})
    store.evaluation("sparsemax", "b", {"on_5": 1.25}, max_steps=3)
    selection = choose(store, settings={"trainer.max_steps": "600"})
    assert figures(selection, "a") == {"Sparsemax": 33.0}
    assert selection.differences == ()
    assert selection.others == ("a",)
    assert selection.unfitting == 1


def test_a_pair_that_has_a_figure_by_another_recipe_of_the_model_is_not_missing(store):
    for dataset, rate in (("a", 0.001), ("b", 0.002), ("c", 0.001)):
        sae = trained(store, f"sparsemax-{dataset}", learning_rate=rate)
        store.evaluation("sparsemax", dataset, {"on_5": 30.0}, sae=sae)
    found = collect(store.root)
    selection = choose(store, models=("sparsemax",))
    assert len(selection.lines) == 2
    report = make_report(store.root, found, selection, Commands(["clip=tiny"]))
    assert [(gap.dataset, gap.what) for gap in report.missing if gap.what == "all"] == []


def test_what_is_not_alike_stands_above_everything_else_on_the_page(store):
    store.evaluation("sparsemax", "a", {"on_5": 33.0})
    store.evaluation("topk", "b", {"on_5": 33.0}, k=8)
    store.evaluation("sparsemax", "a", {"on_5": 1.25}, max_steps=3)
    found = collect(store.root)
    selection = select(found, TINY)
    report = make_report(store.root, found, selection, Commands(["clip=tiny"]))
    page = write_report(report, store.root / "report").read_text()
    said = (
        "trainer.max_steps is 600 in 2 results (Sparsemax on a, TopK on b) and 3 in 1 result "
        "(Sparsemax on a)."
    )
    assert report.differences == [said]
    assert page.index(said) < page.index("<h2>Findings") < page.index("<table")
    # A gap in a row is filled with what sets the row apart.
    commands = {(gap.model, gap.dataset): gap.command for gap in report.missing}
    assert commands["topk", "a"] == (
        "python run.py model=topk model.k=8 dataset=a clip=tiny trainer.max_steps=600 seed=0"
    )
    # A model without any is to be like most of the others.
    assert commands["relu", "a"] == (
        "python run.py model=relu dataset=a clip=tiny trainer.max_steps=600 seed=0"
    )


def test_one_more_model_on_one_dataset_leaves_the_mean_ranks_as_they_are(store):
    for at, dataset in enumerate("abcde"):
        for model in ("relu", "gated", "sparsemax"):
            store.evaluation(model, dataset, {"on_5": at + len(model)})
    before = rank_table(choose(store), *compared(choose(store), tuple("abcde")), "rank")
    store.evaluation("mine", "a", {"on_5": 99.0})
    selection = choose(store)
    (of,) = compared(selection, tuple("abcde"))
    after = rank_table(selection, of, "rank")
    assert before.title == after.title == "Mean rank over 5 datasets"
    assert before.rows == after.rows
    assert "Excluded, with results for fewer of these datasets: mine (1)." in after.caption


@pytest.mark.parametrize(
    ("changed", "label"),
    [
        ({"max_time": {"minutes": 1}}, "trainer.max_time.minutes=1"),
        ({"limit_train_batches": 0.5}, "trainer.limit_train_batches=0.5"),
        ({"learning_rate": 0.01}, "optimizer.learning_rate=0.01"),
        ({"fingerprint": "0" * 16}, "train_dataset.fingerprint=00000000"),
    ],
)
def test_whatever_is_in_the_key_sets_results_apart(store, changed, label):
    first, second = trained(store, "x-1"), trained(store, "x-2", **changed)
    store.evaluation("topk", "a", {"on_5": 10.0}, k=8, sae=first)
    store.evaluation("topk", "a", {"on_5": 30.0}, k=8, sae=second)
    lines = choose(store).lines
    labels = {line.variant for line in lines if line.model == "topk"}
    assert label in labels
    assert len(labels) == 2
    assert sorted(figures(choose(store), "a").values()) == [10.0, 30.0]


def test_seeds_and_the_models_own_recipes_set_nothing_apart(store):
    for seed in (0, 1):
        for model, rate in (("relu", 0.1), ("topk", 0.2)):
            name = trained(store, f"{model}-{seed}", learning_rate=rate, seed=seed)
            k = 8 if model == "topk" else None
            key = {"dataset": {"name": "a"}, "evaluation": {"count_threshold": rate}}
            store.evaluation(model, "a", {"on_5": 10.0 + seed}, k=k, seed=seed, sae=name, key=key)
    selection = choose(store)
    assert selection.differences == ()
    assert figures(selection, "a") == {"ReLU": 10.5, "TopK (k = 8)": 10.5}


def test_images_that_changed_under_the_same_name_are_told_apart_on_that_dataset_alone(store):
    for dataset, prints in (("a", ("1" * 16, "2" * 16)), ("b", ("3" * 16,))):
        for at, fingerprint in enumerate(prints):
            key = {"dataset": {"name": dataset, "fingerprint": fingerprint}}
            store.evaluation("relu", dataset, {"on_5": 10.0 + at}, key=key)
    selection = choose(store)
    assert figures(selection, "a") == {
        "ReLU, dataset.fingerprint=11111111": 10.0,
        "ReLU, dataset.fingerprint=22222222": 11.0,
    }
    assert figures(selection, "b") == {"ReLU": 10.0}


def test_a_hash_of_images_is_not_named_where_an_option_says_why_they_are_others(store):
    for size in (100, 200):
        of = {"name": "a", "size": {"test": size}, "fingerprint": f"{size:016x}"}
        store.evaluation("relu", "a", {"on_5": 1.0 * size}, key={"dataset": of})
    assert figures(choose(store), "a") == {
        "ReLU, dataset.size.test=100": 100.0,
        "ReLU, dataset.size.test=200": 200.0,
    }


def test_a_measurement_is_in_the_row_of_the_evaluation_of_its_sae(store):
    for steps in (3, 600):
        store.evaluation(
            "relu", "a", {"on_5": 1.0 * steps}, max_steps=steps, metrics={"cosine": 0.5}
        )
        store.measurement("relu", "a", {"cknna": 0.001 * steps}, max_steps=steps)
    selection = choose(store)
    assert {line.variant for line in selection.lines if line.model == "relu"} == {
        "trainer.max_steps=3",
        "trainer.max_steps=600",
    }
    of = selection.rows(selection.metrics, Line("relu", "trainer.max_steps=3"))
    assert of.set_index("metric").value.to_dict() == {"cosine": 0.5, "cknna": 0.003}


def test_names_are_those_of_the_config(store):
    key = {
        "sae": "x",
        "dataset": {"name": "a"},
        "evaluation": {"ns": [1, 5], "settings": ["on"], "count_threshold": 2.0, "split": "test"},
    }
    of_sae = {
        "sae": {"latents": 8, "scale": 1.0},
        "training": {
            "batch_size": 4,
            "precision": "32-true",
            "seed": 3,
            "cache": {"dtype": "bf16"},
        },
    }
    config = {"train_dataset": {"_target_": "x"}}
    assert dict(settings_of(key, of_sae, config, 3)) == {
        "dataset.name": "a",
        "evaluation.split": "test",
        "features.batch_size": "4",
        "features.cache.dtype": "bf16",
        "evaluation.count_threshold": "2.0",
        "model.scale": "1.0",
        "schema": "3",
        "trainer.precision": "32-true",
    }


def test_classes_that_compete_without_images_are_said(store):
    store.evaluation("relu", "a", {"on_5": 1.0}, classes=5, competing=1000)
    store.evaluation("relu", "b", {"on_5": 1.0}, classes=5)
    selection = choose(store)
    assert dataset_table(selection, "a").caption.endswith("1,000 images, 5 of 1,000 classes.")
    assert dataset_table(selection, "b").caption.endswith("1,000 images, 5 classes.")
