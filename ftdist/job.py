"""A configuration → a finished run: check, plan, prepare, freeze, launch, evaluate. One function a step."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from ftdist import (
    align,
    chat,
    checkpoint,
    forecast,
    forgetting,
    health,
    judge,
    launcher,
    lease,
    models,
    page,
    report,
    rundir,
    schedule,
    schema,
    start,
    stops,
    tracking,
    trainkeys,
    unread,
)
from ftdist import base as bases
from ftdist import evaluate as evaluation
from ftdist import scheduler as slurm
from ftdist.data.prepare import prepare
from ftdist.errors import FAILED, FENCED, OK, STOPPED, USAGE, Failed, UserError
from ftdist.export import export
from ftdist.plan import Plan, kernels
from ftdist.plan import examples as look
from ftdist.plan.activations import family
from ftdist.plan.batch import Filling, batch_arithmetic, filling
from ftdist.plan.hardware import hardware
from ftdist.plan.shapes import Shapes, model_shapes
from ftdist.spectrum import reader
from ftdist.strategies import Base, Recipe, find, preparation

GROUPS = ("train", "model", "data", "task", "strategy", "engine", "cluster", "hardware", "checkpoint", "stopping",
          "health", "forgetting", "eval", "export", "chat", "tracking")  # fmt: skip
ROLL_BACKS = 3  # from one checkpoint, before it is given up
ASKED = ".asked.json"  # the configuration as it was asked for, before anything was prepared
AUTOMATIC = ("bf16", "gradient_checkpointing")  # keys of `train` that the plan decides when they are null
FILES = {
    "config.yaml": "the resolved configuration",
    "plan.json": "this plan",
    "accelerate.yaml": "how the processes start",
    "env.json": "versions, commit, machine",
    "base.json": "hash of every weight file of the base",
    "metrics.jsonl": "a line for each logged step",
    "checkpoints/": "committed states to go on from",
    "events.jsonl": "starts, checkpoints, stops, faults",
    "logs/": "what each rank said",
    "README.md": "the run's page",
    "final/": "the trained model or adapter, with its tokenizer",
}


def _top(
    *,
    run_dir: str | None,
    resume: Literal["never", "auto"],
    train_until: str | None,
    must_fit: bool,
    then: list[str] | None,
    seed: Annotated[int, Field(ge=0, lt=2**32)],
) -> None:
    """The keys outside every group."""


def _task(*, name: Literal["sft", "dpo"]) -> None:
    """The keys of `task=sft`."""


def check(config: dict[str, Any]) -> None:
    """Every key of every group against what reads it; UserError names the first that nothing would read."""
    schema.check("", {k: v for k, v in config.items() if k not in GROUPS}, _top)
    trainkeys.check({k: v for k, v in config["train"].items() if not (k in AUTOMATIC and v is None)})
    schema.check(
        "model", config["model"], models.load, model_keys, context=("quantization", "loaded_dtype", "overrides")
    )
    schema.check("data", config["data"], prepare, context=DATA_CONTEXT)
    align.refuse_by_name(config["task"])
    schema.check("task", config["task"], align.settings if config["task"].get("name") == "dpo" else _task)
    if config["task"]["name"] == "dpo":
        align.check(config["task"], config["train"], config["model"])
        if config["data"]["replay"] is not None:
            raise UserError(f"data.replay={config['data']['replay']}: task=dpo learns from pairs, replayed rows are "
                            "none; leave it out, or replay in the task=sft run before it")  # fmt: skip
    schema.check("checkpoint", config["checkpoint"], checkpoint.settings)
    schema.check("health", config["health"], health.settings)
    schema.check("stopping", config["stopping"], judge.settings)
    schema.check("forgetting", config["forgetting"], forgetting.function(config["forgetting"].get("name")))
    stops.Limit(config["train_until"])
    evaluation.check(config["eval"])
    schema.check("export", config["export"], export)
    schema.check("chat", config["chat"], chat.settings)
    check_cluster(config["cluster"])
    schema.check("hardware", config["hardware"], hardware, context=forecast.context())
    engine = launcher.engine_function(config["engine"].get("name"))
    schema.check("engine", config["engine"], engine)
    engine(**config["engine"])  # looks at the keys for DeepSpeed
    schema.check("tracking", config["tracking"], tracking.function(config["tracking"].get("name")))
    pairs = config["task"]["name"] == "dpo"
    judge.check(
        config["stopping"],
        eval_strategy=config["train"]["eval_strategy"],
        schedule=config["train"]["lr_scheduler_type"],
        logging_steps=float(config["train"]["logging_steps"]),
        eval_steps=config["train"].get("eval_steps"),
        retention=[evaluation.of_set(name) for name in evaluation.retention_sets(config["eval"]["retention"])],
        replay=config["data"]["replay"] is not None,
        saves=config["engine"]["name"] != "zero3_nvme",
        held_out=("loss", *(align.MEANS if pairs else ("perplexity",)), *evaluation.recorded(config["eval"])),
        training=align.MEANS if pairs else (),
    )
    keys = {k: v for k, v in config["strategy"].items() if k != "name"}
    strategy = find(config["strategy"].get("name"))
    schema.check("strategy", keys, *filter(None, (strategy, preparation(strategy))))
    unread.check(config)


def check_cluster(cluster: dict[str, Any]) -> None:
    """Every key of `cluster`; those of SLURM only where it is chosen."""
    queue = (slurm.options, slurm.setup, slurm.in_task, slurm.in_job, slurm.submission, slurm.array)
    more = queue if cluster.get("name") == "slurm" else ()
    schema.check("cluster", cluster, launcher.processes, *more, context=("here",))


def per_node(cluster: dict[str, Any], here: bool) -> int:
    """Processes on each node. here: they are to start on this machine, if `cluster` is one machine."""
    keys = schema.pick(launcher.processes, cluster)
    return launcher.processes(**keys, here=here and cluster["name"] != "slurm")


DATA_CONTEXT = ("tokenizer_path", "revision", "trust_remote_code", "max_length", "packing", "task", "seed",
                "cache_dir")  # fmt: skip


Dropout = Annotated[float, Field(ge=0, lt=1)]


def model_keys(
    *,
    path: str,
    architecture: dict[str, Any] | None,
    adapter: Literal["merge", "continue"],
    dropout: Dropout | dict[str, Dropout] | None,
) -> None:
    """The keys of `model` that the plan reads; adapter: what becomes of the one that a run in `path` left."""


def plan(
    config: dict[str, Any],
    report: dict[str, Any] | None = None,
    measured: bool = False,
    shapes: Shapes | None = None,
    filled: Filling | None = None,
    held_out_tokens: int = 0,
    base_tokens: int = 0,
) -> Plan:
    """What would run, with the arithmetic. Loads no torch, no weights, no data; `config` was completed by `decide`.

    report: of the prepared data, if they are prepared; measured: the strategy has prepared what it needs;
    shapes: of the model, if they are known already (then nothing is asked that was asked before), and with them
    filled: how long rows are that are not packed; held_out_tokens: what an evaluation while training reads;
    base_tokens: what is read once, before the first step.
    """
    from ftdist.plan.advice import advice
    from ftdist.plan.refuse import refuse
    from ftdist.plan.trainable import trainable_parameters, trained_tensors

    dpo = config["task"]["name"] == "dpo"
    if is_preference(config["data"]) and not dpo:
        raise UserError(
            "data.format=preference: task=sft learns from answers, not from pairs of them; use task=dpo (`ftdist data` "
            "prepares them without a task)"
        )
    if dpo and config["data"]["format"] not in ("auto", "preference"):
        raise UserError(
            f"data.format={config['data']['format']}: task=dpo learns from chosen and rejected answers; use "
            "data.format=preference, or task=sft"
        )
    asked = shapes is None
    train, engine = config["train"], config["engine"]["name"]
    count = per_node(config["cluster"], here=False)
    available, kind = launcher.devices()
    local, run_dir = config["cluster"]["name"] != "slurm", Path(config["run_dir"])
    devices = forecast.target(config, count * config["cluster"]["nodes"])
    shapes = shapes or shapes_of(config["model"])
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
        gpu=devices.gpu,
        gpu_has_bf16=None if devices.capability is None else devices.capability >= kernels.AMPERE,
        optim=train["optim"],
        bf16=bool(train["bf16"]),
        fp16=bool(train.get("fp16")),
        gradient_checkpointing=train["gradient_checkpointing"],
        max_length=train["max_length"],
        packing=train["packing"],
        profile=bool(train.get("profile")),
        torch_compile=bool(train.get("torch_compile")),
        liger=bool(train.get("use_liger_kernel")),
    )
    forgets = config["forgetting"]["name"] != "none"
    if forgetting.is_on(config["forgetting"]):
        forgetting.refuse(config["forgetting"], engine, recipe.peft, shapes.model_type, look=not measured)
        if recipe.peft is not None:
            made_here, unfrozen = trained_tensors(shapes, peft=dict(recipe.peft), trainable=None)
            others = [*(name for name in made_here if name not in shapes.architecture.linear), *unfrozen]
            forgetting.refuse_no_matrices(config["forgetting"], others)
    by_type = trainable_parameters(shapes, peft=dict(recipe.peft) if recipe.peft else None, trainable=recipe.trainable)
    guess = None
    if report is not None:
        rows, examples = report["train_rows"], report["train"]
        filled = None if train["packing"] else filling(report)
    else:
        rows = examples = None
    if report is None and asked:
        examples = look.count(config["data"]["path"])
        held_out = 0.0 if config["data"]["validation"] else config["data"]["validation_share"]
        guess = look.estimated(config["data"]["path"], examples, train["max_length"], train["packing"], held_out)
        if guess is not None and config["data"]["replay_share"] is not None:
            guess = max(round(guess / (1 - config["data"]["replay_share"])), 1)
        filled = _filled(config, examples)
    batch = batch_arithmetic(
        per_device_train_batch_size=train["per_device_train_batch_size"],
        gradient_accumulation_steps=train["gradient_accumulation_steps"],
        processes=count,
        nodes=config["cluster"]["nodes"],
        max_length=train["max_length"],
        packing=train["packing"],
        rows=rows or guess,
        num_train_epochs=train["num_train_epochs"],
        max_steps=train["max_steps"],
        about=guess is not None,
        sequences_per_row=2 if dpo else 1,
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
        "devices": f"{kind}s, {available} here" if config["hardware"]["name"] == "auto" and local else devices.name,
        "sequences_per_step": batch.sequences_per_step,
        "tokens_per_step": batch.tokens_per_step,
        "arithmetic": batch.arithmetic,
        "choices": kernels.all_of(
            train,
            config["model"]["attn_implementation"],
            gpu=devices.gpu,
            capability=devices.capability,
            parameters=total,
            takes=shapes.architecture.attention,
        ),
        "files": FILES
        | ({"deepspeed.json": "DeepSpeed's settings"} if stage else {})
        | (
            {"fisher/": "which weights general data need, and where they were"}
            if forgetting.is_on(config["forgetting"])
            else {}
        ),
        "command": [launcher.command(run_dir, alone=count == 1) if local else ["sbatch", str(run_dir / slurm.SCRIPT)]],
        **({"forgetting": forgetting.said(config["forgetting"], recipe.peft is not None)} if forgets else {}),
        "advice": advice(
            strategy=config["strategy"]["name"],
            examples=examples,
            parameters=total,
            processes=count,
            nodes=config["cluster"]["nodes"],
            device_bytes=devices.memory if devices.gpu else None,
        ),
        "stage": stage,
        "storage": storage(stage, dtype),
        # Under torch's autocast trained weights stay in float32; DeepSpeed keeps its own float32 copies.
        "loaded": "float32" if whole and not stage else dtype,
        "trained": dtype if stage else "float32",
        "adapters": recipe.peft is not None,
    }
    if dpo:
        made["reference"] = align.reference_kind(
            config["task"], recipe.peft is not None, config["model"]["adapter"] == "continue"
        )
    if batch.steps_per_epoch is not None:
        made["steps_per_epoch"] = batch.steps_per_epoch
    if batch.total_steps is not None:
        made["total_steps"] = batch.total_steps
        made["steps_are_a_guess"] = guess is not None and train["max_steps"] <= 0
    dropouts = models.dropouts(shapes.config, config["model"]["dropout"])
    trained = replace(shapes, config=shapes.config | dropouts) if dropouts else shapes
    made |= forecast.forecast(config, trained, recipe, made, batch.total_steps, filled)
    if made.get("reference") == "cached" and report is not None:
        made["disk_bytes"]["reference"] = align.column_bytes(report["train_rows"], report["validation"])
    if dpo and (sorts := {name for name, _ in align.weighted_losses(config["task"])} & set(align.SORTED)):
        made["notes"].append(
            f"task.loss_type={min(sorts)}: sorts the {train['per_device_train_batch_size']} pairs of a rank's "
            "micro-batch, so the loss depends on how a step's pairs are divided"
        )
    if train.get("profile"):
        made["notes"].append("train.profile: what the trace of two steps takes is not counted")
    if batch.total_steps is not None and held_out_tokens:
        made["evaluations"] = forecast.evaluations(train, batch.total_steps, batch.steps_per_epoch)
        # a forward pass, of the three that training a token costs
        read = made["evaluations"] * held_out_tokens + base_tokens
        made["evaluation_seconds"] = read / made["tokens_per_second"] / 3
    if not local:
        told = devices.gpu or devices.calibrated  # a processor's time is known by its order alone
        took = None
        if told and "total_seconds" in made:
            took = made["total_seconds"] + made.get("evaluation_seconds", 0.0)
        longest = slurm.longest(config["cluster"]["partition"]) if took is not None else None
        made["asks"] = slurm.wanted(made["host_peak_bytes_per_node"], took, longest)
    percent = asked and config["strategy"].get("top_percent") and recipe.trainable is not None
    if percent and made["fits"] is not None and family(shapes.config):  # each trial would be traced
        made["largest_top_percent"] = forecast.largest_percent(config, _planner(shapes, report, measured, filled), {})
    if asked and made["fits"] is False:
        made["fixes"] = forecast.fixes(config, _planner(shapes, report, measured, filled),
                                       count * config["cluster"]["nodes"])  # fmt: skip
    return made  # type: ignore[return-value]


def _planner(
    shapes: Shapes,
    report: dict[str, Any] | None = None,
    measured: bool = False,
    filled: Filling | None = None,
) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Plans other configurations of the same model and data, without their answers."""
    return lambda config: dict(plan(config, report=report, measured=measured, shapes=shapes, filled=filled))


