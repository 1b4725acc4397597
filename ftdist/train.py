"""For people who start every rank themselves: accelerate launch --config_file launch/zero3.yaml -m ftdist.train …

Global rank 0 composes, plans, prepares and freezes; the others wait at the launcher's store for the name of the one
run directory. Then every rank is the same worker as under `ftdist train`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from ftdist import cli, lease, rundir, stops
from ftdist.errors import INTERRUPTED, OK, USAGE, Failed, UserError
from ftdist.rundir import PRIVATE

ONE = "a launcher runs one configuration: leave out -m and --cfg, or use ftdist train"
WAIT = timedelta(days=1)  # for the data to be prepared: no collective is open, so nothing else times out


def main(argv: list[str]) -> int:
    """This rank's exit status."""
    if "RANK" not in os.environ and "ACCELERATE_MIXED_PRECISION" not in os.environ:
        return cli.main(["train", *argv])  # no launcher around us
    rank = int(os.environ.get("RANK", "0"))
    os.umask(PRIVATE)
    os.environ.setdefault(stops.STARTED, str(time.time()))
    try:
        store = _store()
    except UserError as failure:
        print(f"ftdist: {failure}", file=sys.stderr)
        return USAGE
    if rank == 0:
        try:
            run_dir = frozen(argv)
        except (UserError, KeyboardInterrupt) as failure:
            if store is not None:
                store.set("ftdist/run_dir", "")
            print(f"ftdist: {failure or 'interrupted'}", file=sys.stderr)
            return USAGE if isinstance(failure, UserError) else INTERRUPTED
        if store is not None:
            store.set("ftdist/run_dir", str(run_dir))
    else:
        assert store is not None
        store.wait(["ftdist/run_dir"], WAIT)
        name = store.get("ftdist/run_dir").decode()
        if not name:
            return USAGE  # rank 0 has said why
        run_dir = Path(name)
    from ftdist import job, worker

    def release() -> None:
        if rank == 0:
            lease.release(run_dir, int(os.environ[lease.VARIABLE]))

    try:
        status = worker.main(run_dir, at_failure=release)
        if rank == 0 and status == OK:
            cli.private_and_stoppable()  # the worker only noted signals
            job.conclude(run_dir, int(os.environ[lease.VARIABLE]), partial(job.finish, run_dir))
            print(f"run: {run_dir}")
    except Failed as failure:
        print(f"ftdist: {failure}", file=sys.stderr)
        status = failure.status
    finally:
        release()
    return status


def frozen(argv: list[str]) -> Path:
    """Global rank 0's part: a run directory with everything that the ranks read, for the engine of the launcher."""
    from ftdist import compose, forecast, job, resume

    if {"-m", "--multirun"} & set(argv):
        raise UserError(ONE)
    engine, deepspeed = _engine()
    section = _zero_section(deepspeed) if deepspeed else {}
    chosen = [word for word in argv if word.startswith("engine=")]
    if chosen and chosen != [f"engine={engine}"]:
        raise UserError(
            f"{chosen[0]}: the launcher was started for {engine}; leave it out or use launch/{chosen[0][7:]}.yaml"
        )
    world, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    for word in argv:
        if re.match(r"\+*(cluster\b|engine\.)", word):
            raise UserError(f"{word}: the launcher and its files decide this; leave it out, or use ftdist train")
    given = {"engine": engine, "cluster": "outside", "cluster.nodes": world // local, "cluster.processes": local}
    if engine == "zero3_nvme":
        given["engine.nvme_path"] = section["offload_param"]["nvme_path"]
    words = [word for word in argv if word not in chosen]
    if not chosen and any(word.startswith("experiment=") for word in argv):
        for asked in compose.compose("train", words):
            wanted = asked["engine"]["name"]
            if wanted != engine:
                raise UserError(
                    f"experiment: made for engine={wanted}, the launcher was started for {engine}; use "
                    f"launch/{wanted}.yaml, or say engine={engine}"
                )
    configs = compose.compose("train", [*words, *(f"{key}={value}" for key, value in given.items())])
    if len(configs) != 1:
        raise UserError(ONE)
    config = configs[0]
    if config["resume"] == "auto" and config["run_dir"] is None:
        raise UserError("resume=auto: go on with which run? set run_dir=DIR")
    if config["then"]:
        raise UserError("then: a launcher runs one configuration; use ftdist train for a recipe of several runs")
    job.decide(config)
    forecast.refuse_what_cannot_fit(dict(job.plan(config)), config["must_fit"])
    run_dir = Path(config["run_dir"]).expanduser().absolute()
    if config["resume"] == "auto" and resume.begun(run_dir, config):
        os.environ[lease.VARIABLE] = str(lease.take(run_dir).token)
        rundir.forget_last_start(run_dir)
        resume.changed(run_dir, config, here=False)
        _own_files(run_dir, engine, local, deepspeed)
        return run_dir
    with rundir.claimed(run_dir) as token:
        os.environ[lease.VARIABLE] = str(token)
        job.freeze(config, run_dir)
        _own_files(run_dir, engine, local, deepspeed)
    return run_dir


def _own_files(run_dir: Path, engine: str, local: int, deepspeed: Path | None) -> None:
    """The launcher's own files are the ones that count."""
    from ftdist import launcher

    if deepspeed is not None:
        shutil.copyfile(deepspeed, run_dir / "deepspeed.json")
    rundir.write_yaml(run_dir / "accelerate.yaml", launcher.accelerate_file(engine, local, run_dir / "deepspeed.json"))


def _engine() -> tuple[str, Path | None]:
    """The engine that the launcher's environment stands for, and its DeepSpeed file."""
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        return ("ddp" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else "single"), None
    if not file:
        raise UserError("the launcher uses DeepSpeed without a deepspeed_config_file; use one of launch/*.yaml")
    section = _zero_section(Path(file))
    devices = {part.get("device") for key, part in section.items() if key.startswith("offload_")}
    suffix = "_nvme" if "nvme" in devices else "_offload" if "cpu" in devices else ""
    return f"zero{section.get('stage', 0)}{suffix}", Path(file)


def _zero_section(file: Path) -> dict[str, Any]:
    section: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")).get("zero_optimization", {})
    return section


def _store() -> Any:
    """The rendezvous store that the launcher's agent keeps, or None for one process."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    import torch.distributed as dist

    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE", "").lower() != "true":
        raise UserError("ftdist.train needs torchrun or accelerate launch to start its ranks")
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if port == 0:
        raise UserError("MASTER_PORT=0: the launcher has told no port; start torchrun with --standalone")
    return dist.PrefixStore("ftdist", dist.TCPStore(host, port, is_master=False))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
