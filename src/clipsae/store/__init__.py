"""Finished work, found again by what produced it.

A stage (a trained SAE, an evaluation) lives in a folder named by readable words and a hash of
everything that determines its content:

    <root>/sae/sparsemax-clipsae-tiny-scenes-m2048-s0-1a2b3c4d5e/

The folder appears whole or not at all: it is made beside its place, flushed to disk, sealed by
`meta.json` with the SHA-256 of every file, and renamed. Of several processes, on one machine or
many, one makes it and the others wait (`lease.py`); what a dead one left is continued from its
checkpoint. What does not match its checksum when it is to be used is set aside as
`.<name>.damaged-<n>` and recomputed.

The key is what decides the content, and nothing else:

- in it: `SCHEMA`; for an SAE the CLIP (its weights file by its SHA-256), the images it is trained
  on (their list, by a fingerprint), all of `conf/model`, `conf/trainer` and `conf/features` but
  what `tasks/build.py` lists as `UNDECISIVE`, the seed; for an evaluation the
  SAE's name (and so its key), the dataset, the protocol's options and the number of images;
- not in it: where data and results lie, devices by name, worker processes, the evaluation's batch
  size, loggers, callbacks, launchers, names of experiments and sweeps;
- not in it either: the code and the versions of libraries. `meta.json` records them. A change of
  code that changes results must raise `SCHEMA`, and then no older work is found again; `task=gc`
  lists what is left of it. Of image files the names, labels and contents count;
  where there are more than 10,000 or 256 MB of them, the sizes and times of change of all
  (`ImageList.fingerprint`).
"""

from clipsae.store.files import MARK, find_damage, put_checkpoint, whole_checkpoint, write_json
from clipsae.store.lease import LeaseLost, StoreError
from clipsae.store.several import make_all
from clipsae.store.stage import SCHEMA, Busy, Damaged, Stage, Store, digest

__all__ = [
    "MARK",
    "SCHEMA",
    "Busy",
    "Damaged",
    "LeaseLost",
    "Stage",
    "Store",
    "StoreError",
    "digest",
    "find_damage",
    "make_all",
    "put_checkpoint",
    "whole_checkpoint",
    "write_json",
]
