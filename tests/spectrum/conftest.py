"""Tiny checkpoints with the layouts of real model families, written by transformers from random weights."""

import os

import pytest
from architectures import build


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """kind -> directory of a bfloat16 checkpoint, made once."""
    made = {}

    def get(kind):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            build(kind).bfloat16().save_pretrained(made[kind])
        return made[kind]

    return get


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """A cache of the test's own, one thread, and no launcher around."""
    path = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("FTDIST_CACHE", str(path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in list(os.environ):
        if name.startswith("SLURM_") or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            monkeypatch.delenv(name)
    return path
