"""What `forgetting=` refuses, through the command line's own function."""

import contextlib
import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ftdist import base, cli, compose, forgetting
from ftdist.errors import UserError

NONE = {"adapters": None, "seed": None, "start": None}  # of a run without adapters
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
        (("forgetting.adapters=plain",), ("forgetting.adapters=plain", "no adapters")),
        (("forgetting=ewk",), ("forgetting=ewk: no such choice",)),
    ],
)
def test_words_that_are_refused(refused, words, parts):
    refused((*ON, *words), *parts)


def test_adapters_on_transposed_modules_are_refused_by_the_plan():
    (config,) = compose.compose("plan", ["model.path=x", "data.path=y", *ON])
    for peft, model_type in ((None, "gpt2"), ({"r": 4}, "llama")):
        forgetting.refuse(config["forgetting"], "single", peft, model_type, look=False)
    with pytest.raises(
        UserError, match=r"forgetting\.adapters=drift: .*gpt2 has Conv1D.*use forgetting\.adapters=plain"
    ):
        forgetting.refuse(config["forgetting"], "single", {"r": 4}, "gpt2", look=False)


def test_an_adapter_that_is_no_matrix_of_a_linear_module_is_refused_by_the_plan(refused):
    words = ("strategy=lora", "strategy.targets=[embed_tokens,q_proj]")
    refused((*ON, *words), "forgetting.adapters=drift", "embed_tokens", "strategy.targets")


def test_a_fisher_of_another_model_or_a_broken_one(refused, model, tmp_path):
    other = changed(model, tmp_path / "other")
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


def test_an_earlier_fisher_is_of_this_model_or_of_one_that_it_comes_from(refused, model, tmp_path):
    """Two runs in a row from another model, the second exported elsewhere; nothing but hashes says so."""
    other, run, exported = changed(model, tmp_path / "other"), tmp_path / "run", tmp_path / "exported"
    (run / "fisher").mkdir(parents=True)
    fisher_of(run / "fisher", other)
    words = (*ON, f"forgetting.earlier={run}", f"run_dir={tmp_path / 'new'}")
    key = f"forgetting.earlier={run}: measured on {other}, from whose weights {model} does not come"
    refused((*words, f"forgetting.data={tmp_path}/demo.jsonl"), key, "forgetting.data", verb="train")
    (run / "base.json").write_text(json.dumps(base.fingerprint(str(other))))
    second = tmp_path / "second"
    second.mkdir()
    (second / "base.json").write_text(json.dumps(base.fingerprint(str(changed(other, run / "final")))))
    (second / "base.json").write_text((second / "base.json").read_text().replace(str(other), str(run / "final")))
    changed(run / "final", exported)
    (exported / "ftdist_export.json").write_text(json.dumps({"run": str(second)}))
    for directory in (other, run / "final", exported):
        identity = forgetting.identity(base.fingerprint(str(directory))["files"])
        forgetting.refuse_a_stranger(str(run), identity, str(directory), None, NONE)
    with pytest.raises(UserError, match=r"forgetting\.earlier=.*does not come"):
        identity = forgetting.identity(base.fingerprint(str(model))["files"])
        forgetting.refuse_a_stranger(str(run), identity, str(model), None, NONE)


LORA = {"r": 4, "lora_alpha": 16, "lora_dropout": 0.0, "use_rslora": False}


@pytest.mark.parametrize(
    ("peft", "seed", "said"),
    [(LORA, 1, None), (LORA | {"lora_dropout": 0.1}, 1, None), (LORA, 2, "seed=1, these have 2"),
     (LORA | {"lora_alpha": 8}, 1, "lora_alpha=16, these have 8"), (LORA | {"use_rslora": True}, 1, "use_rslora"),
     (None, 1, r"of adapters \(plain\)")],
)  # fmt: skip
def test_a_fisher_of_a_and_b_is_of_these_adapters(tmp_path, model, peft, seed, said):
    """Other adapters may have the same shapes."""
    keys, identity = {"adapters": "plain"}, forgetting.identity(base.fingerprint(str(model))["files"])
    fisher_of(tmp_path, model, {**forgetting.of_adapters(keys, LORA, 1, None), "start": None})
    own = forgetting.of_adapters(keys, peft, seed, None)
    for refuse, key in ((forgetting.refuse_another_model, "fisher"), (forgetting.refuse_a_stranger, "earlier")):
        with pytest.raises(UserError, match=f"forgetting.{key}=.*{said}") if said else contextlib.nullcontext():
            refuse(str(tmp_path), identity, str(model), None, own)
    # an adapter that goes on has left the seed of its start behind
    if peft == LORA:
        forgetting.refuse_a_stranger(
            str(tmp_path), identity, str(model), "x", forgetting.of_adapters(keys, peft, 7, "x")
        )


def changed(model, directory):
    """A copy with other weights of the same shapes."""
    shutil.copytree(model, directory, ignore=shutil.ignore_patterns("ftdist_export.json"))
    tensors = load_file(directory / "model.safetensors")
    save_file({name: values + np.float32(1) for name, values in tensors.items()}, directory / "model.safetensors")
    return directory


def fisher_of(folder, model, own=NONE):
    """A Fisher's files with nothing in them but a name of the model."""
    import torch

    from ftdist import fisher
    from ftdist.ranks import Ranks

    facts = {"model": forgetting.identity(base.fingerprint(str(model))["files"]), "model_path": str(model), **own}
    places = {"w": [fisher.Place(0, 0, 4, 0)]}
    fisher.write(folder, Ranks(), {"fisher": [torch.ones(4)]}, places, {"w": [4]}, True, facts)
    assert json.loads((folder / "manifest.json").read_text())["fisher"] == facts
    return folder / "rank-00000.safetensors"
