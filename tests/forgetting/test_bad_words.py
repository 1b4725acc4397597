"""What `forgetting=` refuses, through the command line's own function."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ftdist import cli

ON = ("forgetting=ewc", "forgetting.data=demo.jsonl", "engine=single")


@pytest.fixture
def refused(small, tmp_path, monkeypatch, capfd, environment):
    """`refused(words, *parts)`: one line that names the parts, exit status 2."""
    monkeypatch.setenv("FTDIST_CACHE", environment["FTDIST_CACHE"])
    monkeypatch.setattr(cli, "private_and_stoppable", lambda: None)  # it is this process that calls

    def refused(words, *parts, verb="plan"):
        capfd.readouterr()
        status = cli.main([verb, *small, *words])
        said = capfd.readouterr().err
        assert status == 2 and said.startswith("ftdist: ") and said.count("\n") == 1, said
        for part in parts:
            assert part in said, said

    return refused


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("forgetting.strength=-1",), ("forgetting.strength=-1", "greater than or equal to 0")),
        (("forgetting.strength=nan",), ("forgetting.strength",)),
        (("forgetting.data=null",), ("forgetting.data: missing", "forgetting.fisher=RUN")),
        (("forgetting.fisher=x",), ("set one",)),
        (("forgetting.decay=1.5",), ("forgetting.decay=1.5",)),
        (("forgetting.batch=8", "forgetting.samples=10"), ("forgetting.batch=8", "at most 5")),
        (("forgetting.adapters=both",), ("forgetting.adapters=both", "'drift'", "'plain'")),
        (("forgetting.lambda=3",), ("forgetting.lambda: no such key",)),
        (("strategy=lora", "strategy.use_dora=true"), ("forgetting.adapters=drift", "DoRA")),
        (("engine=zero3_nvme", "engine.nvme_path=/tmp"), ("zero3_nvme", "zero3_offload")),
        (("forgetting.earlier=/nowhere",), ("forgetting.earlier=/nowhere: holds no Fisher",)),
        (("task=dpo",), ("forgetting=ewc: not with task=dpo", "forgetting=none")),
        (("forgetting=ewk",), ("forgetting=ewk: no such choice",)),
    ],
)
def test_words_that_are_refused(refused, words, parts):
    refused((*ON, *words), *parts)


def test_a_fisher_of_another_model_or_a_broken_one(refused, model, tmp_path):
    other = shutil.copytree(model, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    save_file({name: values + np.float32(1) for name, values in tensors.items()}, other / "model.safetensors")
    folder = tmp_path / "run" / "fisher"
    folder.mkdir(parents=True)
    made = fisher_of(folder, other)
    words = ("forgetting=ewc", f"forgetting.fisher={folder.parent}", "engine=single", f"run_dir={tmp_path / 'new'}")
    refused(words, f"forgetting.fisher={folder.parent}", "measured on another model", verb="train")
    assert not (tmp_path / "new").exists()
    made.write_bytes(made.read_bytes()[:-1])
    refused(words, "is broken", "bytes")
    (folder / "manifest.json").write_text("{}")
    refused(words, "is broken")


def fisher_of(folder, model):
    """A Fisher's files with nothing in them but a name of the model."""
    import torch

    from ftdist import base, fisher, forgetting
    from ftdist.ranks import Ranks

    facts = {"model": forgetting.identity(base.fingerprint(str(model))["files"]), "model_path": str(model)}
    places = {"w": [fisher.Place(0, 0, 4, 0)]}
    fisher.write(folder, Ranks(), {"fisher": [torch.ones(4)]}, places, {"w": [4]}, True, facts)
    assert json.loads((folder / "manifest.json").read_text())["fisher"] == facts
    return folder / "rank-00000.safetensors"
