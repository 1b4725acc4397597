"""Exported directories: what was trained, as plain transformers loads it. Merges of many architectures, untrained."""

import json
import shutil
import struct

import pytest
import torch
import yaml


def exported(verb, cell, tmp_path, *words):
    out = tmp_path / "out"
    finished = verb("export", cell.run_dir, f"export.output={out}", *words)
    assert finished.status == 0, finished
    assert finished.stdout.splitlines()[-1] == f"model: {out}"
    return out, json.loads((out / "ftdist_export.json").read_text()), finished


@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3"])
@pytest.mark.parametrize("strategy", ["full", "lora", "qlora", "spectrum"])
def test_every_strategy_and_engine_exports_what_was_trained(cell, tmp_path, monkeypatch, shared, strategy, engine):
    """The verb's function, in this process: starting the console script is tested below."""
    from ftdist.export import RECORD, export

    monkeypatch.setenv("FTDIST_CACHE", str(shared / "cache"))
    run_dir = cell(strategy, engine).run_dir
    if strategy in ("full", "spectrum"):  # which need neither their base any more nor the place where they were trained
        run_dir = shutil.copytree(run_dir, tmp_path / "moved")
        config = yaml.safe_load((run_dir / "config.yaml").read_text())
        config["model"]["path"] = "/models/that/was"
        if strategy == "spectrum":
            config["strategy"]["scan"] = "/runs/that/was/snr.json"
        (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    settings = yaml.safe_load((run_dir / "config.yaml").read_text())["export"]
    out = export(run_dir, **settings | {"output": str(tmp_path / "out")})
    record = json.loads((out / RECORD).read_text())
    parity = record["parity"]
    assert parity["engine_to_saved"]["max_difference"] < 1e-3  # the training engine's own logits
    assert parity["trained_to_exported"]["max_difference"] < 1e-3
    assert parity["trained_to_exported"]["kl_mean"] < 1e-8
    if strategy in ("lora", "qlora"):
        assert record["kind"] == "merged"
        assert parity["base_to_trained_kl"] > 1e-3  # what a merge that forgets the adapter would be off by
        assert not (out / "adapter_config.json").exists()
        assert "quantization_config" not in json.loads((out / "config.json").read_text())
    if strategy == "qlora":
        assert parity["quantised_to_exported"]["kl_mean"] > 0
    assert parity["answer"]["tokens"] > 0
    card = (out / "README.md").read_text()
    for part in ("base_model_relation:", "## Base", "license: other", "## Data", "## Recipe", "## Metrics", strategy):
        assert part in card


def test_dtype_shards_and_adapter_alone(run, verb, cell, tmp_path):
    made = cell("lora", "ddp")
    out, record, _ = exported(run, made, tmp_path, "export.dtype=bfloat16", "export.max_shard_size=0.0002")
    assert record["dtypes"] == ["BF16"]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert all((out / name).stat().st_size < 300_000 for name in set(index["weight_map"].values()))
    assert 0 < record["parity"]["trained_to_exported"]["max_difference"] < 0.2
    again, record, _ = exported(verb, made, tmp_path, "export.merge=false")  # over its own earlier export
    assert again == out and record["kind"] == "adapter"
    assert (out / "adapter_config.json").is_file() and not (out / "model.safetensors.index.json").exists()
    assert record["parity"]["trained_to_exported"]["max_difference"] < 1e-4


def test_an_adapter_alone_is_evaluated_on_its_base_wherever_that_lies(cell, model, tmp_path, monkeypatch, shared):
    from ftdist.errors import UserError
    from ftdist.evaluate.load import Exported
    from ftdist.export import _copy_adapter

    monkeypatch.setenv("FTDIST_CACHE", str(shared / "cache"))
    final = cell("lora", "ddp").run_dir / "final"
    (tmp_path / "out").mkdir()
    _copy_adapter(final, tmp_path / "out", model)
    assert Exported(tmp_path / "out", None, False, "auto").base == str(model)
    shutil.copytree(model, tmp_path / "here")
    found = Exported(tmp_path / "out", str(tmp_path / "here"), False, "auto")
    assert found.base == str(tmp_path / "here") and found.is_adapter
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-5] ^= 1
    (tmp_path / "here" / "model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match=r"has changed.*eval\.base=DIR"):
        Exported(tmp_path / "out", str(tmp_path / "here"), False, "auto")


@pytest.mark.parametrize("written", [{"eos_token_id": 2, "temperature": 0.6}, None])
def test_what_was_exported_stops_at_the_end_of_a_turn(model, tmp_path, written):
    """A base whose end token is not what its chat template ends a turn with, as Qwen's."""
    from transformers import AutoTokenizer, GenerationConfig

    from ftdist.data.template import CHATML
    from ftdist.export import _tokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(tmp_path / "final")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text('{"eos_token_id": 2, "model_type": "llama"}')
    if written:
        (tmp_path / "out" / "generation_config.json").write_text(json.dumps(written))
    _tokenizer(tmp_path / "final", tmp_path / "out", False)
    turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert turn != tokenizer.eos_token_id
    found = GenerationConfig.from_pretrained(tmp_path / "out")
    assert set(found.eos_token_id) == {2, tokenizer.eos_token_id, turn}
    assert found.temperature == (0.6 if written else None)


def test_a_merge_that_is_wrong_is_refused(verb, cell, tmp_path):
    """The adapter in `final/` is not the one whose logits the engine wrote down."""
    copy = tmp_path / "run"
    shutil.copytree(cell("lora", "ddp").run_dir, copy)
    file = copy / "final" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": 64}))
    finished = verb("export", copy)
    assert finished.status == 1
    assert "parity failed (engine_to_saved" in finished.stderr.splitlines()[-1]
    assert not (copy / "model").exists()


def test_bad_input_is_answered_in_one_line(verb, cell, model, tmp_path):
    source = cell("lora", "ddp").run_dir
    verb("export", tmp_path).refused(str(tmp_path), "no run directory")
    verb("export", source, "export.dtyp=bfloat16").refused("export.dtyp", "export.dtype")
    verb("export", source, "export.dtype=int8").refused("export.dtype=int8", "bfloat16")
    verb("export", source, "export.push=me/model", env={"HF_TOKEN": None}).refused("export.push=me/model", "HF_TOKEN")
    verb("export", source, "export.gguf=f16", env={"LLAMA_CPP": None}).refused("convert_hf_to_gguf.py", "LLAMA_CPP")
    verb("export", source, f"export.output={model}").refused(f"export.output={model}", "other files")
    unfinished = tmp_path / "unfinished"
    shutil.copytree(source, unfinished)
    shutil.rmtree(unfinished / "final")
    verb("export", unfinished).refused(str(unfinished), "not finished")
    other = tmp_path / "other"
    shutil.copytree(model, other)
    changed = bytearray((other / "model.safetensors").read_bytes())
    changed[-5] ^= 1
    (other / "model.safetensors").write_bytes(changed)
    verb("export", source, f"export.base={other}").refused(str(other), "has changed", "model.safetensors")
    verb("export", source, "export.base=/no/where").refused("/no/where", "is gone", "export.base=DIR")
    plan = tmp_path / "old"
    shutil.copytree(source, plan)
    (plan / "plan.json").write_text("{}")
    verb("export", plan).refused("made by ftdist", "plan.json")


def test_a_card_names_a_base_that_a_hub_knows():
    """A path of this machine in `base_model` would have the upload refused."""
    from pathlib import Path

    from ftdist.card import hub_id

    place = Path("/c/hub/models--Qwen--Qwen2.5-0.5B--new/snapshots/0ab1")
    assert hub_id(place) == {"base_model": "Qwen/Qwen2.5-0.5B--new"}
    assert hub_id(Path("/models/Qwen2.5-0.5B")) == {}


def test_gguf_by_the_converter_that_is_there(verb, cell, tmp_path):
    converter = tmp_path / "llama.cpp" / "convert_hf_to_gguf.py"
    converter.parent.mkdir()
    converter.write_text("import sys, pathlib\npathlib.Path(sys.argv[3]).write_text(' '.join(sys.argv[4:]))\n")
    words = ("export.gguf=q8_0", "export.parity=false", f"export.output={tmp_path / 'gguf'}")
    made = cell("full", "ddp").run_dir
    finished = verb("export", made, *words, env={"LLAMA_CPP": str(converter.parent)})
    assert finished.status == 0, finished
    assert (tmp_path / "gguf" / "model-q8_0.gguf").read_text() == "--outtype q8_0"
    assert "not checked" in finished.stdout
    converter.write_text("raise SystemExit('no such architecture')\n")
    failed = verb("export", made, *words, env={"LLAMA_CPP": str(converter.parent)})
    assert failed.status == 1 and "no such architecture" in failed.stderr


# --- merging alone, against PEFT ------------------------------------------------------------------

CASES = {
    "llama": ({"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}, {}),
    "llama-dora": ({"r": 4, "use_dora": True, "target_modules": "all-linear"}, {}),
    "qwen2-tied-rslora": ({"r": 4, "use_rslora": True, "target_modules": "all-linear"}, {"tie_word_embeddings": True}),
    "qwen2-tied-head": ({"r": 4, "target_modules": ["q_proj", "lm_head"]}, {"tie_word_embeddings": True}),
    "qwen2-tied-embedding": ({"r": 4, "target_modules": ["q_proj", "embed_tokens"]}, {"tie_word_embeddings": True}),
    "qwen3": ({"r": 4, "target_modules": "all-linear", "rank_pattern": {"k_proj": 2}, "alpha_pattern": {"q_proj": 3}},
              {"head_dim": 16}),
    "phi3": ({"r": 4, "target_modules": "all-linear", "lora_bias": False}, {}),
    "mistral": ({"r": 4, "target_modules": "all-linear", "modules_to_save": ["lm_head"]}, {}),
    "gpt2": ({"r": 4, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}, {}),
    "mixtral": ({"r": 4, "target_modules": ["q_proj", "w1", "w2", "w3"]}, {"num_local_experts": 3}),
    "qwen3_moe": ({"r": 4, "target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj",
                   "experts.down_proj"]}, {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
                   "head_dim": 16}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_merged_tensor_by_tensor_as_peft_does(case, tmp_path):
    import peft
    from transformers import AutoConfig, AutoModelForCausalLM

    from ftdist import merge
    from ftdist.spectrum import reader

    settings, more = CASES[case]
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 1, "vocab_size": 64, "max_position_embeddings": 64, "initializer_range": 0.2,
             "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    if case == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 64, "n_positions": 64}
    torch.manual_seed(0)
    config = AutoConfig.for_model(case.split("-")[0], **sizes, **more)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base", max_shard_size="20KB")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    with torch.no_grad():
        for _, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    ids = torch.arange(3, 35)[None]
    with torch.no_grad():
        expected = adapted(ids).logits
        with adapted.disable_adapter():
            before = adapted(ids).logits
    base, out = tmp_path / "base", tmp_path / "out"
    out.mkdir()
    tensors, values = reader.tensors(base), reader.config(base)
    adapter = merge.Adapter(tmp_path / "adapter", tensors, values)
    if adapter.untie():
        values["tie_word_embeddings"] = False
    merge.write_model(tensors, out, adapter, "auto", 20_000)
    (out / "config.json").write_text(json.dumps(values))
    merged, notes = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not any(notes.values()), notes
    with torch.no_grad():
        found = merged.eval()(ids).logits
    scale = expected.std()
    assert (expected - before).abs().max() > 0.05 * scale  # the adapter does something
    assert (found - expected).abs().max() < 1e-4 * scale


def test_values_that_do_not_fit_are_refused(tmp_path):
    from safetensors.torch import save_file

    from ftdist import merge
    from ftdist.errors import UserError
    from ftdist.spectrum import reader

    save_file({"a.weight": torch.full((4, 4), 1e6)}, tmp_path / "model.safetensors")
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(UserError, match=r"a\.weight.*too large.*bfloat16"):
        merge.write_model(reader.tensors(tmp_path), out, None, "float16", 10**9)


def test_files_are_what_safetensors_reads(tmp_path):
    """Own writer, other reader: odd sizes, integers, scalars of a buffer, several shards."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    from ftdist import merge
    from ftdist.spectrum import reader

    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    given = {"a.weight": torch.randn(3, 5), "b.bias": torch.randn(7).bfloat16(), "c.position": torch.arange(9)}
    save_file(given, tmp_path / "in" / "model.safetensors")
    merge.write_model(reader.tensors(tmp_path / "in"), tmp_path / "out", None, "auto", 70)
    weight_map = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(weight_map) == set(given)
    for name, file in weight_map.items():
        with safe_open(tmp_path / "out" / file, "pt") as shard:
            assert torch.equal(shard.get_tensor(name), given[name])
        assert struct.unpack("<Q", (tmp_path / "out" / file).read_bytes()[:8])[0] % 8 == 0


def test_an_old_file_of_pickled_weights(tmp_path):
    """`.bin`, with what is no float among the weights: buffers of positions and of masks."""
    from safetensors.torch import load_file

    from ftdist import merge
    from ftdist.spectrum import reader

    (tmp_path / "out").mkdir()
    given = {"a.weight": torch.randn(4, 5).T, "b.weight": torch.randn(7, 2).bfloat16(), "c.bias": torch.tensor(1.5),
             "d.position": torch.arange(9)[None], "d.mask": torch.tensor([True, False])}  # fmt: skip
    torch.save(given, tmp_path / "pytorch_model.bin")
    for dtype in ("auto", "bfloat16"):
        merge.write_model(reader.tensors(tmp_path), tmp_path / "out", None, dtype, 10**9)
        found = load_file(tmp_path / "out" / "model.safetensors")
        for name, tensor in given.items():
            wanted = tensor.bfloat16() if dtype == "bfloat16" and tensor.is_floating_point() else tensor
            assert torch.equal(found[name], wanted), name
