"""The configuration: every shipped file, every way to give a key, and every key that must be refused."""

import json
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

CONF = Path(__file__).parents[2] / "conf"
AT_LEAST = {"chat": 1, "checkpoint": 1, "cluster": 2, "data": 3, "engine": 7, "eval": 2, "experiment": 10, "export": 1,
            "forgetting": 2, "hardware": 10, "health": 1, "model": 11, "stopping": 1, "strategy": 4, "sweep": 3,
            "task": 4, "tracking": 2, "train": 1}  # fmt: skip
SHIPPED = sorted(str(file.relative_to(CONF)) for file in CONF.rglob("*.yaml"))
NEEDED = {  # choices that leave a value to the user
    "data/custom": ["data.path=x"],
    "data/default": ["data.path=x"],
    "model/custom": ["model.path=x"],
    "model/default": ["model.path=x"],
    "cluster/outside": ["cluster.nodes=1", "cluster.processes=1"],
    "engine/zero3_nvme": ["engine.nvme_path=x"],
    "sweep/search": ["sweep.space={seed: [1,2]}"],
}

# words → what the one line on stderr must say
REFUSED = {
    # a key that nothing reads
    "strategy.r=4": ("strategy.r",),  # strategy=full has no rank
    "+strategy.foo=1": ("strategy.foo",),
    "strategy=lora strategy.rr=8": ("strategy.rr", "strategy.r?"),
    "engine=ddp engine.zero.overlap_comm=false": ("engine.zero",),
    "engine=ddp +engine.zero.overlap_comm=false": ("engine.zero",),
    "engine.zero.overlap=false": ("engine.zero.overlap", "engine.zero.overlap_comm"),
    "engine.zero.stage=3": ("engine.zero.stage",),  # the engine says the stage
    "engine=zero2 engine.nvme_path=/disk": ("engine.nvme_path",),
    "foo=1": ("foo", "known"),
    "+foo=1": ("foo", "known"),
    "foo.bar=1": ("foo.bar",),
    "model.pth=x": ("model.pth", "model.path"),
    "data.pth=x": ("data.pth", "data.path"),
    "tracking=none tracking.project=x": ("tracking.project",),
    "tracking=wandb tracking.projct=x": ("tracking.projct", "tracking.project"),
    "cluster.process=2": ("cluster.process", "cluster.processes"),
    "eval.sample=1": ("eval.sample", "eval.samples"),
    "task.beta=1": ("task.beta",),
    "sed=1": ("sed", "seed"),
    "hydra.run.dir=elsewhere": ("hydra.run.dir", "run_dir"),
    "hydra.job.chdir=true": ("hydra.job.chdir",),
    "~train.max_steps": ("train.max_steps",),
    "~model": ("model",),
    # a field of TRL's or transformers' that another key decides, or nothing
    "train.output_dir=x": ("train.output_dir", "run_dir"),
    "+train.output_dir=x": ("train.output_dir", "run_dir"),
    "++train.output_dir=x": ("train.output_dir", "run_dir"),
    "train.report_to=wandb": ("train.report_to", "tracking"),
    "train.seed=1": ("train.seed",),
    "train.deepspeed=ds.json": ("train.deepspeed", "engine"),
    "train.hub_token=secret": ("train.hub_token", "secrets"),
    "train.save_steps=10": ("train.save_steps",),
    "train.dataset_kwargs={a: 1}": ("train.dataset_kwargs", "data"),
    # removed keys
    "train.warmup_ratio=0.1": ("train.warmup_ratio", "train.warmup_steps"),
    "train.max_seq_length=512": ("train.max_seq_length", "train.max_length"),
    "train.evaluation_strategy=steps": ("train.evaluation_strategy", "train.eval_strategy"),
    "train.overwrite_output_dir=true": ("train.overwrite_output_dir", "run_dir"),
    "train.group_by_length=true": ("train.group_by_length", "train.packing"),
    "train.no_cuda=true": ("train.no_cuda", "CUDA_VISIBLE_DEVICES"),
    # a typo
    "train.learing_rate=1": ("train.learing_rate", "train.learning_rate"),
    "train.epochs=1": ("train.epochs",),
    "strategy=lor": ("strategy=lor", "lora"),
    "engine=zero5": ("engine=zero5", "zero"),
    "experiment=practice1b": ("experiment=practice1b", "practice_1b"),
    "modle.path=x": ("modle.path", "model"),
    "strategy.name=lor": ("strategy.name=lor", "lora"),
    # a wrong type
    "train.learning_rate=fast": ("train.learning_rate=fast", "number"),
    "train.per_device_train_batch_size=2.5": ("train.per_device_train_batch_size=2.5", "integer"),
    "train.bf16=maybe": ("train.bf16=maybe", "boolean"),
    "train.max_steps=": ("train.max_steps", "integer"),
    "train.optim=null": ("train.optim", "adamw_torch"),
    "strategy=lora strategy.r=abc": ("strategy.r=abc", "integer"),
    "cluster.processes=two": ("cluster.processes=two", "auto"),
    "seed=abc": ("seed=abc", "integer"),
    "model.architecture=x": ("model.architecture=x",),
    "run_dir=[1]": ("run_dir",),
    "model=3": ("model=3", "demo"),
    "model=null": ("model=null", "demo"),
    # a value that cannot be
    "train.learning_rate=-1": ("train.learning_rate=-1", "above 0"),
    "train.per_device_train_batch_size=0": ("train.per_device_train_batch_size=0", "at least 1"),
    "train.gradient_accumulation_steps=0": ("train.gradient_accumulation_steps=0", "at least 1"),
    "train.max_steps=0": ("train.max_steps=0", "at least 1"),
    "train.num_train_epochs=0": ("train.num_train_epochs=0", "above 0"),
    "train.max_length=1": ("train.max_length=1", "at least 2"),
    "train.max_length=100000": ("train.max_length=100000", "2048"),  # the model's positions
    "train.optim=adamm": ("train.optim=adamm", "ada"),
    "train.lr_scheduler_type=cosin": ("train.lr_scheduler_type=cosin", "cosine"),
    "train.loss_type=nl": ("train.loss_type=nl", "nll"),
    "train.bf16=true train.fp16=true": ("train.fp16", "train.bf16"),
    "strategy=lora strategy.r=0": ("strategy.r=0", "1"),
    "strategy=lora strategy.dropout=1": ("strategy.dropout=1", "less than 1"),
    "strategy=spectrum strategy.top_percent=200": ("strategy.top_percent=200", "100"),
    "strategy=spectrum strategy.parameters=[lm_hed]": ("strategy.parameters", "lm_head"),
    "cluster.processes=0": ("cluster.processes=0", "1"),
    "cluster.nodes=2": ("cluster.nodes=2",),
    "engine=single cluster.processes=2": ("engine=single", "ddp"),
    "engine=zero3_nvme": ("engine.nvme_path", "missing"),
    "engine=zero3_nvme engine.nvme_path=nowhere": ("nvme",),  # no libaio, or no such directory
    "model.dtype=float8": ("model.dtype=float8", "bfloat16"),
    "model.attn_implementation=flash_attention_2": ("model.attn_implementation=flash_attention_2", "sdpa"),
    "data.format=alpca": ("data.format=alpca", "alpaca"),
    "data.validation_share=2": ("data.validation_share=2", "less than 1"),
    "data.columns.foo=bar": ("data.columns.foo",),
    "eval.samples=-1": ("eval.samples=-1", "0"),
    "seed=-1": ("seed=-1", "0"),
    "data=custom data.path=???": ("data.path", "missing"),
    # words that are no override
    "chat.jsonl": ("chat.jsonl", "data.path=chat.jsonl"),
    "train.learning_rate=[1": ("train.learning_rate",),
    "data.path=[ab].jsonl": ("data.path=[ab].jsonl", "'data.path=\"[ab].jsonl\"'"),
    "data.columns={foo:bar}": ("data.columns.foo",),
    "train.learning_rate=${foo}": ("train.learning_rate", "foo"),
    "train.max_steps=1,2": ("train.max_steps=1,2", "-m"),
    "--bogus": ("--bogus", "--help"),
    "--cfg": ("--cfg",),
    "--config-dir nowhere": ("nowhere", "not found"),
}


