"""What the plan answers: for every hardware and recipe, without torch, and in one line where something is wrong."""

import json
import re
import subprocess
import sys
from importlib import resources
from types import SimpleNamespace

import pytest

from ftdist import job
from ftdist.compose import choices, compose
from ftdist.errors import UserError
from ftdist.forecast import refuse_what_cannot_fit
from ftdist.plan.text import render, scaling

CARDS = set(choices("hardware")) - {"auto", "default", "cpu"}
RECIPES = sorted(set(choices("experiment")) - {"quickstart"})


def planned(*words):
    (config,) = compose("plan", ["data.path=demo", *words])
    job.decide(config)
    return config, dict(job.plan(config))


def test_every_figure_of_the_hardware_table_has_its_source():
    folder = resources.files("ftdist.conf") / "hardware"
    for file in folder.iterdir():
        if file.name.endswith(".yaml"):
            for line in file.read_text().splitlines()[1:]:
                if re.match(r"\s*\w+: [\d.]+", line):
                    assert re.search(r"# .{4,}", line), f"{file.name}: {line}"


@pytest.mark.parametrize("card", sorted(CARDS))
def test_every_card_gives_a_plan(card):
    _, plan = planned("experiment=llama31_8b_qlora", f"hardware={card}")
    assert plan["precision"] == "bfloat16" and plan["fits"] is True
    assert plan["hardware"]["name"] == card
    assert 0 < plan["mfu"] < 1 and plan["tokens_per_second"] > 0
    assert f"of {plan['hardware']['memory'] / 1e9:.3g} GB, {card}: fits" in render(plan)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_fits_an_80_gb_card(recipe):
    _, plan = planned(f"experiment={recipe}", "hardware=h100")
    assert plan["fits"] is True and plan["certain"]
    assert plan["device_peak_bytes"] == max(sum(kinds.values()) for kinds in plan["phases"].values())
    assert {"load", "forward", "backward", "step", "evaluation", "save", "resume"} <= set(plan["phases"])
    assert plan["states"]["optimizer"] >= 8 * plan["trainable_parameters"] // (plan["processes"] * plan["nodes"])


