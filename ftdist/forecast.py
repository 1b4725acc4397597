"""What a configuration needs and how long it takes: from its keys to the arithmetic of `plan/`, and the answers.

Like `job.py` this stands at the border: configurations come in, plain numbers go to `plan/`.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import version
from typing import Any

from ftdist import evaluate as evaluation
from ftdist import forgetting, launcher, rundir, start
from ftdist import scheduler as slurm
from ftdist.errors import UserError
from ftdist.plan.activations import family
from ftdist.plan.batch import Filling
from ftdist.plan.hardware import Hardware, elsewhere, hardware, sliced
from ftdist.plan.memory import Case, Memory, disk_bytes, need, standing, zero_sizes
from ftdist.plan.shapes import Shapes, model_shapes
from ftdist.plan.speed import duration, step
from ftdist.plan.states import WIDTH, Held, quantized_bytes, quantized_modules
from ftdist.plan.trainable import held_tensors
from ftdist.strategies import Recipe

IN_32_BIT = ("adamw_torch", "adamw_torch_fused", "paged_adamw", "paged_adamw_32bit")
SHARDING = ("ddp", "zero1", "zero2", "zero3", "zero3_offload")  # from the fastest to the thriftiest
NODE = 8  # devices of a node, where a plan asks for more than one node's
COMMON_HOST = 2e12  # bytes of a node with eight GPUs: NVIDIA DGX H100 user guide; more is not there by itself
HEADROOM = 0.97  # of a device's memory; the rest goes to fragments and to what the driver keeps

Plan = dict[str, Any]
Planner = Callable[[dict[str, Any]], Plan]


def target(config: dict[str, Any], world: int) -> Hardware:
    """The devices that this configuration is planned for."""
    cluster, values, cores = config["cluster"], config["hardware"], launcher.cores()
    here = cluster["nodes"] == 1 and values["name"] in ("auto", "cpu") and cluster["name"] != "slurm"
    if cluster["name"] == "slurm":
        values, cores = _in_queue(values, cluster), cluster["cpus"] or cluster["processes"]
    return hardware(**values, here=here, world=world, cores=cores, ask=launcher.gpu_facts)


def _in_queue(values: dict[str, Any], cluster: dict[str, Any]) -> dict[str, Any]:
    """The hardware that SLURM will give; its memory limit is the host's."""
    kind = None
    if cluster["gpus"] and (values["name"] == "auto" or cluster["gpu_type"]):
        asked = (cluster["partition"], cluster["constraint"], None)
        kind = cluster["gpu_type"] or slurm.chosen_gpus(*asked)[1] or ""
    if values["name"] == "auto":
        values = elsewhere(values, kind)
    if part := slurm.SLICE.search(kind or ""):
        values = sliced(values, int(part[1]), int(part[2]))
    limit = slurm.memory_bytes(cluster["memory"])
    values = {**values, "host_memory": values["host_memory"] or limit}
    return {**values, "memory": values["memory"] or limit} if values["name"] == "cpu" else values


def context() -> tuple[str, ...]:
    """Parameters of `hardware` that are the program's."""
    return ("here", "world", "cores", "ask")


