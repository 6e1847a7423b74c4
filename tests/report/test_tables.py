"""Cells of the tables against values worked out by hand."""

import math

import numpy as np
import pandas as pd
import pytest
import torch

from clipsae.report import Commands, collect, published
from clipsae.report.findings import findings
from clipsae.report.missing import fewer_seeds, missing_cells
from clipsae.report.settings import set_apart
from clipsae.report.table import to_csv, to_latex, to_markdown
from clipsae.report.tables import (
    ablation_tables,
    accuracy_tables,
    average_table,
    compared,
    fidelity_table,
    headline_table,
    metric_tables,
    rank_table,
    recovery_tables,
    stability_table,
)
from clipsae.sae import SAE

PAPER = ("no_sae", "on_1", "on_5", "on_10", "on_50", "on_all")


def cells(table):
    return {row.model or row.labels[0]: row.cells for row in table.rows}


def test_a_cell_is_ours_published_and_their_difference(store):
    for seed, accuracy in enumerate((8.0, 9.0)):
        columns = {"no_sae": 67.0, "on_5": accuracy, "on_all": 50.0}
        store.evaluation("topk", "imagenet", columns, k=32, seed=seed)
    (table,) = accuracy_tables(store.selection(), "imagenet")
    assert table.title == "Table 12: ImageNet"
    assert [c.label for c in table.columns][-2:] == ["on_50", "on_128"]
    row = cells(table)["topk"]
    assert row["on_5"].ours == 8.5
    assert row["on_5"].std == pytest.approx(math.sqrt(0.5))
    assert row["on_5"].printed == "8.2501"
    assert row["on_5"].difference == pytest.approx(8.5 - 8.2501)
    # All latents are compared with all latents, for any M.
    assert row["on_all"].difference == pytest.approx(50.0 - 47.956)
    assert row["on_10"].ours is None
    assert row["on_10"].printed == "32.646"
    assert row["on_10"].difference is None
    assert cells(table)["sparsemax"]["on_1"].printed == "10.929"
    assert [row.labels for row in table.rows][3] == ("TopK (k = 32)",)


def test_retrieval_stands_between_chance_and_clip(store):
    values = {"shared_latents": 0.25, "bridge_same": 0.4, "bridge_same_shuffled": 0.1}
    values |= {"image_to_text_1": 0.6, "image_to_text_1_random": 0.1, "image_to_text_1_codes": 0.3}
    store.measurement("topk", "scenes", values | {"image_to_text_1_embedding": 0.9})
    (table,) = metric_tables(store.selection(), "scenes")
    assert (table.name, [c.key for c in table.columns]) == (
        "towers_scenes",
        ["shared_latents", "bridge_same", "image_to_text_1", "image_to_text_1_codes"],
    )
    row = cells(table)["topk"]
    assert (row["bridge_same"].floor, row["bridge_same"].gap) == (0.1, None)
    assert row["image_to_text_1"].gap == pytest.approx((0.6 - 0.1) / (0.9 - 0.1))
    assert row["image_to_text_1_codes"].gap == pytest.approx((0.3 - 0.1) / (0.9 - 0.1))


def test_a_dataset_that_the_paper_does_not_have_has_ours_only(store):
    accuracy = {"no_sae": 99.0, "on_20": 3.0, "off_20": 7.0}
    store.evaluation("relu", "mine", accuracy, classes=5, competing=1000)
    table, settings = accuracy_tables(store.selection(), "mine")
    assert not table.has_published
    assert [c.key for c in table.columns] == ["no_sae", "on_20"]
    assert table.caption.endswith("1,000 images, 5 of 1,000 classes.")
    assert cells(settings)["relu"]["off_20"].ours == 7.0


def test_the_average_compares_over_the_same_datasets(store):
    for dataset, accuracy in (("dtd", 30.0), ("eurosat", 50.0)):
        store.evaluation("sparsemax", dataset, dict.fromkeys(PAPER, accuracy))
    selection = store.selection()
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
    table = average_table(store.selection(), ("a", "b"), "average", "two")
    cell = cells(table)["relu"]["on_5"]
    assert cell.ours == pytest.approx(((10 + 30 + 99) / 3 + 40) / 2)
    assert cell.std == pytest.approx(math.sqrt(15**2 + 15**2))
    assert cell.seeds == 2