def test_a_plan_imports_no_torch(tmp_path):
    words = ["plan", "experiment=llama31_70b_spectrum_nodes", "data.path=demo", "hardware=a100_40gb", "cluster.nodes=1"]
    code = (
        "import sys; from ftdist.cli import main; status = main(sys.argv[1:]); "
        "sys.exit(status or 'torch' in sys.modules or 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "DOES NOT FIT" in done.stdout and "fits with" in done.stdout


def test_zero3_shards_are_an_eighth():
    _, one = planned("model=llama31_8b", "engine=zero3", "hardware=h100", "cluster.processes=1")
    _, eight = planned("model=llama31_8b", "engine=zero3", "hardware=h100", "cluster.processes=8")
    total = 8_030_261_248
    assert one["states"]["optimizer"] == 12 * total + 4 * 9  # master weights, two moments, a counter a sub-group
    assert abs(eight["states"]["optimizer"] - 12 * total / 8) < 1000
    assert eight["device_peak_bytes"] < one["device_peak_bytes"] / 4


def test_fit_keeps_the_global_batch_and_is_the_fastest_that_fits():
    config, _ = planned("experiment=llama31_8b_full_zero3", "hardware=a100_40gb")
    found = job.fitted(config)
    assert found["fits"] is True and found["tokens_per_step"] == 65_536
    _, pasted = planned("experiment=llama31_8b_full_zero3", "hardware=a100_40gb", *found["overrides"])
    assert pasted["device_peak_bytes"] == found["device_peak_bytes"]
    assert pasted["tokens_per_second"] == found["tokens_per_second"]


def test_fit_says_when_nothing_fits():
    config, _ = planned("model=llama31_70b", "strategy=full", "engine=ddp", "hardware=l4", "hardware.host_memory=1e9")
    with pytest.raises(UserError, match="--fit: nothing fits 1 of hardware=l4"):
        job.fitted(config)


def test_sizes():
    config, _ = planned("experiment=llama31_8b_full_zero3", "hardware=h100")
    rows = job.scaling(config, [8, 16, 64])
    assert [row["devices"] for row in rows] == [8, 16, 64]
    assert [row["nodes"] for row in rows] == [1, 2, 8]
    assert rows[0]["tokens_per_step"] == rows[1]["tokens_per_step"]  # 32 rows over 16 devices
    assert rows[0]["device_peak_bytes"] > rows[1]["device_peak_bytes"] > rows[2]["device_peak_bytes"]
    assert len(scaling(rows).splitlines()) == 4


def test_the_largest_percentage_fits_and_the_next_does_not():
    words = ("experiment=llama31_8b_spectrum25_zero3", "hardware=l4", "cluster.processes=4")
    _, plan = planned(*words)
    percent = plan["largest_top_percent"]
    assert 1 < percent < 100
    assert planned(*words, f"strategy.top_percent={percent}")[1]["fits"] is True
    assert planned(*words, f"strategy.top_percent={percent + 1}")[1]["fits"] is False


def test_money_and_time():
    _, plan = planned(
        "experiment=llama31_8b_lora", "hardware=h100", "hardware.price_per_hour=2", "train.max_steps=1000"
    )
    assert plan["total_seconds"] == pytest.approx(1000 * plan["seconds_per_step"])
    assert plan["cost"] == pytest.approx(plan["total_seconds"] / 3600 * 2, abs=0.01)


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("hardware=h101", "did you mean h100?"),
        ("hardware.memory=-1", "hardware.memory=-1: should be greater than 0"),
        ("hardware.link=nvlink9", "hardware.link=nvlink9"),
        ("hardware.prise=1", "did you mean hardware.price_per_hour?"),
        ("must_fit=perhaps", "must_fit=perhaps"),
    ],
)
def test_mistakes_are_answered_in_one_line(word, says):
    with pytest.raises(UserError) as failure:
        planned("model=llama31_8b", "hardware=h100", word)
    assert says in str(failure.value) or word.startswith("hardware.prise")
    assert "\n" not in str(failure.value)


def test_the_refusal_names_the_need_the_limit_and_a_fix(capsys):
    _, plan = planned("model=llama31_8b", "engine=zero3", "hardware=l4", "cluster.processes=4")
    assert plan["fits"] is False
    with pytest.raises(UserError, match=r"GB of device memory needed at the peak, .*this fits: .*must_fit=false"):
        refuse_what_cannot_fit(plan, must_fit=True)
    refuse_what_cannot_fit(plan, must_fit=False)
    refuse_what_cannot_fit(plan | {"certain": False}, must_fit=True)
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("warning: the run does not fit") and "within the plan's error" in said[1]


def test_checkpoints_on_the_disk_and_in_the_hosts_memory():
    """Twelve bytes a trained parameter, from a copy in the host's memory; the numbers are compared with real
    checkpoints in tests/durable/test_resume.py."""
    _, plan = planned("experiment=llama31_8b_spectrum25_zero3", "hardware=h100", "checkpoint.keep_best=1")
    size = plan["checkpoint_bytes"]
    assert size == pytest.approx(12 * plan["trainable_parameters"], rel=1e-4)
    assert plan["disk_bytes"]["checkpoints"] == 3 * size and plan["disk_bytes"]["the next checkpoint"] == size
    assert plan["host_phases"]["checkpoint"]["snapshot"] == size
    assert plan["host_peak_bytes_per_node"] > size
    _, nodes = planned("experiment=llama31_8b_spectrum25_zero3", "hardware=h100", "cluster.nodes=2")
    assert nodes["host_phases"]["checkpoint"]["snapshot"] == pytest.approx(size / 2, rel=1e-3)
    _, copies = planned("experiment=llama31_8b_lora", "hardware=h100", "cluster.processes=4")
    assert copies["checkpoint_bytes"] == pytest.approx(12 * copies["trainable_parameters"], rel=1e-4)
    _, cores = planned("model=llama32_1b", "hardware=cpu", "checkpoint.background=false")
    kinds = cores["host_phases"]["checkpoint"]
    assert kinds["snapshot"] == cores["checkpoint_bytes"] and kinds["ranks"] < cores["host_phases"]["train"]["ranks"]


