"""A stage is there whole or not at all, and named by what produced it."""

import contextlib
import errno
import json
import logging
import os
import subprocess
from dataclasses import asdict

import pytest

from clipsae.store import (
    MARK,
    Damaged,
    Store,
    StoreError,
    digest,
    find_damage,
    put_checkpoint,
    whole_checkpoint,
)
from clipsae.store.lease import FREE, LEASE, Owner, Watch, new_token


@pytest.fixture
def stage(tmp_path):
    return Store(tmp_path).stage("sae", ["x"], {"a": 1}, about={"model": "topk"})


def test_the_name_depends_on_the_content_of_the_key_alone(tmp_path):
    assert digest({"a": 1, "b": {"c": 2, "d": 3}}) == digest({"b": {"d": 3, "c": 2}, "a": 1})
    assert len({digest({"a": value}) for value in (1, 2, 1.5)}) == 3
    with pytest.raises(TypeError):
        Store(tmp_path).stage("sae", ["x"], {"a": object()})


def test_made_once_and_then_used(tmp_path):
    stage = Store(tmp_path).stage("sae", ["TopK", "ViT-B/16", "timm:x y"], {"k": 32})
    calls = []

    def build(folder):
        calls.append(folder)
        (folder / "result.txt").write_text("done")

    assert not stage.finished
    path = stage.make(build)
    assert stage.make(build) == path
    assert len(calls) == 1
    assert (path / "result.txt").read_text() == "done"
    assert path.name.startswith("topk-vit-b_16-timm_x_y-")
    meta = json.loads((path / MARK).read_text())
    assert meta["key"] == {"k": 32}
    assert meta["versions"]["torch"]
    assert not stage.staging.exists()
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_an_interrupted_stage_is_not_there_and_finds_its_scratch_again(tmp_path, stage):
    def interrupted(folder):
        (stage.scratch / "step").write_text("7")
        (folder / "half").write_text("ha")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stage.make(interrupted)
    assert not stage.finished
    assert not stage.path.exists()
    assert Store(tmp_path).finished("sae") == []

    seen = []
    stage.make(lambda folder: seen.append((stage.scratch / "step").read_text()))
    assert seen == ["7"]
    assert Store(tmp_path).finished("sae") == [stage.path]
    assert not (stage.path / "scratch").exists()


def test_a_folder_without_its_mark_is_never_read(tmp_path, stage):
    stage.path.mkdir(parents=True)
    (stage.path / "result.txt").write_text("half")
    assert not stage.finished
    assert Store(tmp_path).finished("sae") == []
    stage.make(whole)
    assert stage.finished
    aside = stage.path.with_name(f".{stage.path.name}.damaged-1")
    assert (aside / "result.txt").read_text() == "half"


def whole(folder):
    (folder / "plots").mkdir()
    (folder / "plots" / "a.bin").write_bytes(bytes(range(200)))
    (folder / "result.txt").write_text("ten bytes.")


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(file):
    os.truncate(file, file.stat().st_size - 3)