def _filled(config: dict[str, Any], examples: int | None) -> Filling | None:
    """How long the rows seem to be, before they are prepared; None where they are packed, or nobody knows."""
    if config["train"]["packing"]:
        return None
    sequences = 2 if config["task"]["name"] == "dpo" else 1
    return look.filling(config["data"]["path"], examples, config["train"]["max_length"], sequences)


def fitted(config: dict[str, Any]) -> dict[str, Any]:
    """The plan of the fastest configuration that fits with the same global batch, and its `overrides`."""
    world = per_node(config["cluster"], here=False) * config["cluster"]["nodes"]
    filled = _filled(config, look.count(config["data"]["path"]))
    found = forecast.fit(config, _planner(shapes_of(config["model"]), filled=filled), world)
    if found is None:
        raise UserError(f"--fit: nothing fits {world} of hardware={config['hardware']['name']} with this strategy and "
                        "global batch; ftdist plan without --fit lists what would")  # fmt: skip
    return {**plan(forecast.changed(config, found)), "overrides": forecast.words(found)}


def scaling(config: dict[str, Any], sizes: list[int]) -> list[dict[str, Any]]:
    """How the run scales over numbers of devices."""
    world = per_node(config["cluster"], here=False) * config["cluster"]["nodes"]
    filled = _filled(config, look.count(config["data"]["path"]))
    return forecast.sizes(config, _planner(shapes_of(config["model"]), filled=filled), world, sizes)