def case_of(config: dict[str, Any], shapes: Shapes, recipe: Recipe, facts: dict[str, Any], devices: Hardware) -> Case:
    """The configuration as plain numbers. facts: what the plan has decided already."""
    train, engine = config["train"], config["engine"]
    section: dict[str, Any] = {}
    if facts["stage"]:
        section = launcher.engine_function(engine["name"])(**engine)["zero_optimization"]
    peft = dict(recipe.peft) if recipe.peft else None
    quantized: set[str] = set()
    double = False
    if recipe.quantization is not None:
        quantized = quantized_modules(shapes.architecture, recipe.quantization.get("llm_int8_skip_modules"))
        double = bool(recipe.quantization.get("bnb_4bit_use_double_quant"))
    held = tuple(held_tensors(shapes, peft=peft, trainable=recipe.trainable, quantized=quantized))
    offload = {
        part: (section.get(f"offload_{part}") or {}).get("device", "none") not in ("none", None)
        for part in ("optimizer", "param")
    }
    world = facts["processes"] * facts["nodes"]
    hidden, layers, vocabulary = _sizes(shapes)
    dtype = config["model"]["dtype"]
    dpo = config["task"]["name"] == "dpo"
    return Case(
        held=held,
        family=family(shapes.config),
        traced=None,
        vocabulary=vocabulary,
        hidden=hidden,
        layers=layers,
        tied=bool(shapes.architecture.tied),
        stage=facts["stage"],
        offload_optimizer=offload["optimizer"],
        offload_parameters=offload["param"],
        nvme=engine["name"] == "zero3_nvme",
        world=world,
        processes=facts["processes"],
        dtype=facts["precision"],
        loaded=facts["loaded"] if dtype == "auto" else dtype,
        trained=facts["trained"],
        storage=facts["storage"],
        double_quantization=double,
        optim=train["optim"],
        batch=train["per_device_train_batch_size"] * (2 if dpo else 1),
        accumulation=train["gradient_accumulation_steps"],
        length=train["max_length"],
        packed=bool(train["packing"]),
        attention=_attention(config["model"]["attn_implementation"]),
        checkpointing=bool(train["gradient_checkpointing"]),
        adapters=peft is not None,
        magnitude=bool((peft or {}).get("use_dora")),
        dropout=0.0 if dpo and config["task"]["disable_dropout"] else float((peft or {}).get("lora_dropout") or 0.0),
        eval_batch=train["per_device_eval_batch_size"] * (2 if dpo else 1),
        generation=(config["eval"]["batch_size"], config["eval"]["max_new_tokens"])
        if evaluation.afterwards(config["eval"], config["stopping"])
        else None,
        answers=(min(config["eval"]["batch_size"], math.ceil(during / world)), config["eval"]["max_new_tokens"])
        if (during := config["eval"]["during"])
        else None,
        gpu=devices.gpu,
        runtime=devices.runtime,
        zero=zero_sizes(section, hidden) if section else (),
        fused=not any(h.name.startswith("lm_head.lora_") for h in held),  # an adapter has a forward of its own
        background=config["checkpoint"]["background"],
        experts=_experts(shapes),
        stored=shapes.dtype if shapes.dtype in WIDTH else facts["loaded"],
        penalty=forgetting.planned(config["forgetting"], peft is not None),
        each=dpo,
        reference=facts.get("reference", "none"),
        reference_bytes=_reference_bytes(config, held, facts, double) if dpo else 0,
    )


def _reference_bytes(config: dict[str, Any], held: tuple[Held, ...], facts: dict[str, Any], double: bool) -> int:
    """Of a frozen model beside the trained one: its copy, or another one, loaded as the trained one is."""
    other = config["task"]["reference_model"]
    if other is None and facts["reference"] != "copy":
        return 0
    dtype = config["model"]["dtype"]
    width = WIDTH[facts["loaded"] if dtype == "auto" else dtype]
    if other is not None:
        try:
            path = str(start.shapes_directory(other)) if start.is_run(other) else other
            known = model_shapes(path, None, revision=None, trust_remote_code=config["model"]["trust_remote_code"])
        except UserError as failure:
            raise UserError(str(failure).replace("model.path=", "task.reference_model="))
        return known.total * width
    goes_on = config["model"]["adapter"] == "continue"
    copied = [h for h in held if goes_on or ".lora_" not in h.name]
    return sum(
        sum(quantized_bytes(h.numel, facts["storage"], double)) if h.quantized else h.numel * width for h in copied
    )


