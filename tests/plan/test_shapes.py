"""The plan's shapes are those of the real model classes; a damaged model directory is a one-line error."""

import json
import subprocess
import sys

import pytest
from small_configs import SMALL_CONFIGS

from ftdist.errors import UserError
from ftdist.plan.architectures import DEFAULTS, closed_form
from ftdist.plan.shapes import (
    architecture_shapes,
    checkpoint_shapes,
    describe,
    meta_model,
    model_shapes,
)

LLAMA = SMALL_CONFIGS["llama"]


@pytest.mark.parametrize("name", SMALL_CONFIGS)
def test_closed_form_equals_the_model_class(name):
    config = SMALL_CONFIGS[name]
    real = describe(meta_model(config, None, False))
    ours = closed_form(config)
    assert list(ours.parameters.items()) == list(real.parameters.items())  # names, shapes and order
    assert (ours.linear, ours.embeddings, ours.head) == (real.linear, real.embeddings, real.head)
    assert (ours.tied, ours.recomputation) == (real.tied, real.recomputation)
    assert set(ours.attention) == set(real.attention)


@pytest.mark.parametrize("family", DEFAULTS)
def test_defaults_are_those_of_the_config_class(family):
    from transformers import CONFIG_MAPPING

    real = CONFIG_MAPPING[family]()
    ours = dict(DEFAULTS[family])
    if family not in ("gpt2", "qwen2", "phi3") and ours["head_dim"] is None:
        del ours["head_dim"]  # worked out from hidden_size
    for key, value in ours.items():
        if value is None:  # worked out by the class from other keys
            continue
        if hasattr(real, key):
            assert getattr(real, key) == value, key
        else:
            assert value is False, key


def test_published_parameter_counts():
    llama = {"model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8, "head_dim": 128}
    wide = {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    }
    counts = {
        8_030_261_248: {**llama, "intermediate_size": 14336},
        70_553_706_496: {**llama, **wide},
        3_821_079_552: {"model_type": "phi3"},
        46_702_792_704: {"model_type": "mixtral"},
        124_439_808: {"model_type": "gpt2"},
        2_614_341_888: {"model_type": "gemma2"},
    }
    for count, config in counts.items():
        sizes = architecture_shapes(config).values()
        total = 0
        for shape in sizes:
            size = 1
            for side in shape:
                size *= side
            total += size
        assert total == count, config["model_type"]


def test_contradicting_config_is_refused():
    with pytest.raises(UserError, match="hidden_size='big'"):
        architecture_shapes({**LLAMA, "hidden_size": "big"})
    with pytest.raises(UserError, match="num_attention_heads=4 is no multiple of num_key_value_heads=3"):
        architecture_shapes({**LLAMA, "num_key_value_heads": 3})


@pytest.mark.parametrize("name", ["llama-tied", "phi3", "gpt2", "mixtral", "qwen3"])
def test_local_directory_gives_run_time_names(name, save_model):
    directory = save_model(SMALL_CONFIGS[name])
    shapes = model_shapes(str(directory), None, need_weights=True)
    assert shapes.architecture.parameters == describe(meta_model(SMALL_CONFIGS[name], None, False)).parameters
    assert shapes.dtype == "float32"
    assert "safetensors headers" in shapes.source


def test_sharded_checkpoint(save_model):
    directory = save_model(LLAMA, max_shard_size="20KB")
    shards = sorted(directory.glob("model-*.safetensors"))
    assert len(shards) > 2
    on_disk = {name: tensor.shape for name, tensor in checkpoint_shapes(directory).items()}
    assert on_disk == architecture_shapes(LLAMA)

    data = shards[1].read_bytes()
    for length in (0, 5, 40, len(data) - 1):
        shards[1].write_bytes(data[:length])
        with pytest.raises(UserError, match=f"{shards[1].name}: cut short"):
            model_shapes(str(directory), None)
    shards[1].write_bytes(data[:8] + b"\xff" * 20 + data[28:])
    with pytest.raises(UserError, match="header is damaged"):
        model_shapes(str(directory), None)
    shards[1].write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(UserError, match="git lfs pull"):
        model_shapes(str(directory), None)
    shards[1].write_bytes(shards[0].read_bytes())
    with pytest.raises(UserError, match="lacks .*, which the index puts there"):
        model_shapes(str(directory), None)
    shards[1].unlink()
    with pytest.raises(UserError, match=f"the index names {shards[1].name}, which is not there"):
        model_shapes(str(directory), None)


def test_weights_that_do_not_belong_to_the_config(save_model):
    directory = save_model(LLAMA)
    file = directory / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(UserError, match=r"the weights lack model.layers.2.self_attn.q_proj.weight"):
        model_shapes(str(directory), None)
    file.write_text(json.dumps(config | {"vocab_size": 51}))
    with pytest.raises(UserError, match=r"embed_tokens.weight has shape \[50, 32\], config.json calls for \[51, 32\]"):
        model_shapes(str(directory), None)


def test_quantised_checkpoint_is_recognised(save_model):
    directory = save_model(LLAMA)
    file = directory / "config.json"
    config = json.loads(file.read_text()) | {"quantization_config": {"quant_method": "bitsandbytes"}}
    file.write_text(json.dumps(config | {"intermediate_size": 96}))  # packed shapes differ from the model's
    assert model_shapes(str(directory), None).quantized


def test_config_without_weights(config_directory):
    directory = config_directory({"model_type": "phi3", "dtype": "bfloat16"})
    shapes = model_shapes(str(directory), None)
    assert (shapes.total, shapes.dtype, shapes.positions) == (3_821_079_552, "bfloat16", 4096)
    assert "no weights" in shapes.source
    with pytest.raises(UserError, match="no weights there"):
        model_shapes(str(directory), None, need_weights=True)
    (directory / "pytorch_model.bin").write_bytes(b"pickle")
    assert "weights in .bin files" in model_shapes(str(directory), None, need_weights=True).source


def test_paths_that_are_no_model(tmp_path):
    with pytest.raises(UserError, match="no such directory; looked for /nowhere/model/config.json"):
        model_shapes("/nowhere/model", None)
    with pytest.raises(UserError, match="a file; give the directory"):
        model_shapes(__file__, None)
    with pytest.raises(UserError, match="no config.json there"):
        model_shapes(str(tmp_path), None)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    with pytest.raises(UserError, match="an adapter, not a model; its base is model.path=org/base"):
        model_shapes(str(tmp_path), None)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        model_shapes(str(tmp_path), None)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="has no model_type"):
        model_shapes(str(tmp_path), None)