def test_a_disk_without_room_is_refused_before_anything_is_made(monkeypatch, save_model, capsys):
    from small_configs import SMALL_CONFIGS

    directory = save_model(SMALL_CONFIGS["llama"])
    words = (f"model.path={directory}", "train.max_length=16", "cluster.oversubscribe=true")
    _, plan = planned(*words)
    least = plan["disk_bytes"]["final"] + plan["checkpoint_bytes"]
    free = least - 1
    monkeypatch.setattr("ftdist.job.shutil.disk_usage", lambda _: SimpleNamespace(free=free))
    (config,) = compose("train", ["data.path=demo", *words])
    with pytest.raises(UserError, match=r"the disk is too small: .* free .* needed .*must_fit=false"):
        job.ready(config)
    free = least
    job.ready(config)
    assert "checkpoint.keep_last=1" in capsys.readouterr().out


def test_steps_checkpoints_and_money_from_the_size_of_the_data(tmp_path):
    file = tmp_path / "chat.jsonl"
    file.write_text((json.dumps({"prompt": "x" * 1960, "completion": "y"}) + "\n") * 4096)
    words = (f"data.path={file}", "experiment=llama31_8b_lora", "hardware=h100", "checkpoint.every_steps=10")
    _, packed = planned(*words, "hardware.price_per_hour=2")
    assert packed["steps_are_a_guess"] and "about" in packed["arithmetic"][1]
    assert packed["total_steps"] == packed["steps_per_epoch"] == pytest.approx(0.8 * 4096 * 500 / 2048 / 8, abs=3)
    assert packed["checkpoints"] == packed["total_steps"] // 10 and packed["cost"] > 0
    _, plain = planned(*words, "train.packing=false", "data.validation_share=0")
    assert plain["steps_per_epoch"] == 512


def test_masks_of_the_models_own_dropout_are_counted():
    words = ("model.path=demo", "engine=single", "cluster.processes=1", "model.attn_implementation=eager",
             "train.packing=false")  # fmt: skip
    (_, plain), (config, dropped) = planned(*words), planned(*words, "model.dropout=0.1")
    train = config["train"]
    heads, layers = 4, 4
    scores = train["per_device_train_batch_size"] * heads * layers * train["max_length"] ** 2
    more = dropped["phases"]["forward"]["activations"] - plain["phases"]["forward"]["activations"]
    width = 2 if train["bf16"] else 4
    assert more == scores * width * (1 if train["bf16"] else 2)  # the mask, and what a cast would have made
    assert not any("dropout" in note for note in dropped["notes"])


def test_answers_need_a_device_for_the_whole_model_or_a_place_beside_the_states():
    words = ("experiment=llama31_70b_spectrum_nodes", "hardware=h100")
    _, plan = planned(*words, "eval.samples=100")
    assert plan["fits"] is False and plan["fixes"][0]["overrides"] == ["eval.samples=0"]
    _, plan = planned(*words, "eval.during=64")
    kinds = plan["phases"]["answers"]
    assert plan["fits"] and kinds["cache"] > 0 and kinds["optimizer"] == plan["phases"]["step"]["optimizer"]


def test_what_surely_does_not_fit_decides():
    words = ("experiment=llama31_8b_lora", "hardware=h100")
    _, plan = planned(*words)
    device = plan["device_peak_bytes"] * 0.99  # too small, by less than the band and a device's headroom
    tight = (f"hardware.memory={device / 0.97}", f"hardware.host_memory={plan['host_peak_bytes_per_node'] * 0.88}")
    _, plan = planned(*words, *tight)
    assert (plan["fits"], plan["certain"], plan["scarce"]) == (False, True, "host")