def forecast(
    config: dict[str, Any],
    shapes: Shapes,
    recipe: Recipe,
    facts: dict[str, Any],
    steps: int | None,
    filled: Filling | None,
) -> Plan:
    """The plan's numbers of memory, disk, time and money.

    steps: of the whole run, if known; filled: how long the rows are, if they are not packed and it is known.
    """
    devices = target(config, facts["processes"] * facts["nodes"])
    case = case_of(config, shapes, recipe, facts, devices)
    if case.family is None:
        case = replace(case, traced=_traced(case, shapes, config["model"]["trust_remote_code"]))
    memory = need(case)
    tokens, length = float(facts["tokens_per_step"]), float(case.length)
    if filled is not None:
        tokens, length = tokens * min(filled.tokens / length, 1.0), min(filled.padded(case.batch), length)
    speed = step(case, devices, tokens, length)
    made: Plan = {
        "device_peak_bytes": memory.device_peak,
        "band_bytes": memory.band,
        "host_peak_bytes_per_node": memory.host_peak,
        "checkpoint_bytes": case.checkpoint,
        "disk_bytes": disk_bytes(
            case,
            memory.states,
            None if steps is None else int(steps * tokens),
            _kept(config["checkpoint"], config["stopping"]["restore_best"], steps),
        ),
        "real_tokens_per_step": round(tokens),
        "tokens_per_second": speed.tokens_per_second,
        "seconds_per_step": speed.seconds,
        "step_bound_by": speed.bound,
        "mfu": speed.mfu,
        "time_calibrated": devices.calibrated,
        "hardware": {
            "name": devices.name,
            "memory": devices.memory,
            "host_memory": devices.host_memory,
            "devices": case.world,
        },
        "phases": memory.device,
        "host_phases": memory.host,
        "states": standing(case, memory.states),
        "notes": list(memory.notes),
    }
    made |= _verdict(memory, devices, case)
    if steps is not None:
        took = duration(speed, steps, case.world, devices.price_per_hour)
        made["total_seconds"] = took.seconds
        made["checkpoints"] = 0 if case.nvme else _written(config["checkpoint"], steps, took.seconds)
        if took.cost is not None:
            made["cost"] = took.cost
    return made