def decide(config: dict[str, Any]) -> None:
    """Check every key, then fill what was left to the program: precision, recomputation, the run directory's name."""
    check(config)
    if config["cluster"]["name"] == "slurm":
        settle(config["cluster"], config["hardware"]["name"])
    start.check(config["model"], config["strategy"])
    train = config["train"]
    devices = forecast.target(config, 1)
    gpu, capability = devices.gpu, devices.capability
    fp16 = bool(train.get("fp16"))
    if train["bf16"] is None:
        train["bf16"] = kernels.bf16(gpu=gpu, capability=capability, fp16=fp16).value
    if config["model"]["dropout"] is not None:
        models.dropouts(shapes_of(config["model"]).config, config["model"]["dropout"])
    if train["gradient_checkpointing"] is None:
        train["gradient_checkpointing"] = kernels.recomputation(
            gpu=gpu, parameters=lambda: shapes_of(config["model"]).total
        ).value
    if config["model"]["attn_implementation"] == "auto":
        config["model"]["attn_implementation"] = kernels.attention(
            gpu=gpu,
            capability=capability,
            sixteen_bits=train["bf16"] or fp16,
            takes=lambda: shapes_of(config["model"]).architecture.attention,
        ).value
    if config["run_dir"] is None:
        config["run_dir"] = rundir.fresh_name(config["model"]["path"], config["strategy"]["name"])