BY_SCRIPT = ("strategy.r=4", "train.warmup_ratio=0.1", "train.max_steps=0", "--bogus", "--config-dir nowhere")


@pytest.mark.parametrize("words", REFUSED)
def test_refused_before_anything_is_made(run, verb, model, chat, tmp_path, words):
    given = words.split(" ") if not words.startswith("train.dataset") else [words]
    train = run if words in BY_SCRIPT else verb
    finished = train("train", f"model.path={model}", f"data.path={chat}", "tracking=none", *given, cwd=tmp_path)
    finished.refused(*REFUSED[words])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["plan", "data", "scan"])
def test_every_verb_refuses_unknown_keys(verb, tmp_path, name):
    finished = verb(name, "train.learing_rate=1", cwd=tmp_path)
    finished.refused("train.learing_rate", "train.learning_rate")
    assert list(tmp_path.iterdir()) == []


def test_wrong_verbs_and_groups(run, tmp_path):
    run("trian").refused("trian", "train")
    run("ls", "strategie").refused("strategie", "strategy")
    run("eval", tmp_path).refused(str(tmp_path), "no run directory")
    assert run().status == 2


def test_nothing_is_forgotten_here():
    for group, count in AT_LEAST.items():
        assert sum(name.startswith(f"{group}/") for name in SHIPPED) >= count, group
    assert {Path(name).parts[0] for name in SHIPPED} == {*AT_LEAST, "config.yaml"}


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_file_composes_and_every_key_has_a_reader(name):
    from ftdist import job
    from ftdist.compose import compose

    choice = name.removesuffix(".yaml")
    words = [] if choice == "config" else [choice.replace("/", "="), *NEEDED.get(choice, [])]
    (config,) = compose("plan", words)
    job.check(config)


