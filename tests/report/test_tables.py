"""Cells of the tables against values worked out by hand."""

import math

import pytest

from clipsae.report import Commands, Wanted, collect, published, select
from clipsae.report.missing import fewer_seeds, missing_cells
from clipsae.report.tables import (
    ablation_tables,
    average_table,
    compared,
    dataset_table,
    fidelity_table,
    interpretability_tables,
    other_settings_table,
    rank_table,
    recovery_table,
    sparsity_tables,
)

PAPER = ("no_sae", "on_1", "on_5", "on_10", "on_50", "on_all")
TINY = Wanted("clipsae-tiny", "builtin", -2, "paper", 128)


def choose(store, **more):
    return select(collect(store.root), Wanted(**{**vars(TINY), **more}))


def cells(table):
    return {row.model or row.labels[0]: row.cells for row in table.rows}


def test_a_cell_is_ours_published_and_their_difference(store):
    for seed, accuracy in enumerate((8.0, 9.0)):
        columns = {"no_sae": 67.0, "on_5": accuracy, "on_all": 50.0}
        store.evaluation("topk", "imagenet", columns, k=32, seed=seed)
    table = dataset_table(choose(store), "imagenet")
    assert table.title == "Table 12: ImageNet"
    assert [c.title for c in table.columns][-2:] == ["on_50", "on_128"]
    row = cells(table)["topk"]
    assert row["on_5"].ours == 8.5
    assert row["on_5"].std == pytest.approx(math.sqrt(0.5))
    assert row["on_5"].printed == "8.2501"
    assert row["on_5"].difference == pytest.approx(8.5 - 8.2501)
    # All latents are compared with all latents, whatever M is.
    assert row["on_all"].difference == pytest.approx(50.0 - 47.956)
    assert row["on_10"].ours is None
    assert row["on_10"].printed == "32.646"
    assert row["on_10"].difference is None
    assert cells(table)["sparsemax"]["on_1"].printed == "10.929"
    assert [row.labels for row in table.rows][3] == ("TopK (k = 32)",)


def test_a_dataset_of_ones_own_has_ours_only(store):
    store.evaluation("relu", "my_photos", {"no_sae": 99.0, "on_20": 3.0, "off_20": 7.0})
    table = dataset_table(choose(store), "my_photos")
    assert not table.has_published
    assert [c.key for c in table.columns] == ["no_sae", "on_20"]
    settings = other_settings_table(choose(store), "my_photos")
    assert cells(settings)["relu"]["off_20"].ours == 7.0


def test_the_average_compares_over_the_same_datasets(store):
    for dataset, accuracy in (("dtd", 30.0), ("eurosat", 50.0)):
        store.evaluation("sparsemax", dataset, dict.fromkeys(PAPER, accuracy))
    selection = choose(store)
    rows = cells(average_table(selection, selection.eleven, "average", "the eleven"))
    cell = rows["sparsemax"]["on_10"]
    assert cell.ours == 40.0
    assert cell.published == pytest.approx((46.986 + 34.056) / 2)
    assert cell.difference == pytest.approx(40.0 - (46.986 + 34.056) / 2)
    assert rows["sparsemax"]["datasets"].ours == 2
    # Without ours: the published mean over all eleven.
    known = published.zero_shot()
    all_eleven = [float(known[d, "relu", "on_10"]) for d in selection.eleven]
    assert rows["relu"]["on_10"].published == pytest.approx(sum(all_eleven) / 11)
    assert rows["relu"]["on_10"].ours is None


def test_the_averages_spread_is_that_of_the_seeds_averages(store):
    accuracy = {("a", 0): 10.0, ("b", 0): 20.0, ("a", 1): 30.0, ("b", 1): 60.0}
    for (dataset, seed), value in accuracy.items():
        store.evaluation("relu", dataset, {"on_5": value}, seed=seed)
    store.evaluation("relu", "a", {"on_5": 99.0}, seed=2)  # no such seed of b
    selection = choose(store)
    cell = cells(average_table(selection, ("a", "b"), "average", "two"))["relu"]["on_5"]
    assert cell.ours == pytest.approx(((10 + 30 + 99) / 3 + 40) / 2)
    assert cell.std == pytest.approx(math.sqrt(15**2 + 15**2))
    assert cell.seeds == 2