def evaluations(train: dict[str, Any], steps: int, steps_per_epoch: int | None) -> int:
    """How often the held-out rows are read while `steps` steps are trained."""
    if train["eval_strategy"] == "no":
        return 0
    if train["eval_strategy"] == "epoch":
        return math.ceil(steps / (steps_per_epoch or steps))
    every = train.get("eval_steps") or train["logging_steps"]
    return int(steps // (every if every >= 1 else max(math.ceil(every * steps), 1)))


def _kept(keys: dict[str, Any], restores_best: bool, steps: int | None) -> int:
    """Checkpoints that `checkpoint:` keeps; those of `keep_every` as far as the number of steps is known."""
    lasting = (steps or 0) // keys["keep_every"] if keys["keep_every"] else 0
    return int(keys["keep_last"] + max(keys["keep_best"], restores_best) + lasting)


def _written(keys: dict[str, Any], steps: int, took: float) -> int:
    """Checkpoints by step and by the clock; those at a best held-out loss, a stop or the end come on top."""
    by_step = steps // keys["every_steps"] if keys["every_steps"] else 0
    return by_step + (int(took / 60 / keys["every_minutes"]) if keys["every_minutes"] else 0)


def _verdict(memory: Memory, devices: Hardware, case: Case) -> Plan:
    """fits: True, False, or None where a memory is not known; the margin is that of the scarcer memory."""
    margins: list[tuple[int, str, int]] = []
    if devices.gpu and devices.memory is not None:
        margins.append((int(devices.memory * HEADROOM) - memory.device_peak, "device", memory.band))
    host = devices.host_memory if devices.gpu else devices.memory
    if host is not None:
        band = memory.band * case.processes if not devices.gpu else memory.host_peak // 10
        margins.append((host - memory.host_peak, "host", band))
    if not margins:
        return {"fits": None, "margin_bytes": None, "scarce": None, "certain": False}
    # what surely does not fit decides, then what fits least surely
    margin, which, band = min(margins, key=lambda m: (m[0] + m[2] >= 0, m[0] - m[2]))
    certain = abs(margin) > band
    if host is None and margin >= 0 and memory.host_peak > COMMON_HOST:
        certain = False  # no node is known to have that
    return {"fits": margin >= 0, "margin_bytes": margin, "scarce": which, "certain": certain}


def refuse_what_cannot_fit(plan: Plan, must_fit: bool) -> None:
    """UserError if the plan is sure that the run does not fit; a line of warning where it is not sure."""
    if plan["fits"] is None or (plan["fits"] and plan["certain"]):
        return
    which = "device" if plan["scarce"] == "device" else "host"
    needed = plan["device_peak_bytes"] if which == "device" else plan["host_peak_bytes_per_node"]
    has = needed + plan["margin_bytes"]
    words = f"{_gb(needed)} of {which} memory needed at the peak, {_gb(has)} there"
    if plan["fits"] or not plan["certain"]:
        print(f"warning: {words}: within the plan's error, it may not fit", flush=True)
        return
    fixes = plan.get("fixes") or []
    fix = f"; this fits: {' '.join(fixes[0]['overrides'])}" if fixes else "; nothing that is known here makes it fit"
    if must_fit:
        raise UserError(f"the run does not fit: {words}{fix} (must_fit=false starts it all the same)")
    print(f"warning: the run does not fit: {words}{fix}", flush=True)


def refuse_without_disk(plan: Plan, run_dir: str, free: int, must_fit: bool) -> None:
    """UserError if the disk cannot hold the final model with one checkpoint; a warning if not all that are kept.

    free: bytes, where the run directory will be.
    """
    disk, one = plan["disk_bytes"], plan["checkpoint_bytes"]
    least = disk["final"] + one + disk["fisher"]
    most = least + disk["checkpoints"]
    if free >= most:
        return
    text = (
        f"{_gb(free)} free for the run directory, {_gb(least)} needed for a checkpoint and the final model, "
        f"{_gb(most)} while another is written beside those that are kept"
    )
    fewer = free >= least and disk["checkpoints"] > one
    fix = "; choose another, on a larger disk" + (", or checkpoint.keep_last=1" if fewer else "")
    if free >= least or not must_fit:
        print(f"warning: the disk: {text}{fix}", flush=True)
        return
    raise UserError(f"run_dir={run_dir}: the disk is too small: {text}{fix} (must_fit=false starts it all the same)")


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


# What would make it fit


def changed(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A copy of the configuration with `group.key` set; `engine` and `strategy` are choices."""
    made = copy.deepcopy(config)
    for key, value in changes.items():
        group, _, name = key.partition(".")
        if not name and group in ("engine", "strategy"):
            if group == "engine":
                zero = {"zero": dict(config["engine"].get("zero", {}))}
                made["engine"] = {"name": value} | ({} if value in ("single", "ddp") else zero)
            else:
                made["strategy"] = _strategy(value)
        elif not name:
            made[group] = value
        else:
            *path, last = name.split(".")
            place = made[group]
            for part in path:
                place = place[part]
            place[last] = value
    return made


def _strategy(name: str) -> dict[str, Any]:
    return copy.deepcopy(_composed(name))


@functools.cache
def _composed(name: str) -> dict[str, Any]:
    """The keys of a strategy as it ships; composing takes a quarter of a second, and a plan tries several."""
    from ftdist.compose import compose

    keys: dict[str, Any] = compose("plan", [f"strategy={name}", "model.path=x", "data.path=x"])[0]["strategy"]
    return keys


def _spelt(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The changes with the keys of a new strategy that the user's own words would set otherwise."""
    if "strategy" not in changes:
        return changes
    own = _strategy(changes["strategy"])
    differ = {f"strategy.{k}": v for k, v in own.items() if k != "name" and config["strategy"].get(k, v) != v}
    return {**changes, **differ}


def words(changes: dict[str, Any]) -> list[str]:
    """Overrides to paste."""
    plain = {key: value if isinstance(value, str) else json.dumps(value) for key, value in changes.items()}
    return [f"{'+' if '.zero.' in key else ''}{key}={value}" for key, value in plain.items()]


def _try(plan: Planner, config: dict[str, Any], changes: dict[str, Any]) -> Plan | None:
    try:
        return plan(changed(config, changes))
    except UserError:  # a combination that is refused for another reason
        return None


def _surely(plan: Plan) -> bool:
    """It fits by more than the plan's error, or nothing is known to compare with."""
    return plan["fits"] is None or bool(plan["fits"] and plan["certain"])


def _micro(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Smaller micro-batches with accumulation that keeps the global batch."""
    train = config["train"]
    size, times = train["per_device_train_batch_size"], train["gradient_accumulation_steps"]
    for smaller in range(size - 1, 0, -1):
        if size % smaller == 0:
            yield {
                "train.per_device_train_batch_size": smaller,
                "train.gradient_accumulation_steps": times * size // smaller,
            }


def _engines(config: dict[str, Any], world: int) -> list[str]:
    """Engines that need less of a device than this one."""
    name = config["engine"]["name"]
    if world == 1:  # sharding over one rank costs a copy and saves nothing, offloading does
        plain = ["single"] if name in ("zero1", "zero2", "zero3") else []
        return [] if name.endswith(("offload", "nvme")) else [*plain, "zero3_offload"]
    if name not in SHARDING:
        return []
    return list(SHARDING[SHARDING.index(name) + 1 :])


def _small_buffers(config: dict[str, Any], engine: str) -> dict[str, Any]:
    """Smaller pieces for DeepSpeed's copies in a step; nothing where the user has said how large."""
    key, size = ("sub_group_size", 100_000_000) if engine == "zero3" else ("reduce_bucket_size", 50_000_000)
    return {} if key in config["engine"].get("zero", ()) else {f"engine.zero.{key}": size}


def fixes(config: dict[str, Any], plan: Planner, world: int, most: int = 6) -> list[Plan]:
    """What makes the configuration fit, the cheapest first: what keeps the training the same, then what changes it,
    then more devices. Each is overrides to paste with the plan's numbers."""
    found: list[Plan] = []
    smallest = list(_micro(config))[-1:] or [{}]
    recompute: dict[str, Any] = (
        {} if config["train"]["gradient_checkpointing"] else {"train.gradient_checkpointing": True}
    )
    best: dict[str, Any] = {}  # the thriftiest of the levers that change nothing in the result
    train = config["train"]
    rows = train["per_device_train_batch_size"] * train["gradient_accumulation_steps"] * world

    def enough(changes: dict[str, Any]) -> bool:
        made = _try(plan, config, changes)
        return made is not None and _surely(made)

    def consider(changes: dict[str, Any], says: str) -> bool:
        if not changes or len(found) >= most:
            return False
        changes = _spelt(config, changes)
        made = _try(plan, config, changes)
        if made is None or not _surely(made):
            return False
        if made["sequences_per_step"] != rows:
            says += f", {made['sequences_per_step']} sequences a step instead of {rows}"
        found.append(
            {
                "overrides": words(changes),
                "says": says,
                "device_peak_bytes": made["device_peak_bytes"],
                "host_peak_bytes_per_node": made["host_peak_bytes_per_node"],
                "seconds_per_step": made["seconds_per_step"],
            }
        )
        return True

    if config["eval"]["samples"]:  # one device answers, after training, with the whole model
        consider({"eval.samples": 0}, "no answers after training; ftdist eval RUN where the model fits one device")
    if config["train"]["per_device_eval_batch_size"] > 1:
        consider({"train.per_device_eval_batch_size": 1}, "held-out rows one at a time")
    micro = any(consider(change, "the same global batch in smaller pieces") for change in _micro(config))
    again = consider(recompute, "recomputation, about a third more time")
    best = {**recompute, **smallest[0]}
    if not (micro or again) and recompute and smallest[0]:
        consider(best, "recomputation and smaller pieces")
    short = bool(best) and not enough(best)  # what changes nothing in the result is there, and does not do
    stage = config["engine"]["name"][:5]
    small = _small_buffers(config, stage) if stage.startswith("zero") else {}
    if small and not consider(small, "smaller buffers of DeepSpeed's") and short:
        consider({**best, **small}, "smaller buffers of DeepSpeed's, recomputation, smaller pieces")
    how = {"zero3_offload": "weights and optimizer states in the host's memory", "single": "nothing to shard over"}
    for name in _engines(config, world):
        says = how.get(name, "sharded further")
        alone = consider({"engine": name}, says)
        if not alone and short:
            alone = consider({"engine": name, **best}, f"{says}, recomputation, smaller pieces")
        if alone:
            break
    stronger = next(iter(reversed([n for n in _engines(config, world) if "offload" not in n])), None)
    sharded = {"engine": stronger, **best} if stronger else best
    if config["train"]["optim"] in IN_32_BIT and not config["engine"]["name"].endswith("load"):
        eight = {"train.optim": "adamw_8bit"}
        if not consider(eight, "optimizer states in 8 bit") and sharded and not enough(sharded):
            consider({**sharded, **eight}, "and optimizer states in 8 bit")
    name = config["strategy"]["name"]
    if name == "spectrum" and config["strategy"].get("top_percent"):
        percent = largest_percent(config, plan, sharded)
        if percent and percent < config["strategy"]["top_percent"]:
            consider({**sharded, "strategy.top_percent": percent}, "fewer layers trained")
    if name == "full" and not found:
        if config["train"]["optim"] not in IN_32_BIT[:2]:  # DeepSpeed updates on the host with its own AdamW alone
            consider({"engine": "zero3_offload", "train.optim": "adamw_torch"}, "AdamW's states in the host's memory")
        _ = (
            consider({"strategy": "spectrum"}, "a quarter of the layers trained")
            or consider({**sharded, "strategy": "spectrum"}, "a quarter of the layers trained")
            or consider({**sharded, "strategy": "lora"}, "adapters instead of whole weights")
        )
    if name != "qlora" and not found:
        consider({**sharded, "strategy": "qlora"}, "4-bit base with adapters") or consider(
            {**best, "engine": "zero3", "strategy": "qlora"} if world > 1 else {}, "4-bit base, sharded"
        )
    length = config["train"]["max_length"]
    while not found and length >= 512:
        length //= 2
        consider({**sharded, "train.max_length": length}, "shorter sequences")
    if len(found) < 2:
        for changes in _more(config, world):
            extra = {} if config["engine"]["name"].startswith("zero3") else {"engine": "zero3"}
            if consider(changes, "more devices") or consider({**best, **extra, **changes}, "more devices, sharded"):
                break
    return found


def _more(config: dict[str, Any], world: int) -> Iterator[dict[str, Any]]:
    devices = world
    while devices < 64:
        devices *= 2
        yield scaled(config, world, devices)


def scaled(config: dict[str, Any], world: int, devices: int) -> dict[str, Any]:
    """Changes for `devices` devices, alike on every node: the same global batch as far as it divides."""
    nodes = next(nodes for nodes in range(math.ceil(devices / NODE), devices + 1) if devices % nodes == 0)
    changes: dict[str, Any] = {"cluster.processes": devices // nodes}
    if nodes > 1 or config["cluster"]["nodes"] > 1:
        changes["cluster.nodes"] = nodes
    if config["engine"]["name"] == "single" and devices > 1:
        changes["engine"] = "ddp"
    train = config["train"]
    rows = train["per_device_train_batch_size"] * train["gradient_accumulation_steps"] * world
    micro = train["per_device_train_batch_size"]
    while micro > 1 and rows % (micro * devices):
        micro -= 1
    changes["train.per_device_train_batch_size"] = micro
    changes["train.gradient_accumulation_steps"] = max(rows // (micro * devices), 1)
    return changes


def largest_percent(config: dict[str, Any], plan: Planner, others: dict[str, Any]) -> int | None:
    """The largest whole Spectrum percentage that fits, None if not even one does."""
    low, high = 0, 99
    while low < high:
        middle = (low + high + 1) // 2
        made = _try(plan, config, {**others, "strategy.top_percent": middle})
        if made is not None and made["fits"]:
            low = middle
        else:
            high = middle - 1
    return low or None


def fit(config: dict[str, Any], plan: Planner, world: int) -> dict[str, Any] | None:
    """What changes `config` to the fastest that fits on the same devices with the same global batch, or None.

    Tried: every engine that shards, micro-batches that divide the rows of a rank, with and without recomputation; if
    none fits, smaller buffers of DeepSpeed's, optimizer states in 8 bit, then in the host's memory.
    """
    train = config["train"]
    rows = train["per_device_train_batch_size"] * train["gradient_accumulation_steps"]
    sizes = [size for size in range(min(rows, 64), 0, -1) if rows % size == 0]
    plain = [name for name in SHARDING if "offload" not in name] if world > 1 else ["single"]
    small = {name: _small_buffers(config, name) for name in plain if name.startswith("zero")}
    rounds: list[dict[str, dict[str, Any]]] = [dict.fromkeys(plain, {}), {k: v for k, v in small.items() if v}]
    if train["optim"] in IN_32_BIT:
        rounds.append({name: {"train.optim": "adamw_8bit"} for name in plain})
    rounds.append({"zero3_offload": {}})
    for engines in rounds:
        best: tuple[float, dict[str, Any]] | None = None
        for name, extra in engines.items():
            for recompute in (False, True):
                for size in sizes:
                    changes = {
                        "engine": name,
                        "train.per_device_train_batch_size": size,
                        "train.gradient_accumulation_steps": rows // size,
                        "train.gradient_checkpointing": recompute,
                        **extra,
                    }
                    made = _try(plan, config, changes)
                    if made is None or not _surely(made):
                        continue
                    if best is None or made["tokens_per_second"] > best[0]:
                        best = made["tokens_per_second"], changes
                    break  # smaller micro-batches of the same engine are not faster
        if best:
            return best[1]
    return None


def sizes(config: dict[str, Any], plan: Planner, world: int, wanted: list[int]) -> list[Plan]:
    """How the run scales: a row for each number of devices."""
    rows = []
    train = config["train"]
    same = train["per_device_train_batch_size"] * train["gradient_accumulation_steps"] * world
    for devices in wanted:
        changes = scaled(config, world, devices) if devices != world else {}
        made = plan(changed(config, changes))
        rows.append(
            {
                "devices": devices,
                "nodes": made["nodes"],
                "fits": made["fits"],
                "device_peak_bytes": made["device_peak_bytes"],
                "sequences_per_step": made["sequences_per_step"],
                "same_batch": made["sequences_per_step"] == same,
                "tokens_per_step": made["tokens_per_step"],
                "tokens_per_second": made["tokens_per_second"],
                "mfu": made["mfu"],
                "seconds_per_step": made["seconds_per_step"],
                "overrides": words(changes),
            }
        )
    return rows


# Architectures without a closed form


def _sizes(shapes: Shapes) -> tuple[int, int, int]:
    """Hidden size, layers, vocabulary: from config.json under their usual names, else from the shapes."""
    config = shapes.config.get("text_config") or shapes.config
    rows, columns = next(iter(shapes.architecture.embeddings.values()), (1, 1))
    hidden = next((config[k] for k in ("hidden_size", "n_embd", "d_model") if isinstance(config.get(k), int)), columns)
    layers = next(
        (config[k] for k in ("num_hidden_layers", "n_layer", "num_layers") if isinstance(config.get(k), int)), 1
    )
    return hidden, layers, rows


def _experts(shapes: Shapes) -> int:
    """Experts of a layer that a token goes through; 0 where there is no mixture."""
    known = family(shapes.config)
    if known:
        return known.experts_per_token
    config = shapes.config.get("text_config") or shapes.config
    return next((config[k] for k in ("num_experts_per_tok", "moe_k") if isinstance(config.get(k), int)), 0)


def _attention(implementation: str) -> str:
    return "flash_attention" if implementation.startswith("flash") else implementation


def _traced(case: Case, shapes: Shapes, trust_remote_code: bool) -> tuple[int, int]:
    """Bytes that one micro-batch keeps and its peak, without the loss: traced once for a shape, then from a cache."""
    facts = [
        shapes.config, case.batch, case.length, case.dtype, case.checkpointing, case.attention, case.adapters,
        sorted(h.name for h in case.held if h.trained) if not case.adapters else None,
        version("transformers"), version("torch"),
    ]  # fmt: skip
    key = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
    file = rundir.cache_root() / "activations" / f"{key}.json"
    try:
        kept, peak = json.loads(file.read_text(encoding="utf-8"))
        return int(kept), int(peak)
    except (OSError, ValueError):
        pass
    from ftdist.plan.trace import meta

    trained = None if case.adapters else {h.name for h in case.held if h.trained}
    kept, peak = meta(
        shapes.config,
        shapes.directory,
        trust_remote_code,
        batch=case.batch,
        length=case.length,
        dtype=case.dtype,
        attention=case.attention,
        recompute=case.checkpointing,
        trained=trained,
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    rundir.write_json(file, [kept, peak])
    return kept, peak


__all__ = ["Held", "case_of", "context", "fit", "fixes", "forecast", "refuse_what_cannot_fit", "sizes", "target"]