def test_hub_id(tmp_path, monkeypatch):
    from huggingface_hub import constants

    with pytest.raises(UserError, match="not in the Hugging Face cache, and HF_HUB_OFFLINE is set; run `hf download"):
        model_shapes("some-org/some-model", None)
    assert model_shapes("some-org/some-model", LLAMA).source == "model.architecture"

    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    repository = cache / "models--some-org--some-model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(SMALL_CONFIGS["qwen3"]))
    shapes = model_shapes("some-org/some-model", LLAMA)  # what was downloaded is nearer the truth
    assert (shapes.model_type, shapes.source) == ("qwen3", "config.json in the Hugging Face cache")


def test_any_other_model_class_is_built_once(monkeypatch):
    import transformers

    config = {"model_type": "opt", "vocab_size": 50, "hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 2, "max_position_embeddings": 30, "word_embed_proj_dim": 16}
    first = model_shapes("org/opt", config)
    assert first.architecture.parameters["model.decoder.layers.0.fc1.weight"] == (24, 16)
    assert first.architecture.tied == {"lm_head.weight": "model.decoder.embed_tokens.weight"}
    assert first.positions == 30
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_config", None)
    assert model_shapes("org/opt", config).architecture == first.architecture

    with pytest.raises(UserError, match="model_type 'nonesuch': unknown to transformers"):
        model_shapes("org/x", {"model_type": "nonesuch"})
    with pytest.raises(UserError, match="brings its own code; read it, then set model.trust_remote_code=true"):
        model_shapes("org/x", {"model_type": "nonesuch", "auto_map": {"AutoConfig": "a.B"}})
    with pytest.raises(UserError, match="no causal language model can be built"):
        model_shapes("org/x", {"model_type": "vit"})


def test_the_plan_needs_no_torch():
    code = (
        "import sys\n"
        "from ftdist.plan import advice, batch, refuse, shapes, text, trainable\n"
        "found = shapes.model_shapes('org/m', {'model_type': 'phi3'})\n"
        "lora = {'peft_type': 'LORA', 'r': 8, 'target_modules': 'all-linear'}\n"
        "trainable.trainable_parameters(found, peft=lora, trainable=None)\n"
        "assert not {'torch', 'transformers', 'peft'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