def test_mean_ranks_share_ties_and_leave_out_datasets_with_gaps(store):
    accuracies = {
        "dtd": {"relu": 10.0, "topk": 20.0, "sparsemax": 30.0},  # ranks 3, 2, 1
        "eurosat": {"relu": 40.0, "topk": 40.0, "sparsemax": 5.0},  # 1.5, 1.5, 3
        "food101": {"relu": 90.0, "topk": 1.0},  # sparsemax is missing
    }
    for dataset, of in accuracies.items():
        for model, accuracy in of.items():
            k = 32 if model == "topk" else None
            store.evaluation(model, dataset, {"on_1": accuracy}, k=k)
    selection = choose(store)
    (of,) = compared(selection, selection.eleven)
    table = rank_table(selection, of, "rank")
    assert table.title == "Mean rank over 2 datasets"
    assert "all of them have results for: DTD, EuroSAT." in table.caption
    rows = cells(table)
    assert list(rows) == ["relu", "topk", "sparsemax"]
    assert [rows[m]["on_1"].ours for m in rows] == [2.25, 1.75, 2.0]
    # Published on_1, DTD: 13.457, 6.117, 34.804; EuroSAT: 10.200, 16.46, 19.301.
    assert [rows[m]["on_1"].published for m in rows] == [2.5, 2.5, 1.0]
    assert rows["relu"]["on_1"].difference == -0.25
    assert rows["relu"]["on_5"].ours is None


def test_the_ablation_beside_the_published_one(store):
    accuracy = {"on_1": 5.0, "on_5": 20.0, "on_10": 25.0, "on_50": 40.0}
    store.evaluation("attention_relu", "imagenet", accuracy)
    store.evaluation("linear_sparsemax", "scenes", accuracy)
    selection = choose(store)
    table, other = ablation_tables(selection)
    assert [row.labels[1:] for row in table.rows] == [
        ("linear", "relu"),
        ("linear", "sparsemax"),
        ("attention", "relu"),
        ("attention", "sparsemax"),
    ]
    rows = cells(table)
    assert rows["attention_relu"]["on_50"].difference == pytest.approx(40 - 36.33)
    assert rows["linear_sparsemax"]["on_5"].printed == "29.87"
    assert rows["linear_sparsemax"]["on_5"].ours is None
    assert not other.has_published


def test_fidelity_is_above_chance(store):
    store.evaluation("relu", "scenes", {"no_sae": 90.0, "on_all": 50.0}, classes=10)
    cell = cells(fidelity_table(choose(store)))["scenes"]["ReLU"]
    assert cell.ours == pytest.approx((50 - 10) / (90 - 10))


def test_table_5_shows_both_codes_beside_the_published_figures(store):
    values = {
        "zero_fraction": 0.9993,
        "zero_fraction_dense": 0.95,
        "fvu_per_token": 0.2,
        "fvu": 0.1,
        "dead_fraction": 0.5,
        "decoder_orthogonality": 0.0013,
    }
    store.measurement("topk", "imagenet", values, k=32)
    selected, dense = sparsity_tables(choose(store), "imagenet")
    row = cells(selected)["topk"]
    assert row["zero_fraction"].difference == pytest.approx(0.9993 - 0.966)
    assert row["fvu_per_token"].difference == pytest.approx(0.2 - 0.169)
    assert row["decoder_orthogonality"].printed == "0.003"
    assert row["fvu"].published is None
    assert cells(dense)["topk"]["zero_fraction_dense"].difference == pytest.approx(0.95 - 0.966)
    for word in ("share of zeros", "per token", "corpus", "decoder", "dead"):
        assert word in selected.caption
    assert "0.9993" in dense.caption
    # On other data: ours only, and the dense table only where it was measured.
    store.measurement("topk", "scenes", {"cosine": 0.5}, k=32)
    (other,) = sparsity_tables(choose(store), "scenes")
    assert not other.has_published


def test_table_6_names_encoder_and_pooling_one_table_each(store):
    scores = {"monosemanticity_mean": 0.5, "monosemanticity_max": 0.9}
    store.measurement("sparsemax", "imagenet", scores, image_encoder="a/b", pooling="mean")
    (table,) = interpretability_tables(choose(store), "imagenet")
    assert "Image encoder: a/b; pooling of token codes: mean." in table.caption
    assert cells(table)["sparsemax"]["monosemanticity_mean"].difference == pytest.approx(
        0.5 - 0.3484
    )
    store.measurement("sparsemax", "imagenet", scores, image_encoder="a/b", pooling="max")
    assert len(interpretability_tables(choose(store), "imagenet")) == 2
    assert interpretability_tables(choose(store), "scenes") == []


