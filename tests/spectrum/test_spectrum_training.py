"""Spectrum at work: exactly the selected weights train, alone, on a 4-bit base, or as the place of adapters."""

import json
import math

import pytest

STEPS = 4


@pytest.fixture(scope="module")
def train(forks, small, shared):
    """A short run from its words to `final/`; its directory."""

    def train(name, *words, processes=2):
        run_dir = forks.freeze(
            shared / name,
            *small,
            f"cluster.processes={processes}",
            "cluster.oversubscribe=true",
            "train.per_device_train_batch_size=2",
            "train.learning_rate=1e-2",
            f"train.max_steps={STEPS}",
            "eval.samples=0",
            *words,
        )
        statuses = forks.start(run_dir, processes)
        assert not any(statuses), [file.read_text()[-2000:] for file in (run_dir / "logs").glob("rank-*")]
        return run_dir

    return train


def tensors(file):
    from safetensors.torch import load_file

    return load_file(file)


def losses(run_dir):
    return [row["loss"] for row in map(json.loads, (run_dir / "metrics.jsonl").open()) if "loss" in row]


def changed(run_dir, model):
    import torch

    base, final = tensors(model / "model.safetensors"), tensors(run_dir / "final" / "model.safetensors")
    assert base.keys() == final.keys()
    assert all(tensor.numel() for tensor in final.values())
    return {name for name in base if base[name].dtype != final[name].dtype or not torch.equal(base[name], final[name])}


def selected(run_dir, model, percent, **keys):
    from ftdist.plan.shapes import model_shapes
    from ftdist.spectrum.select import load_scan, select

    keys = {"embeddings": True, "head": True, "norms": True} | keys
    return select(
        scan=load_scan(run_dir / "snr.json"),
        shapes=model_shapes(str(model), None).architecture.parameters,
        top_percent=percent,
        types="all",
        trainable_budget=None,
        **keys,
    ).names


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_whole_weights_train_on_a_4_bit_base(train, model, engine):
    from transformers import AutoModelForCausalLM

    made = train(
        f"spectrum4-{engine}",
        "strategy=spectrum",
        "strategy.top_percent=50",
        "strategy.base_bits=4",
        f"engine={engine}",
    )
    wanted = selected(made, model, 50)
    assert changed(made, model) == wanted  # what was quantised is whole again, bit for bit
    assert losses(made)[-1] < losses(made)[0]
    config = json.loads((made / "final" / "config.json").read_text())
    assert "quantization_config" not in config
    _, notes = AutoModelForCausalLM.from_pretrained(made / "final", output_loading_info=True)
    assert not any(notes.values()), notes


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_adapters_sit_on_the_selected_modules_alone(train, model, engine):
    made = train(
        f"qlora-spectrum-{engine}",
        *("strategy=qlora", "strategy.targets=spectrum", "strategy.top_percent=25", f"engine={engine}"),
    )
    wanted = {
        name.removesuffix(".weight") for name in selected(made, model, 25, embeddings=False, head=False, norms=False)
    }
    adapter = tensors(made / "final" / "adapter_model.safetensors")
    assert {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in adapter} == wanted
    assert losses(made)[-1] < losses(made)[0]


def test_a_published_scan_decides(train, model, shared):
    """The reference's flat layout, inf and NaN in it; the run makes no scan of its own."""
    from ftdist.plan.shapes import model_shapes
    from ftdist.spectrum.names import is_scanned, module_name, module_type

    shapes = model_shapes(str(model), None).architecture.parameters
    modules = [module_name(name) for name, shape in shapes.items() if is_scanned(name, shape)]
    values = dict.fromkeys(modules, 1.0)
    values |= {name: float(name.split(".")[2]) for name in modules if ".layers." in name}  # later layers are better
    values["model.layers.3.mlp.down_proj"] = math.inf
    values["model.layers.0.mlp.down_proj"] = math.nan
    flat = {name: {"snr": snr, "type": module_type(name, group_experts=False)} for name, snr in values.items()}
    file = shared / "published.json"
    file.write_text(json.dumps(flat))
    made = train(
        "published",
        "strategy=spectrum",
        f"strategy.scan={file}",
        "strategy.top_percent=25",
        "engine=single",
        processes=1,
    )
    names = changed(made, model)
    assert {name for name in names if ".layers." in name} == {
        name for name in shapes if name.startswith("model.layers.3.")
    }
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= names