@pytest.mark.parametrize("harm", [flip, truncate, os.unlink])
@pytest.mark.parametrize("name", ["result.txt", "plots/a.bin", MARK])
def test_what_is_damaged_is_named_set_aside_and_recomputed(tmp_path, stage, caplog, harm, name):
    for n in (1, 2):
        stage.make(whole)
        stage.verify()
        harm(stage.path / name)
        with pytest.raises(Damaged, match=name.rpartition("/")[2]):
            stage.verify()
        assert stage.finished == (harm is flip and name != MARK)  # sizes alone, and the mark
        caplog.clear()
        assert stage.make(whole) == stage.path
        stage.verify()
        (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
        aside = stage.path.with_name(f".{stage.path.name}.damaged-{n}")
        assert name in warning
        assert aside.name in warning
        assert find_damage(aside)
    assert Store(tmp_path).finished("sae") == [stage.path]


def test_any_flipped_byte_is_found(stage):
    stage.make(whole)
    for name in ("result.txt", MARK):
        file = stage.path / name
        content = file.read_bytes()
        for at in range(0, len(content), 3):
            changed = bytearray(content)
            changed[at] ^= 1
            file.write_bytes(changed)
            # (white space between the values of a JSON file is no content)
            assert find_damage(stage.path) or json.loads(content) == json.loads(changed), at
        file.write_bytes(content)
    assert find_damage(stage.path) is None
    flip(stage.path / "result.txt")
    stage.make(whole, check="size")  # what is too large for checksums
    with pytest.raises(Damaged):
        stage.verify()


def test_a_damaged_checkpoint_is_set_aside(tmp_path, caplog):
    path = tmp_path / "last.ckpt"
    assert whole_checkpoint(path) is None
    for step in (1, 2, 3):
        (tmp_path / "last.tmp").write_bytes(bytes([step] * 100))
        put_checkpoint(tmp_path / "last.tmp", path, step)
        assert whole_checkpoint(path) == path
    for n, harm in enumerate((flip, truncate), start=1):
        content = path.read_bytes()
        harm(path)
        assert whole_checkpoint(path) is None
        assert "last.ckpt does not match its checksum" in caplog.text
        assert (tmp_path / f".last.ckpt.damaged-{n}").exists()
        path.write_bytes(content)
        assert whole_checkpoint(path) == path


def test_a_checkpoint_is_whole_at_every_moment_of_its_replacement(tmp_path, monkeypatch):
    path, aside = tmp_path / "last.ckpt", tmp_path / "last.tmp"
    replace = type(path).replace

    def killed_at_the_checkpoint(source, target):
        return 1 / 0 if source == aside else replace(source, target)

    for step in range(1, 4):
        aside.write_text(f"step {step}")
        with monkeypatch.context() as patch:
            patch.setattr("clipsae.store.files.sha256", lambda _: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                put_checkpoint(aside, path, step)
        assert step == 1 or whole_checkpoint(path) == path
        with monkeypatch.context() as patch:
            patch.setattr(type(path), "replace", killed_at_the_checkpoint)
            with pytest.raises(ZeroDivisionError):
                put_checkpoint(aside, path, step)
        assert step == 1 or whole_checkpoint(path) == path
        put_checkpoint(aside, path, step)
        assert whole_checkpoint(path) == path


def test_a_failure_leaves_its_reason_until_the_next_start(stage):
    def fails(folder):
        (folder / "half").write_text("ha")
        raise RuntimeError("a long story\nthe point of it")

    with pytest.raises(RuntimeError, match="a long story"):
        stage.make(fails)
    failed = json.loads((stage.lease_folder / "failed.json").read_text())
    assert (failed["type"], failed["message"]) == ("RuntimeError", "the point of it")
    assert set(failed) == {"type", "message", "time", "host"}
    assert json.loads((stage.lease_folder / "about.json").read_text())["about"] == {"model": "topk"}

    def looks(folder):
        assert not list(folder.iterdir())  # nothing of the half
        assert not (stage.lease_folder / "failed.json").exists()

    stage.make(looks)
    assert json.loads((stage.path / MARK).read_text())["about"] == {"model": "topk"}
    assert not stage.partial.exists()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        Exception("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_said_in_one_sentence(stage, error):
    def full(folder):
        (stage.scratch / "step").write_text("7")
        try:
            raise error
        except Exception as reason:
            raise RuntimeError("writing failed") from reason

    with pytest.raises(StoreError, match=r"no space left on the disk.*run the same command again"):
        stage.make(full)
    stage.make(lambda folder: (stage.scratch / "step").read_text())


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a file system cannot be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_is_really_full(small_disk):
    folder, store = small_disk, Store(small_disk)
    other = store.stage("sae", ["other"], {"a": 0})
    other.make(whole)
    stage = store.stage("sae", ["x"], {"a": 1})
    ballast = folder / "ballast"
    ballast.write_bytes(bytes(600_000))
    begun = []

    def build(into):
        begun.append(whole_checkpoint(stage.scratch / "last.ckpt"))
        (stage.scratch / "last.tmp").write_bytes(b"7" * 1000)
        put_checkpoint(stage.scratch / "last.tmp", stage.scratch / "last.ckpt", 7)
        (into / "large").write_bytes(bytes(500_000))

    with pytest.raises(StoreError, match="no space left on the disk"):
        stage.make(build)
    assert (
        "no space left" in json.loads((stage.lease_folder / "failed.json").read_text())["message"]
    )
    assert not stage.finished
    other.verify()
    # Full to the last byte: not even a lease can be written.
    with contextlib.suppress(OSError), (folder / "more").open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    third = store.stage("sae", ["third"], {"a": 2})
    with pytest.raises(StoreError, match="no space left on the disk"):
        third.make(whole)
    with pytest.raises(StoreError, match="no space left on the disk"):
        stage.make(build)
    ballast.unlink()
    (folder / "more").unlink()
    stage.make(build)
    third.make(whole)
    assert begun[0] is None
    assert begun[-1] is not None  # it went on from its checkpoint
    for each in (stage, third, other):
        each.verify()


def test_a_store_that_cannot_be_written_to(small_disk):
    store = Store(small_disk)
    there, missing = (store.stage("sae", ["x"], {"a": n}) for n in (1, 2))
    there.make(whole)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert there.make(whole) == there.path
    for one in (missing, store.stage("evaluation", ["x"], {"a": 1})):
        with pytest.raises(StoreError, match=r"cannot be written to.*paths\.output_dir"):
            one.make(whole)


def test_death_is_judged_by_what_is_seen_on_ones_own_clock(tmp_path):
    folder = tmp_path / "0a1b2c3d-77-88-0123456789abcdef"  # of another machine
    folder.mkdir()
    now = [0.0]
    watch = Watch(60, clock=lambda: now[0])
    assert watch.alive(folder) is None
    for beat in range(3):
        now[0] += 50
        (folder / LEASE).write_text(f"{beat}")
        assert watch.alive(folder) is True
    now[0] += 59
    assert watch.alive(folder) is True
    # A time stamp is a sign of life, even one of long ago: it changed.
    os.utime(folder / LEASE, (1, 1))
    assert watch.alive(folder) is True
    now[0] += 61
    assert watch.alive(folder) is False


def test_what_needs_no_waiting_to_be_known_dead(tmp_path, monkeypatch):
    free = tmp_path / FREE
    mine = tmp_path / new_token()
    process = subprocess.Popen(["true"])
    process.wait()
    machine, _, born, end = mine.name.split("-")
    ended = tmp_path / f"{machine}-{process.pid}-{born}-{end}"
    reused = tmp_path / f"{machine}-{os.getpid()}-1-{end}"  # the number of an earlier process
    job = tmp_path / f"00000000-77-88-{end}"
    for folder in (free, mine, ended, reused, job):
        folder.mkdir()
    owner = Owner(job.name, "host", 77, "12", "2026-01-02", job_id="12")
    (job / LEASE).write_text(json.dumps(asdict(owner)))
    assert [Watch(60).alive(s) for s in (free, ended, reused)] == [False] * 3
    assert Watch(60).alive(mine) is True
    assert Watch(60).alive(job) is None
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    assert Watch(60).alive(job) is None
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # this same job, requeued
    assert Watch(60).alive(job) is False


def test_other_files_in_the_place_of_an_unfinished_stage(stage):
    (stage.partial / "notes").mkdir(parents=True)
    with pytest.raises(StoreError, match=r"not a folder of an unfinished stage \(notes\)"):
        stage.make(whole)