def test_recovery_has_the_columns_that_were_measured(store):
    store.measurement("relu", "scenes", {"patch_concepts_found": 0.5, "image_auroc": 0.75})
    table = recovery_table(choose(store), "scenes")
    assert [c.key for c in table.columns] == ["patch_concepts_found", "image_auroc"]
    assert [c.title for c in table.columns] == ["concepts found, patch", "AUROC, image"]
    assert cells(table)["relu"]["image_auroc"].ours == 0.75
    assert not recovery_table(choose(store), "dtd").columns


def test_missing_cells_name_the_command_that_fills_them(store):
    full = dict.fromkeys(PAPER, 1.0)
    for model in ("relu", "topk"):
        store.evaluation(model, "dtd", full, k=16 if model == "topk" else None)
    store.evaluation("relu", "eurosat", {"no_sae": 1.0, "on_5": 1.0})
    selection = choose(store, models=("relu", "topk"), datasets=("dtd", "eurosat", "mine"))
    commands = Commands(["clip=vit_b_16", "paths.output_dir=/a b"], seed=3)
    gaps = {(g.model, g.dataset): g for g in missing_cells(selection, commands)}
    nothing_of_mine = {("relu", "mine"), ("topk", "mine")}
    assert set(gaps) == {("relu", "eurosat"), ("topk", "eurosat"), *nothing_of_mine}
    assert gaps["relu", "eurosat"].what == "on_1, on_10, on_50, on_128"
    assert gaps["topk", "eurosat"].what == "all"
    assert gaps["topk", "eurosat"].command == (
        "python run.py model=topk model.k=16 dataset=eurosat clip=vit_b_16 "
        "'paths.output_dir=/a b' seed=3"
    )


def test_with_imagenet_the_ablation_and_the_measurements_are_expected_too(store):
    store.evaluation("relu", "imagenet", dict.fromkeys(PAPER, 1.0), metrics={"zero_fraction": 0.5})
    gaps = {(g.model, g.dataset): g for g in missing_cells(choose(store), Commands([]))}
    assert gaps["attention_relu", "imagenet"].command == (
        "python run.py model=attention_relu dataset=imagenet seed=0"
    )
    assert gaps["topk", "dtd"].command == "python run.py model=topk dataset=dtd seed=0"
    lacking = gaps["relu", "imagenet"].what.split(", ")
    assert "zero_fraction" not in lacking
    assert {"cknna", "cosine", "monosemanticity_mean"} <= set(lacking)
    assert len(gaps) == 6 * 11 + 2


def test_fewer_seeds_are_one_multirun_a_model(store):
    for dataset in ("a", "b", "c"):
        for seed in (0, 1, 2) if dataset == "a" else (0,):
            store.evaluation("relu", dataset, {"on_5": 1.0}, seed=seed)
    (entry,) = fewer_seeds(choose(store), Commands(["clip=tiny"]))
    assert entry.command == "python run.py -m model=relu dataset=b,c clip=tiny seed=1,2"


def test_a_folder_of_ones_own_is_chosen_by_its_own_overrides(store):
    for dataset in ("a", "b", "mine"):
        for seed in (0, 1) if dataset == "a" else (0,):
            store.evaluation("relu", dataset, {"on_5": 1.0}, seed=seed)
    mine = ["dataset=image_folder", "dataset.root=/photos", "dataset.name=mine"]
    commands = Commands(["clip=tiny"], datasets={"mine": mine})
    assert [entry.command for entry in fewer_seeds(choose(store), commands)] == [
        "python run.py -m model=relu dataset=b clip=tiny seed=1",
        f"python run.py -m model=relu {' '.join(mine)} clip=tiny seed=1",
    ]
    gaps = {(g.model, g.dataset): g for g in missing_cells(choose(store), commands)}
    expected = f"python run.py model=gated {' '.join(mine)} clip=tiny seed=0"
    assert gaps["gated", "mine"].command == expected