def test_mean_ranks_share_ties_and_leave_out_datasets_with_gaps(store):
    accuracies = {
        "dtd": {"relu": 10.0, "topk": 20.0, "sparsemax": 30.0},  # ranks 3, 2, 1
        "eurosat": {"relu": 40.0, "topk": 40.0, "sparsemax": 5.0},  # 1.5, 1.5, 3
        "food101": {"relu": 90.0, "topk": 1.0},  # sparsemax is missing
    }
    for dataset, by_model in accuracies.items():
        for model, accuracy in by_model.items():
            k = 32 if model == "topk" else None
            store.evaluation(model, dataset, {"on_1": accuracy}, k=k)
    store.evaluation("mine", "dtd", {"on_1": 99.0})  # takes the other dataset from nobody
    selection = store.selection()
    (group,) = compared(selection, selection.eleven)
    table = rank_table(selection, group, "rank")
    assert table.title == "Mean rank over 2 datasets"
    assert "all of them have results for: DTD, EuroSAT." in table.caption
    assert "Excluded, with results for fewer of these datasets: mine (1)." in table.caption
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
    table, other = ablation_tables(store.selection())
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
    store.evaluation("relu", "scenes", {"no_sae": 90.0, "on_all": 58.0}, classes=10, seed=1)
    cell = cells(fidelity_table(store.selection()))["relu"]["scenes"]
    assert cell.ours == pytest.approx((54 - 10) / (90 - 10))
    assert cell.std == pytest.approx(math.sqrt(0.5) * 8 / 80)


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
    selected, dense, table_6 = metric_tables(store.selection(), "imagenet")
    row = cells(selected)["topk"]
    assert row["zero_fraction"].difference == pytest.approx(0.9993 - 0.966)
    assert row["fvu_per_token"].difference == pytest.approx(0.2 - 0.169)
    assert row["decoder_orthogonality"].printed == "0.003"
    assert row["fvu"].published is None
    assert cells(dense)["topk"]["zero_fraction_dense"].difference == pytest.approx(0.95 - 0.966)
    for word in ("share of zeros", "per token", "corpus", "decoder", "dead"):
        assert word in selected.caption
    assert "0.9993" in dense.caption
    assert table_6.has_published
    # On other data: ours only, and tables only of what was measured.
    numbers = {"cosine": 0.5, "patch_concepts_found": 0.5, "image_auroc": 0.75}
    store.measurement("topk", "scenes", numbers, k=32)
    (other,) = metric_tables(store.selection(), "scenes")
    patches, images = recovery_tables(store.selection(), "scenes")
    assert not other.has_published
    assert [c.label for c in patches.columns] == ["concepts found"]
    assert [c.label for c in images.columns] == ["AUROC"]
    assert cells(images)["topk"]["image_auroc"].ours == 0.75


def test_one_number_of_each_kind_stands_beside_the_others_with_what_it_must_beat(store):
    ends = {"patch_concepts_found_untrained": 0.1, "patch_concepts_found_probe": 0.9}
    for k, found in ((4, 0.5), (8, 0.3)):
        known = {
            "l0": k,
            "zero_fraction": 0.9,
            "fvu": 0.2,
            "fvu_per_token": 0.1,
            "dead_fraction": 0.0,
        }
        numbers = known | ends | {"patch_concepts_found": found, "monosemanticity_mean": 0.3}
        store.measurement("topk", "scenes", numbers, k=k)
    numbers = {"monosemanticity_mean": 0.2}
    store.measurement("topk", "scenes", numbers, k=4, image_encoder="another")
    table = headline_table(store.selection(), "scenes")
    row = cells(table)["topk"]
    assert row["patch_concepts_found"].ours == 0.5
    assert row["patch_concepts_found"].gap == pytest.approx((0.5 - 0.1) / (0.9 - 0.1))
    assert row["monosemanticity_mean"].ours == 0.3
    assert {"l0", "fvu", "dead_fraction"} < {column.key for column in table.columns}
    assert "fvu_per_token" not in {column.key for column in table.columns}


