"""Which result fills a cell."""

import json
import math

import pytest

from clipsae.report import Wanted, collect, select
from clipsae.report.variants import Line

TINY = Wanted("clipsae-tiny", "builtin", -2, "paper", 128)


def choose(store, **more):
    return select(collect(store.root), Wanted(**{**vars(TINY), **more}))


def value(selection, model, dataset, column):
    of = selection.of(selection.main(model), dataset).set_index("metric")
    return of.value[column]


def test_an_empty_or_missing_store_gives_nothing(store):
    selection = choose(store)
    assert selection.folders == ()
    assert selection.datasets == ()
    assert selection.superseded == selection.unfitting == 0


def test_the_mean_over_seeds_and_its_spread(store):
    for seed, accuracy in enumerate((10.0, 20.0, 60.0)):
        store.evaluation("relu", "scenes", {"no_sae": 90.0, "on_5": accuracy}, seed=seed)
    cell = choose(store).of(Line("relu"), "scenes").set_index("metric").loc["on_5"]
    assert cell.value == pytest.approx(30.0)
    assert cell["std"] == pytest.approx(math.sqrt((20**2 + 10**2 + 30**2) / 2))
    assert cell.seeds == 3


def test_the_newest_result_of_a_seed_counts_whatever_its_name(store):
    store.evaluation("relu", "scenes", {"on_5": 1.0, "on_10": 7.0}, finished=300)
    store.evaluation("relu", "scenes", {"on_5": 2.0}, finished=500)
    store.evaluation("relu", "scenes", {"on_5": 3.0}, finished=400)
    selection = choose(store)
    assert value(selection, "relu", "scenes", "on_5") == 2.0
    # All three have the same settings: a later one with fewer n takes no figure away.
    assert value(selection, "relu", "scenes", "on_10") == 7.0
    assert selection.lines[0] == Line("relu")
    assert selection.superseded == 1
    assert selection.differences == ()


@pytest.mark.parametrize(
    "other",
    [
        {"clip": "ViT-B-16-quickgelu"},
        {"weights": None},
        {"protocol": "heldout"},
        {"latents": 256},
    ],
)
def test_results_of_another_clip_protocol_or_size_do_not_mix(store, other):
    store.evaluation("relu", "scenes", {"on_5": 1.0}, finished=1)
    store.evaluation("relu", "scenes", {"on_5": 2.0}, finished=2, **other)
    selection = choose(store)
    assert value(selection, "relu", "scenes", "on_5") == 1.0
    assert selection.unfitting == 1
    assert selection.superseded == 0


def test_the_tables_k_is_that_with_most_datasets_ties_to_the_smallest(store):
    for k, datasets in ((16, "ab"), (32, "abc"), (64, "bcd")):
        for dataset in datasets:
            store.evaluation("topk", dataset, {"on_5": float(k)}, k=k)
    assert choose(store).k[Line("topk")] == 32
    assert value(choose(store), "topk", "a", "on_5") == 32.0
    assert choose(store, k=64).k[Line("topk")] == 64
    assert choose(store).k[Line("relu")] == 0


def test_rows_are_the_six_and_others_found_but_not_the_ablation(store):
    for model in ("mine", "attention_relu", "relu"):
        store.evaluation(model, "scenes", {"on_5": 1.0})
    six = ("relu", "jumprelu", "gated", "topk", "batch_topk", "sparsemax")
    selection = choose(store)
    assert selection.models == (*six, "mine")
    assert selection.expected == six
    assert choose(store, models=("mine",)).models == ("mine",)


def test_the_eleven_are_expected_once_one_of_them_has_a_result(store):
    store.evaluation("relu", "my_photos", {"on_5": 1.0})
    assert choose(store).datasets == ("my_photos",)
    store.evaluation("relu", "dtd", {"on_5": 1.0})
    assert len(choose(store).eleven) == 11
    assert choose(store).others == ("my_photos",)
    assert choose(store, datasets=("dtd",)).datasets == ("dtd",)


def test_the_newest_of_each_number_counts(store):
    first = {"cosine": 0.5, "fvu": 0.25}
    store.evaluation("relu", "scenes", {"on_5": 1.0}, metrics=first, finished=1)
    store.measurement("relu", "scenes", {"cosine": 0.75, "cknna": 0.5}, finished=2)
    store.measurement("relu", "scenes", {"cknna": 0.25}, finished=9)
    metrics = choose(store).metrics.set_index("metric").value
    assert metrics.to_dict() == {"cosine": 0.75, "cknna": 0.25, "fvu": 0.25}


def test_measurements_of_an_earlier_version_are_named_in_one_line(store):
    folder = store.measurement("relu", "scenes", {"l0": 0.75})
    old = store.root / "measurement" / folder.name
    old.parent.mkdir()
    folder.rename(old)
    found = collect(store.root)
    (line,) = found.problems
    assert "1 of an earlier version" in line
    assert found.measurements.empty


def test_metrics_of_0_1_have_todays_names_and_meanings(store):
    store.measurement("topk", "scenes", {"l0": 0.75, "active": 32.0}, k=32)
    metrics = choose(store).metrics.set_index("metric").value
    assert metrics.to_dict() == {"zero_fraction": 0.75, "l0": 32.0}


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
    assert set(found.results.model) == {"relu"}


def test_a_missing_file_and_text_in_place_of_a_number_are_problems_too(store):
    folder = store.evaluation("relu", "scenes", {"on_5": 1.0}, metrics={})
    (folder / "results.csv").unlink()
    folder = store.measurement("relu", "scenes", {"fvu": 1.0})
    text = (folder / "metrics.csv").read_text().replace("1.0", "much")
    (folder / "metrics.csv").write_text(text)
    found = collect(store.root)
    assert len(found.problems) == 2
    assert found.results.empty
    assert found.measurements.empty


def test_unfinished_folders_are_not_looked_at(store):
    folder = store.evaluation("relu", "scenes", {"on_5": 1.0})
    partial = folder.with_name(f".{folder.name}.partial")
    folder.rename(partial)
    json.loads((partial / "meta.json").read_text())
    assert collect(store.root).problems == []
    assert collect(store.root).results.empty
