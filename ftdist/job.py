"""A configuration → a finished run: check, plan, prepare, freeze, launch, evaluate. One function a step."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from ftdist import launcher, models, page, rundir, schema, tracking, trainkeys
from ftdist.data.prepare import prepare
from ftdist.errors import UserError
from ftdist.evaluate import evaluate, settings
from ftdist.plan import Plan
from ftdist.plan.shapes import Shapes, model_shapes
from ftdist.strategies import Base, Recipe, find, preparation

GROUPS = ("train", "model", "data", "task", "strategy", "engine", "cluster", "eval", "tracking")
AUTOMATIC = ("bf16", "gradient_checkpointing")  # keys of `train` that the plan decides when they are null
BF16_CAPABILITY = 8.0  # Ampere, the first GPUs with bfloat16
RECOMPUTE_ABOVE = 1_000_000_000  # parameters; below, activations are small beside what a GPU holds
FILES = {
    "config.yaml": "the resolved configuration",
    "plan.json": "this plan",
    "accelerate.yaml": "how the processes start",
    "env.json": "versions, commit, machine",
    "metrics.jsonl": "a line for each logged step",
    "logs/": "what each rank said",
    "README.md": "the run's page",
    "final/": "the trained model or adapter, with its tokenizer",
}


def _top(*, run_dir: str | None, seed: Annotated[int, Field(ge=0, lt=2**32)]) -> None:
    """The keys outside every group."""


def _task(*, name: Literal["sft"]) -> None:
    """The keys of `task`."""


def check(config: dict[str, Any]) -> None:
    """Every key of every group against what reads it; UserError names the first that nothing would read."""
    schema.check("", {k: v for k, v in config.items() if k not in GROUPS}, _top)
    trainkeys.check({k: v for k, v in config["train"].items() if not (k in AUTOMATIC and v is None)})
    schema.check("model", config["model"], models.load, model_keys, context=("quantization", "loaded_dtype"))
    schema.check("data", config["data"], prepare, context=DATA_CONTEXT)
    schema.check("task", config["task"], _task)
    schema.check("eval", config["eval"], settings)
    schema.check("cluster", config["cluster"], launcher.processes, context=("here",))
    engine = launcher.engine_function(config["engine"].get("name"))
    schema.check("engine", config["engine"], engine)
    engine(**config["engine"])  # looks at the keys for DeepSpeed
    schema.check("tracking", config["tracking"], tracking.function(config["tracking"].get("name")))
    keys = {k: v for k, v in config["strategy"].items() if k != "name"}
    strategy = find(config["strategy"].get("name"))
    schema.check("strategy", keys, *filter(None, (strategy, preparation(strategy))))


DATA_CONTEXT = ("tokenizer_path", "revision", "trust_remote_code", "max_length", "packing", "task", "seed",
                "cache_dir")  # fmt: skip


def model_keys(*, path: str, architecture: dict[str, Any] | None) -> None:
    """The keys of `model` that the plan reads."""


def plan(config: dict[str, Any], rows: int | None = None, examples: int | None = None, measured: bool = False) -> Plan:
    """What would run, with the arithmetic. Loads no torch, no weights, no data; `config` was completed by `decide`.

    rows: of the prepared training split, packed ones where packing is on; examples: before packing;
    measured: the strategy has prepared what it needs.
    """
    from ftdist.plan.advice import advice
    from ftdist.plan.batch import batch_arithmetic
    from ftdist.plan.examples import count as count_rows
    from ftdist.plan.refuse import refuse
    from ftdist.plan.trainable import trainable_parameters

    if is_preference(config["data"]):
        raise UserError("data.format=preference: no task trains on preferences yet; `ftdist data` prepares them")
    if examples is None:
        examples = count_rows(config["data"]["path"])
    train, engine, gpu = config["train"], config["engine"]["name"], launcher.gpu()
    count = launcher.processes(**config["cluster"], here=False)
    available, kind = launcher.devices()
    shapes = shapes_of(config["model"])
    total = shapes.total
    stage = stage_of(engine)
    dtype = precision(train)
    recipe = recipe_of(config, shapes, measured)
    refuse(
        strategy=config["strategy"]["name"],
        adapters=recipe.peft is not None,
        quantizes=recipe.quantization is not None,
        trains_all=recipe.peft is None and recipe.trainable is None,
        use_dora=bool((recipe.peft or {}).get("use_dora")),
        quantized_checkpoint=shapes.quantized,
        model_type=shapes.model_type,
        attention=shapes.architecture.attention,
        recomputation=shapes.architecture.recomputation,
        positions=shapes.positions,
        attn_implementation=config["model"]["attn_implementation"],
        engine=engine,
        stage=stage,
        offload=engine in ("zero3_offload", "zero3_nvme")
        or any(key.startswith("offload_") for key in config["engine"].get("zero", ())),
        nvme_path=config["engine"].get("nvme_path"),
        here=config["cluster"]["name"] == "local",
        processes=count,
        nodes=config["cluster"]["nodes"],
        gpu=kind == "GPU",
        gpu_has_bf16=None if gpu is None else gpu[1] >= BF16_CAPABILITY,
        optim=train["optim"],
        bf16=bool(train["bf16"]),
        fp16=bool(train.get("fp16")),
        gradient_checkpointing=train["gradient_checkpointing"],
        max_length=train["max_length"],
        packing=train["packing"],
    )
    by_type = trainable_parameters(shapes, peft=dict(recipe.peft) if recipe.peft else None, trainable=recipe.trainable)
    batch = batch_arithmetic(
        per_device_train_batch_size=train["per_device_train_batch_size"],
        gradient_accumulation_steps=train["gradient_accumulation_steps"],
        processes=count,
        nodes=config["cluster"]["nodes"],
        max_length=train["max_length"],
        packing=train["packing"],
        rows=rows,
        num_train_epochs=train["num_train_epochs"],
        max_steps=train["max_steps"],
    )
    whole = recipe.peft is None and recipe.trainable is None
    made: dict[str, Any] = {
        "model": config["model"]["path"],
        "model_source": shapes.source,
        "total_parameters": total,
        "trainable_parameters": sum(by_type.values()),
        "trainable_by_type": by_type,
        "data": _named(config["data"]["path"], examples),
        "task": config["task"]["name"],
        "strategy": config["strategy"]["name"],
        "engine": engine,
        "precision": dtype,
        "processes": count,
        "nodes": config["cluster"]["nodes"],
        "devices": f"{kind}s, {available} here",
        "sequences_per_step": batch.sequences_per_step,
        "tokens_per_step": batch.tokens_per_step,
        "arithmetic": batch.arithmetic,
        "files": FILES | ({"deepspeed.json": "DeepSpeed's settings"} if stage else {}),
        "command": [launcher.command(Path(config["run_dir"]))],
        "advice": advice(
            strategy=config["strategy"]["name"],
            examples=examples,
            parameters=total,
            processes=count,
            nodes=config["cluster"]["nodes"],
            device_bytes=None if gpu is None else gpu[0],
        ),
        "stage": stage,
        "storage": storage(stage, dtype),
        # Under torch's autocast trained weights stay in float32; DeepSpeed keeps its own float32 copies.
        "loaded": "float32" if whole and not stage else dtype,
        "trained": dtype if stage else "float32",
        "adapters": recipe.peft is not None,
    }
    if batch.total_steps is not None:
        made["total_steps"] = batch.total_steps
    return made  # type: ignore[return-value]


def decide(config: dict[str, Any]) -> None:
    """Check every key, then fill what was left to the program: precision, recomputation, the run directory's name."""
    check(config)
    train = config["train"]
    gpu = launcher.gpu()
    if train["bf16"] is None:
        has_bf16 = gpu[1] >= BF16_CAPABILITY if gpu else _cpu_has_bf16()
        train["bf16"] = not train.get("fp16") and has_bf16
    if train["gradient_checkpointing"] is None:
        train["gradient_checkpointing"] = gpu is not None and shapes_of(config["model"]).total > RECOMPUTE_ABOVE
    if config["run_dir"] is None:
        config["run_dir"] = rundir.fresh_name(config["model"]["path"], config["strategy"]["name"])


