"""A store with a stage in every state."""

import contextlib
import json
import os
from pathlib import Path

from clipsae.store import Stage, Store, put_checkpoint
from clipsae.store.lease import LEASE, begin, machine

LONG_AGO = 1_000_000_000
DEAD_HERE = f"{machine()}-{os.getpid()}-1-0123456789abcdef"  # this number, born at another time
ELSEWHERE = "00000000-77-88-0123456789abcdef"


class MadeUp:
    """SAEs: topk trained, relu being trained here, gated elsewhere, jumprelu killed at step 30,
    batch_topk killed elsewhere. Evaluations of topk: done on a, failed on b, killed before its
    first step on c, done on d by an SAE that is gone, damaged on e."""

    def __init__(self, root: Path) -> None:
        self.store = Store(root)
        self.topk = self.sae("topk", k=16)
        self.topk.make(lambda folder: (folder / "sae.bin").write_bytes(bytes(3_000_000)))
        self.evaluation("a").make(lambda folder: (folder / "results.csv").write_text("1"))
        with contextlib.suppress(ZeroDivisionError):
            self.evaluation("b").make(lambda folder: 1 / 0)
        self.left(self.evaluation("c"), DEAD_HERE)
        self.evaluation("d", sae="gone-0123456789").make(lambda folder: None)
        damaged = self.evaluation("e")
        damaged.make(lambda folder: (folder / "results.csv").write_text("1"))
        (damaged.path / "results.csv").write_text("")
        relu = self.sae("relu")
        self.living = begin(relu.partial, 1000)
        self.tell(relu)
        self.living.progress(300, 600)
        self.living._write()
        self.left(self.sae("gated"), ELSEWHERE)
        jumprelu = self.left(self.sae("jumprelu"), DEAD_HERE, done=31, total=600)
        (jumprelu / "scratch" / "last.tmp").write_bytes(bytes(2_000_000))
        put_checkpoint(
            jumprelu / "scratch" / "last.tmp", jumprelu / "scratch" / "last.ckpt", step=30
        )
        batch_topk = self.left(self.sae("batch_topk", k=16), ELSEWHERE)
        os.utime(batch_topk / LEASE, (LONG_AGO, LONG_AGO))

    SAES = (("topk", 16), ("relu", None), ("jumprelu", None))

    @classmethod
    def stages(cls, root: Path) -> "MadeUp":
        """Only the names of the stages; writes nothing."""
        one = cls.__new__(cls)
        one.store = Store(root)
        one.topk = one.sae("topk", k=16)
        return one

    def sae(self, model: str, k: int | None = None) -> Stage:
        about = {"model": model, "dataset": "scenes", "k": k, "seed": 0}
        return self.store.stage("sae", [model], {"model": model}, about)

    def evaluation(self, dataset: str, sae: str | None = None) -> Stage:
        about = {"model": "topk", "dataset": dataset, "k": 16, "seed": 0}
        key = {"sae": sae or self.topk.path.name, "dataset": dataset}
        return self.store.stage("evaluation", ["topk", dataset], key, about)

    def tell(self, stage: Stage) -> None:
        told = {"key": stage.key, "about": stage.about}
        (stage.lease_folder / "about.json").write_text(json.dumps(told))

    def left(self, stage: Stage, token: str, done=None, total=None) -> Path:
        """Write what a process leaves that was killed or runs elsewhere."""
        folder = stage.partial / token
        (folder / "scratch").mkdir(parents=True)
        (folder / "staging").mkdir()
        self.tell(stage)
        lease = {"token": token, "host": "node3", "pid": 77, "job": "12_3", "since": "2026-01-02"}
        (folder / LEASE).write_text(json.dumps({**lease, "done": done, "total": total}))
        return folder