def settle(cluster: dict[str, Any], hardware_name: str) -> None:
    """Numbers in place of `auto` for a job of SLURM."""
    keys = schema.pick(slurm.resolved, cluster)
    cluster |= slurm.resolved(**keys, cpu=hardware_name == "cpu", known=hardware_name != "auto")


def ready(config: dict[str, Any], known: dict[str, Any] | None = None) -> dict[str, Any]:
    """Refuse, before anything is made, what is wrong or cannot work on this machine; the plan.

    known: the plan of another member of a sweep, which is this one's too.
    """
    refuse_nameless(config)
    decide(config)
    per_node(config["cluster"], here=True)
    shapes_of(config["model"], need_weights=True)
    kind = launcher.devices()[1]
    if (
        config["cluster"]["name"] != "slurm"
        and config["hardware"]["name"] != "auto"
        and forecast.target(config, 1).gpu != (kind == "GPU")
    ):
        raise UserError(
            f"hardware={config['hardware']['name']}: this machine has {kind}s; leave it out (ftdist plan takes it)"
        )
    made = known or dict(plan(config))
    if known is None:
        forecast.refuse_what_cannot_fit(made, config["must_fit"])
    place = next(folder for folder in Path(config["run_dir"]).absolute().parents if folder.is_dir())
    forecast.refuse_without_disk(made, config["run_dir"], shutil.disk_usage(place).free, config["must_fit"])
    return made