@pytest.mark.parametrize("name", [Path(name).stem for name in SHIPPED if name.startswith("experiment/")])
def test_every_recipe_is_a_plan(verb, name):
    finished = verb("plan", f"experiment={name}", "--json")
    assert finished.status == 0, finished.stderr
    made = json.loads(finished.stdout)
    for plan in made if isinstance(made, list) else [made]:  # a recipe may be several runs
        assert plan["trainable_parameters"] > 0 and plan["tokens_per_step"] > 0


def test_the_command_line_wins_over_a_recipe(verb):
    finished = verb("plan", "experiment=practice_1b", "strategy=qlora", "train.max_length=256", "--cfg", "job")
    config = yaml.safe_load(finished.stdout)
    assert (config["strategy"]["name"], config["train"]["max_length"]) == ("qlora", 256)
    assert config["model"]["path"] == "meta-llama/Llama-3.2-1B-Instruct" or "1B" in config["model"]["path"]


def test_cfg_job_shows_the_configuration(verb, tmp_path):
    finished = verb("train", "strategy=lora", "strategy.r=3", "train.adam_beta2=0.99", "--cfg", "job", cwd=tmp_path)
    assert finished.status == 0, finished.stderr
    config = yaml.safe_load(finished.stdout)
    assert config["strategy"]["r"] == 3 and config["train"]["adam_beta2"] == 0.99
    assert list(tmp_path.iterdir()) == []


def test_help_lists_groups_choices_and_keys(run, tmp_path):
    text = run("--help").stdout
    assert all(verb in text for verb in ("train", "plan", "data", "scan", "eval", "ls"))
    finished = run("train", "--help", cwd=tmp_path)
    assert finished.status == 0, finished.stderr
    for part in ("strategy: full, lora, qlora, spectrum", "per_device_train_batch_size", "validation_share"):
        assert part in finished.stdout
    assert run("--version").stdout.startswith("ftdist ")
    assert list(tmp_path.iterdir()) == []


def test_ls(verb):
    groups = verb("ls").stdout
    assert all(group in groups for group in AT_LEAST)
    for group in AT_LEAST:
        lines = verb("ls", group).stdout.splitlines()
        choices = {Path(name).stem for name in SHIPPED if name.startswith(f"{group}/")}
        assert {line.split()[0] for line in lines} == choices
        assert all(len(line.split()) > 2 for line in lines), lines  # with a meaning


