"""Going on with a run: what may be different this time, and how the global batch stays what it was."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from ftdist import base as bases
from ftdist import checkpoint, compose, evaluate, forgetting, job, lease, rundir
from ftdist.errors import OK, UserError

# Where and how a run is trained may change; what is trained, on what, and with which arithmetic may not.
CHANGEABLE = ("cluster", "engine", "checkpoint", "health", "tracking", "eval", "train_until")
MICRO_BATCH = "train.per_device_train_batch_size"
BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")


def begun(run_dir: Path, asked: dict[str, Any]) -> bool:
    """Whether `run_dir` holds a run to go on with. What a start left that was killed while it prepared is removed.

    UserError if the run is another one than `asked` for.
    """
    if (run_dir / "config.yaml").is_file():
        before = json.loads((run_dir / job.ASKED).read_text(encoding="utf-8"))
        now = json.loads(json.dumps(asked))
        for key in _differences(before, now):
            if key.partition(".")[0] not in (*CHANGEABLE, "resume", "run_dir") and key != MICRO_BATCH:
                old, new = _at(before, key), _at(now, key)
                raise UserError(
                    f"{key}={new}: the run in {run_dir} was started with {old}; use that to go on, "
                    "or another run_dir for a new run"
                )
        return True
    rundir.clear_unfinished(run_dir)
    return False


def from_words(run_dir: Path, words: list[str]) -> int:
    """`ftdist resume RUN [overrides]`; the exit status. A run of SLURM gets a new job."""
    config = rundir.read_config(run_dir)
    for word in words:
        key = word.partition("=")[0].lstrip("+~")
        if "=" not in word or (key.partition(".")[0] not in CHANGEABLE and key != MICRO_BATCH):
            raise UserError(
                f"{word}: cannot change in a run that has begun; what can: {', '.join(CHANGEABLE)}, {MICRO_BATCH}"
            )
    if words:
        reword(config, words)
    if config["cluster"]["name"] == "slurm":
        from ftdist import submit

        job.check({**config, "run_dir": str(run_dir)})
        job.settle(config["cluster"], config["hardware"]["name"])
        return submit.again(run_dir, config)
    resume(run_dir, config)
    return OK


def reword(config: dict[str, Any], words: list[str]) -> None:
    """Set what overrides say in a configuration that is resolved already. UserError for those that mean nothing."""
    given = [word.partition("=")[0] for word in words]
    kept = [f"{group}={config[group]['name']}" for group in ("engine", "cluster") if group not in given]
    if config["engine"].get("nvme_path") and "engine" not in given:
        kept.append(f"engine.nvme_path={config['engine']['nvme_path']}")
    (composed,) = compose.compose("train", [*kept, *words])
    for key in given:
        _set(config, key, _at(composed, key))


def resume(run_dir: Path, wanted: dict[str, Any]) -> None:
    """Go on with the run as `wanted` has it. A run that was only to be evaluated is evaluated."""
    with lease.held(run_dir) as token:
        if (run_dir / "final").is_dir():
            asked = evaluate.afterwards(wanted["eval"], wanted["stopping"])
            if asked and not (run_dir / "eval" / "metrics.json").is_file():
                job.conclude(run_dir, token, partial(job.finish, run_dir))
            print("nothing to train: the run is finished", flush=True)
            return
        changed(run_dir, wanted)
        steps = checkpoint.steps(run_dir)
        newest = f"newest checkpoint: step {steps[0]}" if steps else "no step was trained: from the beginning"
        print(f"going on with {run_dir} ({newest})", flush=True)
        job.launch(run_dir, token)


def changed(run_dir: Path, wanted: dict[str, Any], here: bool = True) -> None:
    """Write down what is different, if anything, with the same global batch.

    here: the processes will start on this machine. UserError where the run cannot go on so.
    """
    config = rundir.read_config(run_dir)
    before = json.loads((run_dir / "plan.json").read_text(encoding="utf-8"))
    sets = config["eval"]["retention"]
    report = json.loads((run_dir / "data_report.json").read_text(encoding="utf-8"))
    for key in CHANGEABLE:
        config[key] = wanted[key]
    job.check({**config, "run_dir": str(run_dir)})
    world = job.per_node(config["cluster"], here=here) * config["cluster"]["nodes"]
    micro = wanted["train"]["per_device_train_batch_size"]
    batch = dict(zip(BATCH, rebatch(before["sequences_per_step"], world, micro), strict=True))
    config["train"] |= batch
    if not Path(before["prepared"]).is_dir():
        prepared = job.prepared_data(config, run_dir=run_dir)
        if str(prepared) != before["prepared"]:
            raise UserError(
                f"data.path: the data of {run_dir} are gone from the cache, and the files are not what they were; "
                "bring them back to go on"
            )
    general = before["fisher_data"]
    if general and not Path(general).is_dir() and not (run_dir / forgetting.FOLDER).is_dir():
        weights = json.loads((run_dir / bases.FILE).read_text(encoding="utf-8"))
        again = job.general_data(config, forgetting.identity(weights["files"]), run_dir)
        if again != general:
            raise UserError(
                f"forgetting.data={config['forgetting']['data']}: gone from the cache before the Fisher was measured, "
                "and the files are not what they were; bring them back to go on"
            )
    if config["eval"]["retention"] != sets or not all(Path(folder).is_dir() for folder in before["retention"].values()):
        now = evaluate.retention_data(config, run_dir)
        if evaluate.retention_while_training(config["eval"], config["stopping"]):
            refuse_other_sets(config["eval"]["retention"], before["retention"], now)
        before["retention"] = now
        evaluate.refuse_overlap(config["eval"], Path(before["prepared"]), config["model"], before["retention"])
    kept = evaluate.tokens_while_training(config, before["retention"])
    held_out = report["validation_tokens"] + kept
    made = job.plan(config, report=report, measured=True, held_out_tokens=held_out)
    job.write_engine(config, run_dir)
    rundir.write_json(run_dir / "plan.json", {**before, **made})
    rundir.write_yaml(run_dir / "config.yaml", config)


def refuse_other_sets(named: Any, before: dict[str, str], now: dict[str, str]) -> None:
    """UserError if general data are not those on which the base was measured. before, now: name → prepared folder."""
    if {name: Path(folder).name for name, folder in now.items()} != {n: Path(f).name for n, f in before.items()}:
        raise UserError(
            f"eval.retention={named}: other data than those on which the base was measured before the first step, and "
            "this run has left the base behind; bring those back to go on"
        )


def rebatch(rows: int, world: int, micro_batch: int) -> tuple[int, int]:
    """(micro-batch, accumulation) that make `rows` per step on `world` processes; the micro-batch at most that given.

    UserError if no such numbers exist.
    """
    if rows % world:
        fitting = [n for n in range(1, rows + 1) if rows % n == 0]
        raise UserError(
            f"cluster.processes: {world} processes cannot make this run's global batch of {rows} rows; "
            f"numbers that can: {', '.join(map(str, fitting))}"
        )
    share = rows // world
    micro = next(n for n in range(min(micro_batch, share), 0, -1) if share % n == 0)
    return micro, share // micro


def _differences(before: Any, now: Any, prefix: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [*before, *(key for key in now if key not in before)]
        return [d for key in keys for d in _differences(before.get(key), now.get(key), f"{prefix}{key}.")]
    return [] if before == now else [prefix.rstrip(".")]


def _at(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = config.get(part) if isinstance(config, dict) else None
    return config


def _set(config: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for part in parents:
        config = config.setdefault(part, {})
    config[last] = value