def test_fixes_are_cheaper_than_one_another_and_are_not_refused():
    words = ("experiment=llama31_8b_spectrum25_zero3", "hardware=l4", "hardware.host_memory=6e10")
    _, plan = planned(*words, "cluster.processes=1")
    to_adapters = next(fix for fix in plan["fixes"] if "strategy=qlora" in fix["overrides"])
    _, pasted = planned(*words, "cluster.processes=1", *to_adapters["overrides"])
    assert pasted["fits"] and pasted["device_peak_bytes"] == to_adapters["device_peak_bytes"]
    more = next(fix for fix in plan["fixes"] if fix["says"].startswith("more devices"))
    assert "4 sequences a step instead of 2" in more["says"]
    wide = ("train.max_length=4096", "train.per_device_train_batch_size=6", "train.gradient_checkpointing=false")
    _, plan = planned(*words, *wide)
    assert plan["fits"] is False and len(plan["fixes"]) > 1
    assert not any("top_percent" in word or "8bit" in word for fix in plan["fixes"][1:] for word in fix["overrides"])


def test_an_unknown_class_is_traced_once_and_has_a_band(config_directory, monkeypatch):
    from ftdist.plan import trace

    sizes = {"vocab_size": 500, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3}
    directory = config_directory({"model_type": "olmo2", **sizes, "num_attention_heads": 4, "num_key_value_heads": 4})
    words = (f"model.path={directory}", "hardware=h100", "train.max_length=128")
    _, plan = planned(*words)
    assert any("no closed form" in note for note in plan["notes"])
    assert plan["phases"]["backward"]["activations"] > 0
    monkeypatch.setattr(trace, "meta", None)  # now the cache must do
    assert planned(*words)[1]["phases"] == plan["phases"]