def test_decoders_of_all_seeds_are_compared_both_ways_and_what_is_missing_is_said(store):
    rows = []
    for seed in (0, 1, 2):
        torch.manual_seed(seed)
        sae = SAE(d=8, latents=128, architecture="linear", activation="topk", k=2)
        folder = store.root / "sae" / f"topk-{seed}"
        folder.mkdir(parents=True)
        sae.save(folder)
        unit = sae.decoder_rows().detach().double().numpy()
        rows.append(unit / np.linalg.norm(unit, axis=1, keepdims=True))
        store.evaluation("topk", "scenes", {"on_5": 1.0}, k=2, seed=seed, sae=folder.name)
        store.evaluation("relu", "scenes", {"on_5": 1.0}, seed=seed, sae=f"gone-{seed}")
    store.evaluation("topk", "scenes", {"on_5": 1.0}, k=4, seed=0, sae="another-k")
    table, problems = stability_table(store.root, collect(store.root), store.selection())
    pairs = [(a, b) for a in range(3) for b in range(3) if a != b]
    values = [(rows[a] @ rows[b].T).max(axis=1).mean() for a, b in pairs]
    (row,) = table.rows
    assert row.labels == ("TopK (k = 2)", "scenes")
    assert row.cells["pairs"].ours == 6
    assert row.cells["cosine"].ours == pytest.approx(np.mean(values), abs=1e-6)
    assert row.cells["cosine"].std == pytest.approx(np.std(values, ddof=1), abs=1e-6)
    assert [line.split(":")[0] for line in problems] == ["sae/gone-0", "sae/gone-1", "sae/gone-2"]


# --- what is missing ---


def gaps(selection, commands):
    return {(gap.model, gap.dataset): gap for gap in missing_cells(selection, commands)}


def test_missing_cells_name_the_command_that_fills_them(store):
    full = dict.fromkeys(PAPER, 1.0)
    for model in ("relu", "topk"):
        store.evaluation(model, "dtd", full, k=16 if model == "topk" else None)
    store.evaluation("relu", "eurosat", {"no_sae": 1.0, "on_5": 1.0})
    selection = store.selection(models=("relu", "topk"), datasets=("dtd", "eurosat", "mine"))
    found = gaps(selection, Commands(["clip=vit_b_16", "paths.output_dir=/a b"], seed=3))
    nothing_of_mine = {("relu", "mine"), ("topk", "mine")}
    assert set(found) == {("relu", "eurosat"), ("topk", "eurosat"), *nothing_of_mine}
    assert found["relu", "eurosat"].what == "on_1, on_10, on_50, on_128"
    assert found["topk", "eurosat"].what == "all"
    assert found["topk", "eurosat"].command == (
        "python run.py model=topk model.k=16 dataset=eurosat clip=vit_b_16 "
        "'paths.output_dir=/a b' seed=3"
    )


def test_a_pair_that_has_a_figure_by_another_recipe_of_the_model_is_not_missing(store):
    for dataset, rate in (("a", 0.001), ("b", 0.002), ("c", 0.001)):
        key = {"training": {"learning_rate": rate}, "train_dataset": {"name": "scenes"}}
        sae = store.sae(f"sparsemax-{dataset}", key)
        store.evaluation("sparsemax", dataset, {"on_5": 30.0}, sae=sae)
    selection = store.selection(models=("sparsemax",))
    assert len(selection.lines) == 2
    assert gaps(selection, Commands([])) == {}