def test_a_list_of_names_decides(train, model, shared):
    """An `unfrozen_parameters` file of the reference tool: a pattern and a bare module name."""
    file = shared / "unfrozen.yaml"
    file.write_text("unfrozen_parameters:\n- ^lm_head.weight$\n# mlp.up_proj layers\n- model.layers.1.mlp.up_proj\n")
    made = train("listed", "strategy=spectrum", f"strategy.parameters={file}", "engine=single", processes=1)
    assert changed(made, model) == {"lm_head.weight", "model.layers.1.mlp.up_proj.weight"}


def test_a_name_that_matches_nothing_is_refused(run, small, shared):
    target = shared / "never"
    word = "strategy.parameters=[model.layers.1.mlp.up_prj]"
    run("train", *small, "strategy=spectrum", word, f"run_dir={target}").refused("up_prj", "mlp.up_proj")
    assert not target.exists()


def test_without_a_scan_nothing_is_trained(run, small, model, shared):
    """Weights that cannot be measured stop the run; it never trains everything instead."""
    import shutil

    import torch
    from safetensors.torch import save_file

    broken = shared / "nan-model"
    shutil.copytree(model, broken)
    weights = tensors(model / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    target = shared / "never-nan"
    words = ("strategy=spectrum", "strategy.top_percent=50", f"model.path={broken}", f"run_dir={target}")
    answer = run("train", *small, *words)
    assert answer.status == 2
    assert answer.stderr.splitlines()[-1].startswith("ftdist: ")  # after the scan's progress
    assert "model.layers.2.mlp.up_proj" in answer.stderr
    assert not target.exists()


def test_frozen_weights_have_no_gradient_and_no_optimizer_state(model, tmp_path):
    """Adam holds two numbers for each trained weight and none for the others."""
    import datasets
    from trl import SFTConfig

    from ftdist import lease, models, stops
    from ftdist.health import Health
    from ftdist.keeper import Keeper
    from ftdist.ranks import Ranks
    from ftdist.strategies import Recipe
    from ftdist.trainer import TokenTrainer, collate

    token = lease.take(tmp_path).token
    quiet = Keeper(
        tmp_path, Ranks(), token, {}, 0, stops.Limit(None), lambda step: None,
        every_steps=None, every_minutes=None, keep_last=1, keep_best=0, keep_every=None,
        background=False, max_failed_saves=0,
    )  # fmt: skip
    warns = Health(
        tmp_path, token, True, nonfinite="warn", spike="warn", spike_factor=10.0, no_tokens="warn", first_loss="warn"
    )
    wanted = frozenset({"model.layers.1.mlp.up_proj.weight", "lm_head.weight"})
    loaded = models.load(
        path=str(model),
        revision=None,
        dtype="float32",
        attn_implementation="sdpa",
        trust_remote_code=False,
        quantization=None,
        loaded_dtype="float32",
    )
    loaded = models.apply(loaded, Recipe(trainable=wanted), trained_dtype="float32")
    rows = [{"input_ids": [5, 6, 7, 8, 9, 10], "labels": [-100, 6, 7, 8, 9, 10], "lengths": [6]}] * 4
    trainer = TokenTrainer(
        model=loaded,
        args=SFTConfig(
            output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, bf16=False, use_cpu=True,
            report_to="none", save_strategy="no", remove_unused_columns=False, gradient_checkpointing=False,
        ),
        packing=True,
        loss_type="nll",
        trainable=models.trainable_elements(loaded),
        keeper=quiet,
        health=warns,
        train_dataset=datasets.Dataset.from_list(rows),
        data_collator=lambda batch: collate(batch, 0),
    )  # fmt: skip
    kept = []
    backward = trainer.accelerator.backward
    trainer.accelerator.backward = lambda *a, **k: (
        backward(*a, **k),
        kept.append({name for name, p in loaded.named_parameters() if p.grad is not None}),
    )
    trainer.train()
    assert kept and all(names == wanted for names in kept)
    moments = [
        tensor.numel() for state in trainer.optimizer.state.values() for tensor in state.values() if tensor.numel() > 1
    ]
    trained = models.trainable_elements(loaded)
    assert sum(moments) == 2 * trained < 2 * sum(p.numel() for p in loaded.parameters())