def test_a_token_goes_through_some_experts_of_an_unknown_class(config_directory):
    sizes = {"vocab_size": 500, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2}
    experts = {"num_experts": 64, "num_experts_per_tok": 2, "moe_intermediate_size": 160, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    directory = config_directory({"model_type": "qwen3_moe", **sizes, **experts, **heads})
    words = (f"model.path={directory}", "hardware=h100", "train.max_length=128")
    _, plan = planned(*words)
    peak = 9.89e14 * plan["mfu"] * plan["seconds_per_step"] / plan["tokens_per_step"]  # operations of a token
    assert peak < plan["total_parameters"]  # all experts would make it six times as many


def test_the_time_is_that_of_the_tokens_there_are(tmp_path):
    """A row that is not packed costs its own tokens, not the room that it could take."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": "a" * 480, "completion": "b" * 488}) + "\n" for _ in range(3200)))
    words = ("experiment=llama31_8b_lora", "hardware=h100", f"data.path={rows}")
    packed, loose = (planned(*words, f"train.packing={on}")[1] for on in ("true", "false"))
    assert 0.9 < loose["real_tokens_per_step"] / loose["sequences_per_step"] / 256 < 1.1
    assert packed["real_tokens_per_step"] == packed["tokens_per_step"]
    assert 0.7 < packed["total_seconds"] / loose["total_seconds"] < 1.1
    assert f"a step of about {loose['real_tokens_per_step']:,} tokens" in render(loose)
    shorter = planned(*words, "train.packing=false", "train.max_length=128")[1]
    assert shorter["real_tokens_per_step"] == shorter["tokens_per_step"]


def test_tracing_is_within_its_band_of_the_closed_form():
    from ftdist.plan.activations import Setting, Trained, activations, family
    from ftdist.plan.trace import meta

    config = {
        "model_type": "llama", "vocab_size": 500, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 4,
    }  # fmt: skip
    kept, peak = meta(
        config, None, False, batch=2, length=64, dtype="bfloat16", attention="sdpa", recompute=False, trained=None
    )
    names = [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]
    names += ["input_layernorm", "post_attention_layernorm"]
    layer = Trained(frozenset(f"{name}.weight" for name in names), frozenset(), ())
    said = activations(
        family(config), [layer] * 3, Setting(2, False, 2, 2, 2, 0.0, 1), batch=2, length=64, supervised=0,
        attention="sdpa", packed=False, checkpointing=False, embeddings_trained=True, input_gradients=False,
        final_norm_trained=True, trained_head=False, head_weight=2, tied=False, fused=True,
    )  # fmt: skip
    assert kept == pytest.approx(said.kept, rel=0.3)
    assert peak == pytest.approx(said.backward, rel=0.3)


@pytest.mark.parametrize(
    ("facts", "name", "memory"),
    [
        (("NVIDIA H100 80GB HBM3", 85_520_809_984, 9.0), "h100", 85_520_809_984),
        (("NVIDIA A100-SXM4-40GB", 42_949_672_960, 8.0), "a100_40gb", 42_949_672_960),
        (("NVIDIA L40S", 48_305_799_168, 8.9), "l40s", 48_305_799_168),
        (("NVIDIA L4", 24_152_899_584, 8.9), "l4", 24_152_899_584),
        (("Another card", 8_000_000_000, 7.5), "Another card", 8_000_000_000),
        (("GPU", 0, 0.0), "GPU", None),
        (None, "cpu", 7),
    ],
)
def test_a_machine_is_what_it_says_it_is(facts, name, memory):
    from ftdist.plan.hardware import hardware

    (config,) = compose("plan", ["data.path=demo", "hardware.memory=7" if facts is None else "seed=1"])
    made = hardware(**config["hardware"], here=True, world=1, cores=2, ask=lambda: facts)
    assert (made.name, made.memory, made.gpu) == (name, memory, facts is not None)


def seconds(*words):
    return planned("data.path=demo", "hardware=h100", *words)[1]["seconds_per_step"]


FULL_8B = ("model=llama31_8b", "strategy=full", "train.per_device_train_batch_size=1", "cluster.processes=8")


def test_what_crosses_to_the_host_takes_time_in_every_micro_batch():
    words = (*FULL_8B, "engine=zero3_offload", "cluster.processes=1", "train.max_length=128")
    once, often = (seconds(*words, f"train.gradient_accumulation_steps={n}") for n in (1, 16))
    assert often - once > 15 * 3 * 16e9 / 3.2e10  # weights twice and gradients once, over PCIe
    slow = seconds(*words, "hardware.host_bandwidth=2e10", "train.gradient_accumulation_steps=1")
    assert slow - once == pytest.approx(30 * 8.03e9 * (1 / 2e10 - 1 / 2.048e11), rel=0.01)


def test_a_disk_is_slower_than_memory():
    nvme = (*FULL_8B, "engine=zero3_nvme", "engine.nvme_path=/tmp")
    assert seconds(*nvme) - seconds(*FULL_8B, "engine=zero3_offload") > 2 * 12 * 8.03e9 / 7e9 - 2
    assert seconds(*nvme, "hardware.nvme=2.8e10") < seconds(*nvme) / 2


def test_zero2_gives_gradients_away_in_every_micro_batch():
    words = (*FULL_8B, "cluster.nodes=2", "hardware.network=ethernet_10g", "hardware.ports=1", "train.max_length=128")
    took = {
        (engine, n): seconds(*words, f"engine={engine}", f"train.gradient_accumulation_steps={n}")
        for engine in ("zero1", "zero2")
        for n in (1, 16)
    }
    assert took["zero2", 16] / took["zero2", 1] == pytest.approx(17 / 2, rel=0.1)
    assert took["zero1", 16] < 2 * took["zero1", 1]


def test_rings_leave_a_node_through_all_its_ports():
    words = (*FULL_8B, "engine=zero3", "cluster.nodes=2", "train.max_length=128")
    one, each, more = (seconds(*words, f"hardware.ports={n}") for n in (1, 8, 64))
    assert one > 5 * each
    assert each == seconds(*words)  # one port a device
    assert more == seconds(*words, "hardware.network=4.5e11")  # NVLink is the narrow place then


@pytest.mark.parametrize("word", ["hardware.network=0", "hardware.network=-5", "hardware.link=0"])
def test_a_link_carries_something(word):
    with pytest.raises(UserError, match=f"^{word}: bytes a second, more than 0"):
        planned(word, "model=llama31_8b")


def test_sizes_are_those_that_were_asked_for():
    config, _ = planned("experiment=llama31_8b_full_zero3", "hardware=h100")
    rows = job.scaling(config, [1, 9, 17, 64])
    for row, devices in zip(rows, (1, 9, 17, 64), strict=True):
        made = dict(word.split("=") for word in row["overrides"])
        assert int(made["cluster.processes"]) * int(made.get("cluster.nodes", 1)) == devices
        assert row["same_batch"] == (row["sequences_per_step"] == 32)
    assert [row["same_batch"] for row in rows] == [True, False, False, False]
    lines = scaling(rows).splitlines()
    assert "another global batch: 27 sequences a step" in lines[2] and "another" not in lines[1]


def test_one_device_is_offered_no_sharding_first():
    _, plan = planned("model=llama31_8b", "hardware=h200")
    assert plan["fits"] is False and plan["fixes"][0]["overrides"] == ["engine=single"]


def test_other_optimizers_have_fixes_that_keep_full_training():
    for optim, count, fix in (("adamw_8bit", 2, "train.optim=adamw_torch"),
                              ("paged_adamw_32bit", 3, "train.optim=adamw_8bit")):  # fmt: skip
        words = ("engine=zero3", f"cluster.processes={count}", "train.max_length=512", "hardware=a100_40gb")
        _, plan = planned("model=llama31_8b", *words, f"train.optim={optim}")
        assert plan["fits"] is False
        assert any(fix in made["overrides"] for made in plan["fixes"]), plan["fixes"]


def test_fit_tries_smaller_buffers_before_another_optimizer():
    config, _ = planned("experiment=llama31_8b_full_zero3", "hardware=l4")
    found = job.fitted(config)["overrides"]
    assert "+engine.zero.sub_group_size=100000000" in found and not any("optim" in word for word in found)


def test_a_host_that_nobody_has_is_not_taken_for_granted():
    words = ("model=llama31_70b", "strategy=full", "engine=zero3_offload", "cluster.processes=8", "hardware=h100")
    _, plan = planned(*words)
    assert plan["host_peak_bytes_per_node"] > 2e12 and not plan["certain"]
    assert "host memory is not known here" in render(plan)
    assert planned(*words, "hardware.host_memory=8e12")[1]["certain"]


def test_a_reference_copy_is_whole_before_it_is_sharded():
    words = ("experiment=llama31_70b_qlora_zero3", "hardware=h100", "task=dpo", "task.reference=copy")
    _, plan = planned(*words)
    loading = plan["phases"]["load_reference"]["reference"]
    assert loading == pytest.approx(plan["processes"] * plan["phases"]["forward"]["reference"], rel=0.01)


def test_what_a_job_asks_of_slurm_comes_from_the_plan():
    _, plan = planned("experiment=llama31_8b_full_zero3", "hardware=h100", "cluster=slurm", "cluster.gpus=8",
                      "cluster.gpu_type=h100", "train.max_steps=10000")  # fmt: skip
    gigabytes = int(plan["asks"]["memory"].removesuffix("G")) * 2**30
    assert 1.2 < gigabytes / plan["host_peak_bytes_per_node"] < 1.35
    hours, minutes, _ = map(int, plan["asks"]["time"].split(":"))
    assert 1.5 * plan["total_seconds"] + 1800 <= 3600 * hours + 60 * minutes < 1.5 * plan["total_seconds"] + 2700
    assert f"cluster.memory={plan['asks']['memory']}, cluster.time={plan['asks']['time']}" in render(plan)