def test_a_model_without_a_trained_sae_is_missing_whatever_its_baselines_have(store):
    store.evaluation("topk", "scenes", {"on_5": 3.0})
    store.evaluation("topk", "scenes", {"on_5": 1.0}, max_steps=0)
    store.evaluation("relu", "scenes", {"on_5": 1.0}, max_steps=0)
    store.evaluation("gated", "scenes", {"on_5": 1.0}, options={"freeze": "decoder"})
    selection = store.selection(models=("topk", "relu", "gated"))
    assert len(selection.baselines) == 3
    found = gaps(selection, Commands([]))
    assert {model: gap.what for (model, _), gap in found.items()} == {"relu": "all", "gated": "all"}
    assert found["gated", "scenes"].command == "python run.py model=gated dataset=scenes seed=0"
    (filled, *_) = findings(selection, list(found.values()))
    assert filled.startswith("1 of 3 pairs of a model and a dataset have results;")


def test_fewer_seeds_are_one_multirun_a_model_and_image_folders_keep_their_overrides(store):
    for dataset in ("a", "b", "c", "mine"):
        for seed in (0, 1, 2) if dataset == "a" else (0,):
            store.evaluation("relu", dataset, {"on_5": 1.0}, seed=seed)
    mine = ["dataset=image_folder", "dataset.root=/photos", "dataset.name=mine"]
    commands = Commands(["clip=tiny"], datasets={"mine": mine})
    assert [entry.command for entry in fewer_seeds(store.selection(), commands)] == [
        "python run.py -m model=relu dataset=b,c clip=tiny seed=1,2",
        f"python run.py -m model=relu {' '.join(mine)} clip=tiny seed=1,2",
    ]
    expected = f"python run.py model=gated {' '.join(mine)} clip=tiny seed=0"
    assert gaps(store.selection(), commands)["gated", "mine"].command == expected


def test_the_recipes_say_rate_decay_and_clipping(store):
    def training(**optimizer) -> dict:
        trainer = {"max_steps": 2400, "gradient_clip_val": optimizer.pop("clip", None)}
        return {"trainer": trainer, "decay": "linear", "decay_fraction": 0.2, **optimizer}

    keys = {
        "topk": {"training": training(learning_rate=1e-3, reference_latents=512, clip=0.3)},
        "jumprelu": {
            "training": training(learning_rate=2e-3, sparsity_warmup_steps=120),
            "sae": {"l0_coefficient": 3.0, "target_l0": 24},
        },
        "sparsemax": {"training": training(learning_rate=4e-4, decay_fraction=1.0)},
        "relu": {
            "training": training(learning_rate=4e-4, decay="constant"),
            "sae": {"l1_coefficient": 8e-5},
        },
    }
    for model, key in keys.items():
        store.evaluation(model, "scenes", {"on_5": 1.0}, sae=store.sae(model, key))
    store.evaluation("gated", "scenes", {"on_5": 1.0})  # of whose training nothing is known
    (table,) = (t for s in store.report().sections for t in s.tables if t.name == "recipes")
    assert [row.labels[1:] for row in table.rows] == [
        ("2,400", "0.0004", "none", "no", "l1_coefficient=8e-05"),
        (
            *("2,400", "0.002", "linear, over the last 20%", "no"),
            "l0_coefficient=3.0, target_l0=24, growing over 120 steps",
        ),
        ("2,400", "0.002", "linear, over the last 20%", "0.3", ""),  # 512 / 128 latents
        ("2,400", "0.0004", "linear, after the warm-up", "no", ""),
    ]
    for write in (to_markdown, to_csv, to_latex):
        assert "over the last 20" in write(table)


def test_a_transcoder_is_called_by_what_it_writes():
    plain = {"model.subtract_bias": "true", "model.target_layer": "null"}
    transcoder = {"model.subtract_bias": "false", "model.target_layer": "-1"}
    figures = pd.DataFrame({"settings": [tuple(one.items()) for one in (plain, transcoder)]})
    figures = figures.assign(model="topk", learned="", dataset="shapes", folder=["a", "b"])
    lines, _ = set_apart(figures, {})
    assert [one.variant for one in lines.line] == [
        "model.target_layer=null",
        "model.target_layer=-1",
    ]