def ready(config: dict[str, Any]) -> None:
    """Refuse, before anything is made, what is wrong or cannot work on this machine."""
    decide(config)
    launcher.processes(**config["cluster"], here=True)
    plan(config)


def run(config: dict[str, Any]) -> Path:
    """Prepare, freeze, launch and evaluate one configuration; the finished run directory."""
    count = launcher.processes(**config["cluster"], here=True)
    run_dir = Path(config["run_dir"]).expanduser().absolute()
    with rundir.claimed(run_dir):
        freeze(config, run_dir)
        rundir.write_yaml(
            run_dir / "accelerate.yaml",
            launcher.accelerate_file(config["engine"]["name"], count, run_dir / "deepspeed.json"),
        )
    world = f"{count} process" + ("es" if count > 1 else "")
    print(f"starting {world} ({config['engine']['name']}) in {run_dir}", flush=True)
    launcher.run(run_dir, count)
    finish(run_dir)
    return run_dir


def freeze(config: dict[str, Any], run_dir: Path) -> None:
    """Prepare model files and data, then write down everything that the ranks will read."""
    model = config["model"]
    model["path"] = models.local_path(model["path"], model["revision"])
    prepared = prepared_data(config)
    measure = preparation(find(config["strategy"]["name"]))
    if measure is not None:
        base = base_of(config, shapes_of(model), measured=False)
        keys = schema.pick(measure, config["strategy"])
        config["strategy"] |= measure(base, model["path"], run_dir, launcher.workers(), **keys)
    report = json.loads((prepared / "data_report.json").read_text(encoding="utf-8"))
    if report["validation"] == 0:
        if config["eval"]["samples"]:
            raise UserError("eval.samples: no row is held out; set data.validation_share or data.validation")
        config["train"]["eval_strategy"] = "no"
        print("no row is held out: no held-out loss", flush=True)
    made = plan(config, rows=report["train_rows"], examples=report["train"], measured=True)
    print(
        f"data: {report['train']:,} rows to train on, {report['validation']:,} held out; {made['arithmetic'][-1]}",
        flush=True,
    )
    if config["engine"]["name"] not in ("single", "ddp"):
        function = launcher.engine_function(config["engine"]["name"])
        rundir.write_json(run_dir / "deepspeed.json", function(**config["engine"]))
    rundir.write_json(run_dir / "data_report.json", report)
    rundir.write_json(run_dir / "env.json", rundir.environment())
    rundir.write_json(run_dir / "plan.json", {**made, "prepared": str(prepared), "id": uuid.uuid4().hex[:12]})
    rundir.write_yaml(run_dir / "config.yaml", config)
    page.write(run_dir)


