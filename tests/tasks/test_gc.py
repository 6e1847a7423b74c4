"""`task=gc` lists what nothing needs, and removes it when told to, but nothing that lives."""

import os

import pytest
from made_up import ELSEWHERE, LONG_AGO, MadeUp

from clipsae.store import MARK, SCHEMA
from clipsae.store.lease import LEASE, begin
from clipsae.store.survey import survey
from clipsae.tasks.gc import remove, waste
from tests.warm import run_py

GOING = {"b", "c", "d", "e", "jumprelu", "batch_topk"}


@pytest.fixture
def made_up(tmp_path):
    made_up = MadeUp(tmp_path / "store")
    yield made_up
    made_up.living.discard()


def name(entry):
    return entry.about.get("model" if entry.kind == "sae" else "dataset")


def listed(made_up, unused=False):
    """Why what may go, by its name."""
    found = waste(survey(made_up.store.root), unused=unused)
    return {name(entry): why for entry, why in found}


def test_what_may_go(made_up, monkeypatch):
    found = listed(made_up)
    assert set(found) == GOING
    assert found["jumprelu"] == "unfinished, a checkpoint at step 30, nobody works on it"
    assert found["d"] == "its SAE gone-0123456789 is gone"
    assert found["e"] == "damaged: results.csv has 0 of 1 bytes"
    monkeypatch.setattr("clipsae.tasks.gc.SCHEMA", SCHEMA + 1)
    assert listed(made_up)["topk"] == f"superseded: of schema {SCHEMA}, now {SCHEMA + 1}"


def test_unused_saes_on_request(made_up):
    assert "topk" not in listed(made_up, unused=True)
    lone = made_up.sae("lone")
    lone.make(lambda folder: None)
    assert "lone" not in listed(made_up)
    assert listed(made_up, unused=True)["lone"] == "an SAE that nothing refers to"
    # One whose evaluation is being made is used.
    made_up.left(made_up.evaluation("f", sae=lone.path.name), ELSEWHERE)
    assert "lone" not in listed(made_up, unused=True)


def test_shards_of_a_cache_that_nobody_works_on(made_up):
    store = made_up.store
    shards = [
        store.stage("shards", ["scenes", str(i)], {"of": cache, "shard_images": 9, "shard": i})
        for cache in ("written", "left")
        for i in (0, 1)
    ]
    for shard in shards[0], shards[2], shards[3]:
        shard.make(lambda folder: (folder / "tokens").write_bytes(bytes(1000)))
    writing = begin(shards[1].partial, 1000)
    made_up.tell(shards[1])

    def found():
        going = {entry.path for entry, _ in waste(survey(store.root), unused=False)}
        return going & {shard.path for shard in shards}

    assert found() == set()  # the next ones may just be begun
    for shard in shards:
        if shard.finished:
            os.utime(shard.path / MARK, (LONG_AGO, LONG_AGO))
    assert found() == {shards[2].path, shards[3].path}
    writing.discard()
    assert found() == {shards[0].path, shards[2].path, shards[3].path}


def test_what_is_removed_is_gone_whole_and_the_rest_stays(made_up):
    root = made_up.store.root
    removed = remove([entry for entry, _ in waste(survey(root), unused=False)], dead_after=0.2)
    assert {name(entry) for entry in removed} == GOING
    assert {name(entry) for entry in survey(root)} == {"topk", "a", "relu", "gated"}
    hidden = [p.name for kind in root.iterdir() for p in kind.iterdir() if p.name.startswith(".")]
    assert len(hidden) == 2  # what is being made
    made_up.living.progress(301, 600)
    assert made_up.living.folder.exists()


def test_what_comes_to_life_in_between_stays(made_up, monkeypatch):
    root = made_up.store.root
    batch_topk = next(e for e in survey(root) if e.about["model"] == "batch_topk")
    with monkeypatch.context() as patch:
        patch.setattr("time.sleep", lambda _: os.utime(batch_topk.path / LEASE))
        assert remove([batch_topk], dead_after=60) == []
    assert batch_topk.path.exists()
    # Taken over: its path is another's by now.
    batch_topk.path.rename(batch_topk.path.with_name("free"))
    assert remove([batch_topk], dead_after=0.01) == []
    assert batch_topk.path.with_name("free").exists()


def test_rubble_of_killed_processes(made_up):
    root = made_up.store.root
    stage = made_up.sae("rubble")
    begun = begin(stage.partial, 1000)
    begun.stop()
    dead = begun.folder.with_name(begun.folder.name.replace(f"-{os.getpid()}-", "-1-"))
    begun.folder.rename(dead)
    # Killed before its rename.
    stage.partial.rename(stage.partial.with_name(f"{stage.partial.name}.{dead.name}"))
    (root / "sae" / ".emptied-0123456789.partial").mkdir()
    (root / "sae" / ".x-0123456789.gone-12345678").mkdir()
    rubble = [e for e in survey(root) if e.state == "left over"]
    assert len(rubble) == 3
    assert len(remove(rubble)) == 3
    assert not [e for e in survey(root) if e.state == "left over"]


@pytest.mark.slow
def test_a_dry_run_by_default(made_up):
    root = made_up.store.root
    before = [entry.path for entry in survey(root)]
    done = run_py("task=gc", f"paths.output_dir={root}")
    assert done.returncode == 0, done.stderr
    assert "checkpoint at step 30" in done.stdout
    assert "2.0 MB" in done.stdout
    assert "task.delete=true" in done.stdout
    assert [entry.path for entry in survey(root)] == before
