"""A sweep of several grids, and the page that is made of its finished cells."""

import importlib

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from clipsae.errors import ConfigError
from hydra_plugins.clipsae_launchers import grids
from tests.warm import run_py


class Context:
    config_loader = None


def jobs(arguments, **options):
    importlib.reload(grids)  # Hydra imports its own plugins again in each of its runs
    sweeper = grids.Grids(**options)
    sweeper.hydra_context = Context()
    given = [*sweeper._parse_config(), *arguments]
    (found,) = sweeper.split_arguments(OverridesParser.create().parse_overrides(given), None)
    return [" ".join(job) for job in found]


GRIDS = {"main": {"model": "topk,relu"}, "sizes": {"model": "topk", "model.latents": "32,64"}}


def test_cells_are_those_of_all_grids_in_order_and_each_once():
    found = jobs([], grids=GRIDS, params={"seed": "0,1"})
    assert found == [
        *(f"model={model} seed={seed}" for model in ("topk", "relu") for seed in (0, 1)),
        *(f"model=topk model.latents={m} seed={s}" for m in (32, 64) for s in (0, 1)),
    ]
    # A value on the command line holds in every grid: cells that are then the same are one.
    found = jobs(["model=relu", "model.latents=8"], grids=GRIDS, params={"seed": "0"})
    assert found == ["model=relu seed=0 model.latents=8"]
    assert jobs(["seed=3"], grids=GRIDS, only=["sizes"]) == [
        f"model=topk model.latents={m} seed=3" for m in (32, 64)
    ]
    # A grid's own axis replaces the common one, and a value on the command line both.
    own = {"main": {"model": "topk", "seed": "0,1"}, "sizes": {"model": "relu"}}
    found = jobs([], grids=own, params={"seed": "5"})
    assert found == ["model=topk seed=0", "model=topk seed=1", "model=relu seed=5"]
    found = jobs(["seed=7"], grids=own, params={"seed": "5"})
    assert found == ["model=topk seed=7", "model=relu seed=7"]
    with pytest.raises(ConfigError, match="only has 'size': expected names among main, sizes"):
        jobs([], grids=GRIDS, only=["size"])
    with pytest.raises(ConfigError, match="only has '': expected names among main, sizes"):
        jobs([], grids=GRIDS, only=[])


def test_a_sweep_without_grids_is_one_of_its_parameters():
    assert jobs(["seed=0,1"], params={"model": "topk,relu"}) == [
        f"model={model} seed={seed}" for model in ("topk", "relu") for seed in (0, 1)
    ]
    with pytest.raises(ConfigError, match="only=main: this sweep has no grids: leave it out"):
        jobs([], params={"model": "topk"}, only=["main"])


def test_the_page_is_written_from_the_finished_cells_of_the_sweep(tmp_path):
    """And nothing is trained for it: what is not finished is said."""
    where = f"paths.output_dir={tmp_path}"
    one = run_py("task=findings", where)
    assert "task=findings is about a sweep: add sweeps=findings" in one.stdout
    small = ("trainer.max_steps=2", "features.batch_size=2", "model.latents=32", "dataset.size=32")
    words = ["sweeps=findings", "hydra.sweeper.only=[main]", "logger=none", where, *small]
    words += ["model=topk,sparsemax", "++measurement.metrics=[sparsity,support]"]
    empty = run_py(*words, "seed=0", "task=findings")
    assert (
        "none of the sweep's 2 cells is finished: run the sweep first"
        in empty.stdout + empty.stderr
    )
    run_py(*words, "seed=0", check=True)
    told = run_py(*words, "seed=0,1", "task=findings", check=True)
    assert "2 of 4 cells are not finished" in told.stdout
    page = (tmp_path / "findings" / "findings.md").read_text()
    assert "It rests on 2 of 4 cells of the sweep: 2 evaluations of 2 SAEs with 1 seed" in page
    assert "Mean L0 lies between " in page
    assert "| L0 | " in page
    assert "python run.py sweeps=findings trainer.max_steps=2" in page
    assert str(tmp_path) not in page
    assert len(list((tmp_path / "sae").iterdir())) == 2