def finish(run_dir: Path) -> None:
    """What follows training: the evaluation, if rows were asked for, and the run's page."""
    wanted = rundir.read_config(run_dir)["eval"]
    if wanted["samples"]:
        evaluate(run_dir, wanted)
    page.write(run_dir)


def is_preference(data: dict[str, Any]) -> bool:
    """Whether `data:` says that its rows are preferences; `ftdist data` prepares them, no task trains on them yet."""
    path = data["path"]
    parts = [part for part in path if isinstance(part, dict)] if isinstance(path, list) else []
    return "preference" in (data["format"], *(part.get("format") for part in parts))


def prepared_data(config: dict[str, Any], preference: bool = False) -> Path:
    """The prepared data set of this configuration, made now or found in the cache."""
    return prepare(
        **config["data"],
        tokenizer_path=models.local_path(config["model"]["path"], config["model"]["revision"]),
        revision=config["model"]["revision"],
        trust_remote_code=config["model"]["trust_remote_code"],
        max_length=config["train"]["max_length"],
        packing=config["train"]["packing"],
        task="dpo" if preference else config["task"]["name"],
        seed=config["seed"],
        cache_dir=rundir.cache_root() / "data",
    )


def shapes_of(model: dict[str, Any]) -> Shapes:
    """The shapes of the model that `model:` names; the demo model is made on the way."""
    path = models.local_path("demo", None) if model["path"] == "demo" else model["path"]
    return model_shapes(
        path,
        model["architecture"],
        revision=model["revision"],
        trust_remote_code=model["trust_remote_code"],
        need_weights=True,
    )


def base_of(config: dict[str, Any], shapes: Shapes, measured: bool) -> Base:
    """What the strategy may know."""
    dtype = precision(config["train"])
    stage = stage_of(config["engine"]["name"])
    return Base(shapes.architecture.parameters, dtype, storage(stage, dtype), measured)


def recipe_of(config: dict[str, Any], shapes: Shapes, measured: bool) -> Recipe:
    """What the strategy answers for this model and engine."""
    function = find(config["strategy"]["name"])
    return function(base_of(config, shapes, measured), **schema.pick(function, config["strategy"]))


def stage_of(engine: str) -> int:
    """ZeRO stage of an engine, 0 without ZeRO."""
    return int(engine[4]) if engine.startswith("zero") else 0


def storage(stage: int, dtype: str) -> str:
    """Element type that holds 4-bit weights: ZeRO-3 shards only what looks like the other weights."""
    return dtype if stage == 3 else "uint8"


def precision(train: dict[str, Any]) -> str:
    """Element type of the computation."""
    return "bfloat16" if train["bf16"] else "float16" if train.get("fp16") else "float32"


def _named(path: Any, examples: int | None) -> list[str]:
    parts = path if isinstance(path, list) else [path]
    names = [str(part["path"] if isinstance(part, dict) else part) for part in parts]
    return names if examples is None else [*names, f"{examples:,} rows"]


def _cpu_has_bf16() -> bool:
    """Whether the processor multiplies bfloat16 by itself; without, it is slower than float32."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "amx_bf16" in flags or "avx512_bf16" in flags
