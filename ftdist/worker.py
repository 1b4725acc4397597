"""One training process: what every rank does, in order. Start reading here.

Started as `python -m ftdist.worker RUN` by a launcher that sets RANK, WORLD_SIZE and the rendezvous. All that it
needs is in the run directory; it composes nothing and decides nothing that another rank might see otherwise.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ftdist import imports, judge, lease, rundir, schema, start, stops, trainkeys
from ftdist.errors import FAILED, OK, STOPPED, USAGE, Failed, UserError


def train(run_dir: Path) -> int:
    """Train the frozen run, or go on with it; leave its metrics and `final/`. The exit status: OK or STOPPED."""
    config = rundir.read_config(run_dir)
    plan = json.loads((run_dir / "plan.json").read_text(encoding="utf-8"))
    main = int(os.environ.get("RANK", "0")) == 0

    with imports.uncollected():
        import torch

        imports.bitsandbytes()
        from transformers import set_seed

        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        if importlib.util.find_spec("deepspeed"):
            importlib.import_module("deepspeed")  # accelerate imports it in any case
        from ftdist import evaluate, ewc, forgetting, keeper, models, parity, tracking
        from ftdist.data.rows import rows_of
        from ftdist.evaluate.during import Examiner
        from ftdist.evaluate.generate import positions_of
        from ftdist.health import Health
        from ftdist.judge import Judge
        from ftdist.measure import Meter
        from ftdist.plan.shapes import model_shapes
        from ftdist.ranks import Ranks
        from ftdist.save import save_final
        from ftdist.strategies import Base, find
        from ftdist.trainer import TokenTrainer, collate
        from ftdist.watch import Watch

    path, revision, remote = (config["model"][key] for key in ("path", "revision", "trust_remote_code"))
    arguments = training_arguments(run_dir, config, plan)  # first: under ZeRO-3 they make the model load sharded
    ranks = Ranks()
    watch = Watch(run_dir / "logs", ranks.rank, ranks.world, config["health"]["stall_minutes"], partial(fail, run_dir))
    token = keeper.token_of(run_dir, ranks)
    checkpoint = keeper.choose(run_dir, ranks, token, plan["id"])
    known = model_shapes(path, None, revision=revision, trust_remote_code=remote)
    shapes = known.architecture.parameters
    strategy = find(config["strategy"]["name"])
    base = Base(shapes, plan["precision"], plan["storage"], measured=True)
    recipe = strategy(base, **schema.pick(strategy, config["strategy"]))

    meter = Meter(int(os.environ.get("RANK", "0")))
    tokenizer = models.tokenizer(path, revision, remote)
    wanted = schema.pick(models.load, config["model"])
    dropouts = models.dropouts(known.config, config["model"]["dropout"])
    set_seed(config["seed"])  # adapters start from random numbers; the trainer seeds only itself
    model = models.load(**wanted, quantization=recipe.quantization, loaded_dtype=plan["loaded"], overrides=dropouts)
    model = models.apply(model, recipe, trained_dtype=plan["trained"], adapter=start.adapter(run_dir))
    if plan["adapters"] and arguments.gradient_checkpointing:
        model.enable_input_require_grads()  # a recomputed block needs an input with a gradient

    data = Path(plan["prepared"])
    sources = json.loads((data / "data_report.json").read_text(encoding="utf-8"))["sources"]
    general = frozenset(number for number, source in enumerate(sources) if source["kind"] == "replay")
    template = (data / "chat_template.jinja").read_text(encoding="utf-8")
    if template:
        tokenizer.chat_template = template  # the one that was trained on is the one that is saved
    judging = Judge(**config["stopping"])
    keep = keeper.Keeper(
        run_dir,
        ranks,
        token,
        {
            **{key: plan[key] for key in ("model", "strategy", "engine", "sequences_per_step", "id")},
            "versions": rundir.versions(),
        },
        plan["checkpoint_bytes"],
        stops.Limit(config["train_until"]),
        watch.progress,
        judging,
        **config["checkpoint"],
    )
    if checkpoint:
        keep.resume(*checkpoint)
    kind: Any = TokenTrainer
    pad_id = tokenizer.pad_token_id or 0
    collate_rows: Any = partial(collate, general=general)
    named: dict[str, Any] = {}
    if config["task"]["name"] == "dpo":
        from ftdist.align import setup

        kind, collate_rows, named = setup.dpo(run_dir, config, plan, token, recipe)
    with models.partly_quantized(model):
        trainer = kind(
            model=model,
            args=arguments,
            packing=config["train"]["packing"],
            loss_type=config["train"]["loss_type"],
            trainable=plan["trainable_parameters"],
            train_dataset=rows_of(data / "train"),
            eval_dataset=rows_of(data / "validation"),
            data_collator=partial(collate_rows, pad_id=pad_id),
            replay=bool(general),
            callbacks=list(recipe.callbacks),
            keeper=keep,
            health=Health(
                run_dir, token, main, **{key: config["health"][key] for key in schema.keys_of(Health.__init__)}
            ),
            **named,
        )
    trainer.sharded = plan["stage"] == 3
    trainer.text_collator = partial(collate, pad_id=pad_id)
    if evaluate.retention_while_training(config["eval"], config["stopping"]):
        trainer.retention = {
            f"eval_{evaluate.of_set(name)}_loss": rows_of(Path(folder) / "validation")
            for name, folder in plan["retention"].items()
        }
    if config["eval"]["during"]:
        trainer.examiner = Examiner(
            data, config["eval"]["during"], tokenizer, positions_of(model), config["seed"], config["eval"]
        )
    if forgetting.is_on(config["forgetting"]):
        if main:
            print(plan["forgetting"], flush=True)
        trainer.consolidation = ewc.Consolidation(
            run_dir,
            lambda: rows_of(Path(plan["fisher_data"]) / "train"),
            partial(meter.during, "fisher"),
            forgetting.facts(run_dir, plan, config["forgetting"], recipe.quantization, recipe.peft, config["seed"]),
            **schema.pick(ewc.Consolidation.__init__, config["forgetting"]),
        )
    if plan["stage"] and trainer.accelerator.distributed_type.value != "DEEPSPEED":
        raise RuntimeError("the launcher's environment keeps DeepSpeed out (unset ACCELERATE_USE_CPU)")

    meter.follow(trainer)
    if config["train"].get("profile"):  # a run of an older version has no such key
        from ftdist.profiling import Profile

        Profile(run_dir, ranks.rank).follow(trainer)
    finish = None
    if main:
        if checkpoint:
            rundir.record(run_dir, token, "resume", checkpoint[1]["step"], checkpoint=checkpoint[0].name)
            print(f"going on from {checkpoint[0].name}", flush=True)
            again = checkpoint[1]["evaluation_pending"] or checkpoint[1]["initial"]
            tracking.forget_after(run_dir, checkpoint[1]["step"], again)
        else:
            rundir.record(run_dir, token, "start", 0)
        log, finish = tracking.start(run_dir, config)
        trainer.add_callback(tracking.follow(run_dir, log, sys.stdout, token))
    trainer.train(resume_from_checkpoint=str(checkpoint[0]) if checkpoint else None)
    keep.close()
    watch.pause()
    final_step = trainer.state.global_step
    if keep.stopping is None:
        if config["stopping"]["restore_best"]:
            final_step = keep.restore_best()
        parity.record(trainer, run_dir, main)
        if plan["stage"] == 3:
            engine: Any = trainer.model_wrapped
            engine.empty_partition_cache()  # the last evaluation may have left prefetches in flight
        with meter.during("save"):
            save_final(trainer.accelerator.unwrap_model(trainer.model), tokenizer, path, run_dir / "final", main, token)
    keep.ended()
    meter.write(run_dir)
    if main:
        peaks = {f"memory/{phase}": peak for phase, peak in meter.peaks.items()}
        log({**peaks, "memory/predicted": plan["device_peak_bytes"]}, trainer.state.global_step)
        name = "finished" if keep.stopping is None else "stopped"
        rundir.record(run_dir, token, name, trainer.state.global_step, reason=keep.stopping)
        outcome = {"outcome": name, "reason": keep.stopping, "step": trainer.state.global_step}
        if keep.stopping is None:
            outcome |= {"final_step": final_step, "ended_early": judging.memory.stop}
        with lease.guarded(run_dir, token):
            rundir.write_json(run_dir / "outcome.json", {**outcome, "status": OK if keep.stopping is None else STOPPED})
    if finish:
        finish()
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    return OK if keep.stopping is None else STOPPED


def training_arguments(run_dir: Path, config: dict[str, Any], plan: dict[str, Any]) -> Any:
    """TRL's SFTConfig from `train:` and from what the plan decided."""
    import torch
    from trl import SFTConfig

    values = {key: value for key, value in config["train"].items() if key not in trainkeys.OWN}
    if values["gradient_checkpointing"]:
        # PEFT under ZeRO-3 recomputes wrongly without the reentrant kind (TRL issue 2514).
        values["gradient_checkpointing_kwargs"] = {
            "use_reentrant": plan["stage"] == 3 and plan["adapters"],
            **(values.get("gradient_checkpointing_kwargs") or {}),
        }
    if values.get("use_liger_kernel"):
        values["liger_kernel_config"] = {"cross_entropy": False, "fused_linear_cross_entropy": False}  # see loss.py
    if values.get("ddp_find_unused_parameters") is None:
        # Without it DDP regroups its buckets after a start's first step: over three ranks and more, sums would be made
        # in another order after a resume.
        values["ddp_find_unused_parameters"] = True
    if values["lr_scheduler_type"] in judge.PLATEAUS:
        stopping, keywords = config["stopping"], values.get("lr_scheduler_kwargs") or {}
        values["metric_for_best_model"] = stopping["metric"]  # what transformers gives the schedule
        if judge.sign(stopping["metric"], stopping["direction"]) < 0:
            values["lr_scheduler_kwargs"] = {"mode": "max", **keywords}
    settings = run_dir / "deepspeed.json"
    arguments = SFTConfig(
        **values,
        output_dir=str(run_dir),
        deepspeed=str(settings) if settings.is_file() else None,
        seed=config["seed"],
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        report_to="none",
        logging_nan_inf_filter=False,  # a NaN is shown as it is
        remove_unused_columns=False,
        disable_tqdm=True,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    if settings.is_file():
        import deepspeed
        from deepspeed.ops import __compatible_ops__ as compiled

        if not torch.cuda.is_available():
            # Shared-memory collectives for CPUs: compiled for half a minute at the first start; gloo is at hand.
            compiled["deepspeed_shm_comm"] = False
        deepspeed.init_distributed()  # sharded loading needs the world size that batch sizes are checked against
    return arguments


def main(run_dir: Path, at_failure: Callable[[], None] | None = None) -> int:
    """Run `train`, keep this rank's output and error in `logs/`, and answer with an exit status.

    A failure ends the process; `at_failure` is called just before.
    """
    rank = int(os.environ.get("RANK", "0"))
    os.umask(rundir.PRIVATE)
    os.environ.setdefault(stops.STARTED, str(time.time()))
    logs = run_dir / "logs"
    logs.mkdir(exist_ok=True)
    log = logs / f"rank-{rank}.log"
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    console = os.dup(sys.stderr.fileno())
    os.dup2(descriptor, sys.stderr.fileno())
    if rank != 0:
        os.dup2(descriptor, sys.stdout.fileno())
    # A rank whose launcher is gone has nobody who would stop it: save and end with the parent (Linux, 1 = PDEATHSIG).
    ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGTERM)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    stops.listen(partial(fail, run_dir))
    try:
        return train(run_dir)
    except Exception as failure:
        traceback.print_exc()
        text = str(failure).strip().splitlines() or [""]
        known = isinstance(failure, (UserError, Failed))
        message = text[0] if known else f"{type(failure).__name__}: {text[0]}"
        status = USAGE if isinstance(failure, UserError) else getattr(failure, "status", FAILED)
        os.write(console, f"ftdist: rank {rank}: {message} (log: {log})\n".encode())
        fail(run_dir, message, status)
        # Not sys.exit: other threads and atexit hooks of a half-made process group can hang for minutes.
        sys.stderr.flush()
        if at_failure:
            at_failure()
        os._exit(status)


def fail(run_dir: Path, message: str, status: int = FAILED, signalled: str | None = None) -> None:
    """Leave this rank's last word for whoever started it. signalled: by which signal it was ended."""
    rank = int(os.environ.get("RANK", "0"))
    logs = run_dir / "logs"
    report = {"rank": rank, "time": time.time(), "message": message, "log": str(logs / f"rank-{rank}.log"),
              "node": os.environ.get("SLURMD_NODENAME"), "lease": os.environ.get(lease.VARIABLE)}  # fmt: skip
    with contextlib.suppress(OSError):  # a full disk, perhaps the very reason
        rundir.write_json(logs / f"rank-{rank}.error.json", {**report, "status": status, "signal": signalled})


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