def refuse_nameless(config: dict[str, Any]) -> None:
    """UserError where a run is to go on, and nobody says which."""
    if config["resume"] == "auto" and config["run_dir"] is None:
        raise UserError("resume=auto: go on with which run? set run_dir=DIR")


def run(config: dict[str, Any], run_dir: Path) -> None:
    """Prepare, freeze, launch and evaluate one configuration in a run directory of its own."""
    with rundir.claimed(run_dir) as token:
        freeze(config, run_dir)
    try:
        launch(run_dir, token)
    finally:
        lease.release(run_dir, token)


def launch(
    run_dir: Path, token: int, start: Callable[[], None] | None = None, end: Callable[[], None] | None = None
) -> None:
    """Start a frozen run or go on with it, again after failures if that is wanted, and evaluate what came out.

    start: starts the ranks and waits for them, as launcher.run does it on this machine; end: what `finish` does.
    """
    config = rundir.read_config(run_dir)
    count = per_node(config["cluster"], here=start is None)
    rundir.write_yaml(
        run_dir / "accelerate.yaml",
        launcher.accelerate_file(config["engine"]["name"], count, run_dir / "deepspeed.json"),
    )
    start = start or partial(launcher.run, run_dir, count, token, config["health"]["grace_seconds"])
    nodes = config["cluster"]["nodes"]
    world = f"{count} process" + ("es" if count > 1 else "") + (f" on each of {nodes} nodes" if nodes > 1 else "")
    print(f"starting {world} ({config['engine']['name']}) in {run_dir}", flush=True)
    if config["engine"]["name"] == "zero3_nvme":
        print("engine=zero3_nvme: no checkpoints; a run that is stopped begins again", flush=True)
    keys, restarts, rolled_back = config["health"], 0, 0
    while True:
        before = _progress(run_dir)
        try:
            start()
            break
        except Failed as failure:
            if rundir.left_out(run_dir) != before[1]:  # a roll-back: the last checkpoint, without that step
                rolled_back = rolled_back + 1 if checkpoint.steps(run_dir)[:1] == before[0] else 1
                if rolled_back > ROLL_BACKS:
                    raise Failed(f"{failure}; {rolled_back} times now without a checkpoint in between", FENCED)
            else:
                asked, stuck = (run_dir / stops.REQUEST).exists(), _progress(run_dir) == before
                if failure.status == FAILED and (stuck or asked or restarts >= keys["max_restarts"]):
                    rundir.record(run_dir, token, "failed", None, reason=str(failure))
                if failure.status != FAILED or asked or restarts >= keys["max_restarts"]:
                    raise
                if stuck:
                    raise Failed(f"{failure}; not started again: no checkpoint since the last start", FENCED)
                restarts += 1
            rundir.record(run_dir, token, "restart", None, reason=str(failure))
            print(f"{failure}\nstarting again", flush=True)
    conclude(run_dir, token, end or partial(finish, run_dir))


