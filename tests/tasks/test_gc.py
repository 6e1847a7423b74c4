"""`task=gc` lists what nothing needs, and removes it when told to, but nothing that lives."""

import os

import pytest
from made_up import ELSEWHERE, LONG_AGO, MadeUp

from clipsae.store import MARK, SCHEMA
from clipsae.store.lease import LEASE, begin
from clipsae.store.survey import survey
from clipsae.tasks.gc import remove, waste
from tests.warm import run_py


@pytest.fixture
def made_up(tmp_path):
    made_up = MadeUp(tmp_path / "store")
    yield made_up
    made_up.living.discard()


def names(found):
    return {e.about.get("model") if e.kind == "sae" else e.about.get("dataset") for e in found}


def listed(made_up, unused=False):
    return {
        next(iter(names([one.entry]))): one
        for one in waste(survey(made_up.store.root), unused=unused)
    }


def test_what_may_go(made_up):
    found = listed(made_up)
    assert set(found) == {"b", "c", "d", "e", "jumprelu", "batch_topk"}
    assert found["jumprelu"].reason == "unfinished, a checkpoint at step 30, nobody works on it"
    assert found["jumprelu"].bytes > 2_000_000
    assert found["d"].reason == "its SAE gone-0123456789 is gone"
    assert found["e"].reason == "damaged: results.csv has 0 of 1 bytes"


def test_unused_saes_on_request(made_up):
    assert "topk" not in listed(made_up, unused=True)
    lone = made_up.sae("lone")
    lone.make(lambda folder: None)
    assert "lone" not in listed(made_up)
    assert listed(made_up, unused=True)["lone"].reason == "an SAE that nothing refers to"
    # One whose evaluation is being made is used.
    evaluation = made_up.evaluation("f", sae=lone.path.name)
    made_up.left(evaluation, ELSEWHERE)
    assert "lone" not in listed(made_up, unused=True)


def test_shards_of_a_cache_that_nobody_works_on(made_up):
    store = made_up.store
    shards = [
        store.stage("shards", ["scenes", str(i)], {"of": of, "shard_images": 9, "shard": i})
        for of in ("written", "left")
        for i in (0, 1)
    ]
    for shard in shards[0], shards[2], shards[3]:
        shard.make(lambda folder: (folder / "tokens").write_bytes(bytes(1000)))
    writing = begin(shards[1].partial, 1000)
    made_up.tell(shards[1])

    def found():
        return {e.entry.path for e in waste(survey(store.root), unused=False)} & {
            shard.path for shard in shards
        }

    assert found() == set()  # the next ones may just be begun
    for shard in shards:
        if shard.finished:
            os.utime(shard.path / MARK, (LONG_AGO, LONG_AGO))
    assert found() == {shards[2].path, shards[3].path}
    writing.discard()
    assert found() == {shards[0].path, shards[2].path, shards[3].path}


def test_of_an_older_schema(made_up, monkeypatch):
    monkeypatch.setattr("clipsae.tasks.gc.SCHEMA", SCHEMA + 1)
    said = f"superseded: of schema {SCHEMA}, now {SCHEMA + 1}"
    assert listed(made_up)["topk"].reason == said


def test_what_is_removed_is_gone_whole_and_the_rest_stays(made_up):
    root = made_up.store.root
    going = [one.entry for one in listed(made_up).values()]
    removed = remove(going, root, dead_after=0.2)
    assert names(removed) == {"b", "c", "d", "e", "jumprelu", "batch_topk"}
    assert names(survey(root)) == {"topk", "a", "relu", "gated"}
    hidden = [p.name for kind in root.iterdir() for p in kind.iterdir() if p.name.startswith(".")]
    assert len(hidden) == 2  # what is being made
    made_up.living.progress(301, 600)
    assert made_up.living.folder.exists()


def test_what_comes_to_life_in_between_stays(made_up, monkeypatch):
    root = made_up.store.root
    batch_topk = next(e for e in survey(root) if e.about["model"] == "batch_topk")
    with monkeypatch.context() as patch:
        patch.setattr("time.sleep", lambda _: os.utime(batch_topk.path / LEASE))
        assert remove([batch_topk], root, dead_after=60) == []
    assert batch_topk.path.exists()
    # Taken over: its path is another's by now.
    batch_topk.path.rename(batch_topk.path.with_name("free"))
    assert remove([batch_topk], root, dead_after=0.01) == []
    assert batch_topk.path.with_name("free").exists()


def test_rubble_of_killed_processes(made_up):
    root = made_up.store.root
    stage = made_up.sae("rubble")
    begun = begin(stage.partial, 1000)
    begun.stop()
    dead = begun.folder.with_name(begun.folder.name.replace(f"-{os.getpid()}-", "-1-"))
    begun.folder.rename(dead)
    stage.partial.rename(
        stage.partial.with_name(f"{stage.partial.name}.{dead.name}")
    )  # before its rename
    (root / "sae" / ".emptied-0123456789.partial").mkdir()
    (root / "sae" / ".x-0123456789.gone-12345678").mkdir()
    rubble = [e for e in survey(root) if e.state == "left over"]
    assert len(rubble) == 3
    assert len(remove(rubble, root)) == 3
    assert not [e for e in survey(root) if e.state == "left over"]


@pytest.mark.slow
def test_a_dry_run_by_default(made_up):
    root = made_up.store.root
    before = names(survey(root))
    done = run_py("task=gc", f"paths.output_dir={root}")
    assert done.returncode == 0, done.stderr
    assert "checkpoint at step 30" in done.stdout
    assert "task.delete=true" in done.stdout
    assert names(survey(root)) == before