def test_a_sweep_composes_every_combination(verb, tmp_path):
    finished = verb("plan", "strategy=full,lora", "-m", "train.max_length=64,128", "--json", cwd=tmp_path)
    assert finished.status == 0, finished.stderr
    plans = json.loads(finished.stdout)
    assert [(p["strategy"], p["tokens_per_step"] // p["sequences_per_step"]) for p in plans] == [
        ("full", 64),
        ("full", 128),
        ("lora", 64),
        ("lora", 128),
    ]
    folders = {Path(p["command"][0][-1]) for p in plans}
    assert len(folders) == 4 and len({folder.parent for folder in folders}) == 1  # each its own run directory
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_with_one_wrong_member_starts_nothing(verb, model, chat, tmp_path):
    words = ["-m", f"model.path={model}", f"data.path={chat}", "train.max_steps=1,0"]
    verb("train", *words, cwd=tmp_path).refused("train.max_steps=0")
    assert list(tmp_path.iterdir()) == []


def test_groups_outside_the_package(verb, model, tmp_path):
    for group, choice, text in (
        ("strategy", "thin", "# @package _global_\ndefaults: [lora, _self_]\nstrategy: {r: 3}\n"),
        ("experiment", "mine", "# @package _global_\ndefaults:\n  - override /strategy: thin\nseed: 5\n"),
    ):
        (tmp_path / "conf" / group).mkdir(parents=True)
        (tmp_path / "conf" / group / f"{choice}.yaml").write_text(text)
    finished = verb("plan", "--config-dir", "conf", "experiment=mine", f"model.path={model}", "--json", cwd=tmp_path)
    assert finished.status == 0, finished.stderr
    plan = json.loads(finished.stdout)
    assert plan["strategy"] == "lora"
    width = {"hidden": 64, "key": 32, "inner": 128}
    pairs = 2 * ["hidden hidden"] + 2 * ["hidden key"] + 3 * ["hidden inner"]
    assert plan["trainable_parameters"] == 4 * 3 * sum(width[a] + width[b] for a, b in map(str.split, pairs))
    verb("plan", "experiment=mine").refused("experiment=mine")


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("ftdist tr", ["train"]),
        ("ftdist train stra", ["strategy.", "strategy="]),
        ("ftdist train strategy=sp", ["spectrum"]),
        ("ftdist train engine=zero3_", ["zero3_nvme", "zero3_offload"]),
        ("ftdist train strategy=lora train.learn", ["train.learning_rate="]),
        ("ftdist train strategy=lora strategy.al", ["strategy.alpha="]),
        ("ftdist ls eng", ["engine"]),
    ],
)
def test_completion_words(verb, line, offered):
    finished = verb("completion", "words", line)
    assert (finished.status, finished.stdout.split()) == (0, offered)


def test_completion_in_bash(environment, tmp_path):
    """A real terminal, a real tab key."""
    terminal, child = pty.openpty()
    shell = subprocess.Popen(
        ["bash", "--norc", "--noprofile", "-i"],
        stdin=child,
        stdout=child,
        stderr=child,
        cwd=tmp_path,
        env=environment | {"PS1": "$ ", "TERM": "dumb", "HISTFILE": ""},
        start_new_session=True,
    )
    os.close(child)
    seen = ""

    def until(wanted):
        nonlocal seen
        seen, deadline = "", time.monotonic() + 60
        while wanted not in seen:
            assert time.monotonic() < deadline, seen
            if select.select([terminal], [], [], 1)[0]:
                seen += os.read(terminal, 4096).decode()

    try:
        os.write(terminal, b'eval "$(ftdist completion bash)"; echo re""ady\n')
        until("ready")
        os.write(terminal, b"ftdist train engine=zero3_of\t")
        until("engine=zero3_offload")
    finally:
        shell.kill()
        shell.wait()
        os.close(terminal)


LIGHT = ("--help", "--version", "ls", "ls engine", "plan", "plan strategy=lora engine=zero3", "train --help",
         "plan experiment=llama31_70b_qlora_zero3", "train --cfg job", "completion words ftdist")  # fmt: skip


@pytest.mark.parametrize("words", LIGHT)
def test_light_verbs_load_no_heavy_package(execute, words):
    code = (
        "import atexit, sys; from ftdist.cli import main; "
        "heavy = {'torch', 'transformers', 'trl', 'peft', 'deepspeed', 'datasets', 'accelerate', 'wandb', 'pandas'}; "
        "atexit.register(lambda: print('heavy:', sorted(heavy & sys.modules.keys()))); sys.exit(main(sys.argv[1:]))"
    )
    finished = execute(sys.executable, "-c", code, *words.split(" "))
    assert finished.status == 0, finished.stderr
    assert finished.stdout.splitlines()[-1] == "heavy: []"