def conclude(run_dir: Path, token: int, end: Callable[[], None]) -> None:
    """What follows training (`end`); outcome.json tells how that went, instead of how the last try had."""
    before = launcher.outcome_of(run_dir)

    def told(name: str, reason: str | None, status: int) -> None:
        with lease.guarded(run_dir, token):
            outcome = {**before, "outcome": name, "reason": reason, "status": status}
            rundir.write_json(run_dir / "outcome.json", outcome)

    try:
        end()
    except Exception as failure:
        status = USAGE if isinstance(failure, UserError) else getattr(failure, "status", FAILED)
        told("stopped" if status == STOPPED else "failed", f"evaluation: {failure}", status)
        raise
    if before.get("status") != OK:
        told("finished", None, OK)


def _progress(run_dir: Path) -> tuple[list[int], list[int]]:
    """What rises when a run gets on: its checkpoints, and the steps that it has learnt to leave out."""
    return checkpoint.steps(run_dir)[:1], rundir.left_out(run_dir)


def freeze(config: dict[str, Any], run_dir: Path) -> None:
    """Prepare model files and data, then write down everything that the ranks will read, config.yaml last."""
    rundir.write_json(run_dir / ASKED, config)
    model, train = config["model"], config["train"]
    schedule.check(train["lr_scheduler_type"], train.get("lr_scheduler_kwargs") or {}, train["learning_rate"])
    start.settle(model, run_dir)
    model["path"] = models.local_path(model["path"], model["revision"])
    shapes_of(model, need_weights=True)
    other = other_reference(config, run_dir)
    weights = bases.fingerprint(model["path"])
    prepared = prepared_data(config, run_dir=run_dir)
    general = general_data(config, forgetting.identity(weights["files"]), run_dir)
    measure = preparation(find(config["strategy"]["name"]))
    if measure is not None:
        base = base_of(config, shapes_of(model), measured=False)
        keys = schema.pick(measure, config["strategy"])
        config["strategy"] |= measure(base, model["path"], run_dir, launcher.workers(), **keys)
    report = json.loads((prepared / "data_report.json").read_text(encoding="utf-8"))
    if report["validation"] == 0:
        if config["eval"]["samples"]:
            raise UserError("eval.samples: no row is held out; set data.validation_share or data.validation")
        if config["eval"]["during"]:
            raise UserError("eval.during: no row is held out; set data.validation_share or data.validation")
        config["train"] |= {"eval_strategy": "no", "eval_steps": None}
        try:
            check({**config, "run_dir": str(run_dir)})  # what needs an evaluation cannot be
        except UserError as failure:
            raise UserError(f"no row is held out (set data.validation_share or data.validation): {failure}")
        print("no row is held out: no held-out loss", flush=True)
    retention = evaluation.retention_data(config, run_dir)
    evaluation.refuse_preferences(config, run_dir)
    evaluation.refuse_overlap(config["eval"], prepared, config["model"], retention)
    kept = evaluation.tokens_while_training(config, retention)
    made = plan(
        config,
        report=report,
        measured=True,
        held_out_tokens=report["validation_tokens"] + kept,
        base_tokens=kept,
    )
    print(
        f"data: {report['train']:,} rows to train on{_general(report)}, {report['validation']:,} held out; "
        f"{made['arithmetic'][-1]}",
        flush=True,
    )
    rundir.write_json(run_dir / "data_report.json", report)
    rundir.write_json(run_dir / bases.FILE, weights)
    rundir.write_json(run_dir / "env.json", rundir.environment())
    if "reference" in made:
        # the base's files and its adapter are what training starts from, and with it the reference, unless it is other
        adapter = start.adapter(run_dir)
        begins = [weights["files"], reader.digest(adapter / start.WEIGHTS) if adapter else None, other]
        quantization = recipe_of(config, shapes_of(model), measured=True).quantization
        computed = [
            made["precision"],
            made["loaded"],
            model["dtype"],
            dict(quantization or {}),
            model["attn_implementation"],
        ]
        made["reference_key"] = align.key(begins, prepared.name, computed)
    frozen = {"prepared": str(prepared), "retention": retention, "fisher_data": general, "id": uuid.uuid4().hex[:12]}
    rundir.write_json(run_dir / "plan.json", {**made, **frozen})
    write_engine(config, run_dir)
    rundir.write_yaml(run_dir / "config.yaml", config)
    page.write(run_dir)


def _general(report: dict[str, Any]) -> str:
    replay = report.get("replay")
    return f" ({replay['rows']:,} of them general, {replay['share']:.2%} of the tokens)" if replay else ""


def write_engine(config: dict[str, Any], run_dir: Path) -> None:
    """DeepSpeed's settings, for an engine that has some."""
    file = run_dir / "deepspeed.json"
    if config["engine"]["name"] in ("single", "ddp"):
        file.unlink(missing_ok=True)
    else:
        rundir.write_json(file, launcher.engine_function(config["engine"]["name"])(**config["engine"]))


def finish(run_dir: Path) -> None:
    """What follows training: the evaluation, if one was asked for, and the run's page."""
    config = rundir.read_config(run_dir)
    measured(run_dir)
    if evaluation.afterwards(config["eval"], config["stopping"]):
        evaluation.evaluate(run_dir, config["eval"])
        if config["tracking"]["name"] == "wandb":
            report.write([run_dir])
            tracking.results(run_dir, config, run_dir / "plots")
    page.write(run_dir)


def measured(run_dir: Path) -> None:
    """Add to the plan what the ranks measured, in the plan's own names."""
    plan = json.loads((run_dir / "plan.json").read_text(encoding="utf-8"))
    ranks = [json.loads(file.read_text(encoding="utf-8")) for file in (run_dir / "logs").glob("rank-*.memory.json")]
    if not ranks:
        return
    ranks.sort(key=lambda rank: rank["rank"])
    tops = [max(rank["peak_bytes"].values()) + rank["outside_bytes"] for rank in ranks]
    times = [rank["step_seconds"] for rank in ranks if rank["step_seconds"]]
    found: dict[str, Any] = {"device_peak_bytes": max(tops), "states": _counted(ranks), "ranks": ranks}
    if ranks[0]["device"] == "cpu":  # a rank's device is the host's memory
        found["host_peak_bytes_per_node"] = sum(tops) // plan["nodes"]
    else:
        found["host_peak_bytes_per_node"] = sum(rank["host_peak_bytes"] for rank in ranks) // plan["nodes"]
    if times:
        found["seconds_per_step"] = max(times)
        found["tokens_per_second"] = plan["real_tokens_per_step"] / max(times)
    rundir.write_json(run_dir / "plan.json", {**plan, "measured": found})


def _counted(ranks: list[dict[str, Any]]) -> dict[str, int]:
    """Bytes of live tensors by kind on the rank that holds most, named as the plan's `states`."""
    counted: dict[str, int] = {}
    for rank in ranks:
        tensors = dict(rank["tensors"].get("between", {}))
        if "backward" in rank["tensors"]:
            tensors["gradients_in_backward"] = rank["tensors"]["backward"]["gradients"]
        for kind, size in tensors.items():
            counted[kind] = max(counted.get(kind, 0), size)
    return counted


def is_preference(data: dict[str, Any]) -> bool:
    """Whether `data:` says that its rows are preferences."""
    path = data["path"]
    parts = [part for part in path if isinstance(part, dict)] if isinstance(path, list) else []
    return "preference" in (data["format"], *(part.get("format") for part in parts))


def other_reference(config: dict[str, Any], run_dir: Path) -> dict[str, Any] | None:
    """Settle `task.reference_model`, if there is one: its directory, and the hashes of its files."""
    task, model = config["task"], config["model"]
    if task.get("reference_model") is None:
        return None
    path = task["reference_model"]
    try:
        directory = str(start.whole(path)) if start.is_run(path) else models.local_path(path, None)
    except UserError as failure:
        raise UserError(str(failure).replace("model.path=", "task.reference_model="))
    own = str(start.adapter(run_dir) or model["path"])
    start.same_tokenizer(own, directory, "task.reference_model", model["trust_remote_code"])
    task["reference_model"] = directory
    files: dict[str, Any] = bases.fingerprint(directory)["files"]
    return files


def prepared_data(config: dict[str, Any], preference: bool = False, run_dir: Path | None = None) -> Path:
    """The prepared data set of this configuration, made now or found in the cache. run_dir: of a run that exists."""
    path = config["model"]["path"]
    tokenizer = start.adapter(run_dir) if run_dir else None
    if tokenizer is None and start.is_run(path):
        tokenizer = start.tokenizer_directory(path)
    return prepare(
        **config["data"],
        tokenizer_path=str(tokenizer or models.local_path(path, config["model"]["revision"])),
        revision=config["model"]["revision"],
        trust_remote_code=config["model"]["trust_remote_code"],
        max_length=config["train"]["max_length"],
        packing=config["train"]["packing"],
        task="dpo" if preference else config["task"]["name"],
        seed=config["seed"],
        cache_dir=rundir.cache_root() / "data",
    )


def general_data(config: dict[str, Any], model: str, run_dir: Path) -> str | None:
    """The prepared data that a Fisher is to be measured on, one sequence a row; None where none is.

    model: identity of the weights; UserError if a Fisher is given that is of others, or an earlier one that is of a
    model from which this one does not come.
    """
    keys = config["forgetting"]
    if not forgetting.is_on(keys):
        if keys["name"] == "ewc":
            print(forgetting.said(keys, False), flush=True)
        return None
    if keys["earlier"] is not None or keys["fisher"] is not None:
        going_on = forgetting.begins(run_dir)
        peft = recipe_of(config, shapes_of(config["model"]), measured=False).peft
        start_here = model, config["model"]["path"], going_on
        own = forgetting.of_adapters(keys, peft, config["seed"], going_on)
    if keys["earlier"] is not None:
        forgetting.refuse_a_stranger(keys["earlier"], *start_here, own)
    if keys["fisher"] is not None:
        forgetting.refuse_another_model(keys["fisher"], *start_here, own)
        return None
    data = {**config["data"], "path": keys["data"], "validation": None, "validation_share": 0.0, "against": None}
    data |= {"replay": None, "replay_share": None, "format": "auto", "columns": {}, "mask": "auto"}
    data |= dict.fromkeys(("min_answer", "max_answer", "max_repetition", "max_markup", "scripts"))
    try:
        texts = {"data": data, "task": {"name": "sft"}, "train": {**config["train"], "packing": False}}
        return str(prepared_data({**config, **texts}, run_dir=run_dir))
    except UserError as failure:
        raise UserError(f"forgetting.data={keys['data']}: {failure}")


def shapes_of(model: dict[str, Any], need_weights: bool = False) -> Shapes:
    """The shapes of the model that `model:` names, from config.json; the demo model is made on the way."""
    made_here = model["path"] == "demo" or start.is_run(model["path"])
    path = models.local_path(model["path"], None) if made_here else model["path"]
    return model_shapes(
        path,
        model["architecture"],
        revision=model["revision"],
        trust_remote_code=model["trust_remote_code"],
        need_weights=need_weights,
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
