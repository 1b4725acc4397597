"""The command line: verbs and their arguments. Everything heavy is imported by the verb that needs it."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ftdist import schema
from ftdist.errors import FAILED, INTERRUPTED, OK, STOPPED, USAGE, Failed, UserError

HELP = """ftdist VERB …   distributed fine-tuning of language models that can be trusted

  train [overrides]          plan, prepare, launch, train, evaluate; prints `run: DIR` last (-m, sweep=search: many)
  plan  [overrides] [--json] what would run: memory, time, disk, cost; needs no GPU (--fit: the fastest that fits,
                             --sizes 8,16,64: how it scales, hardware=h100: for other machines)
  data  [overrides] [--show N]  prepare the data alone; show N rows token by token with their mask
  resume RUN [overrides]     go on from the newest valid checkpoint, on more or fewer processes if wanted
  status [RUN…] [--json]     queued, running with step and time left, pre-empted, stopped, done, failed and why
  logs  RUN [--follow]       what a run says; --rank N: one rank's own log
  stop  RUN…                 save and stop; take a waiting job out of the queue
  scan  [overrides]          signal-to-noise ratio of every weight matrix (Spectrum)
  eval  RUN [eval.key=value] held-out loss and answers, base beside tuned
  export RUN [export.key=value]  a plain Hugging Face directory, merged and checked against what was trained
  chat  RUN [chat.key=value] talk to base and tuned next to each other
  report RUN… | SWEEP [--output FILE]  one self-contained page for a run, or one that compares several
  ls    [GROUP]              config groups, or the choices in one
  doctor [--shared DIR] [--json] [overrides]  what is wrong with this installation, machine, and cluster;
                             --calibrate: measures it for plans; --fault-drill [--kills N] [overrides]: a run
                             killed N times ends as an untouched one
  completion bash            eval "$(ftdist completion bash)" completes verbs, groups, choices and keys

Overrides are Hydra's: model.path=DIR data.path=FILE strategy=lora engine=zero3 train.learning_rate=1e-4
experiment=NAME, --cfg job (show the configuration), --config-dir DIR (your own groups). ftdist train --help lists
the groups and every key."""

COMPLETION = """_ftdist() {
  local IFS=$'\\n'
  COMPREPLY=($(ftdist completion words "${COMP_LINE:0:COMP_POINT}" 2>/dev/null))
  [[ ${COMPREPLY[0]} == *= || ${COMPREPLY[0]} == *. ]] && compopt -o nospace
}
complete -o default -F _ftdist ftdist"""


def main(argv: list[str] | None = None) -> int:
    """The exit status of one command line."""
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in ("-h", "--help", "help"):
        print(HELP)
        return OK if words else USAGE
    if words[0] == "--version":
        from ftdist import __version__

        print(f"ftdist {__version__}")
        return OK
    if words[0] in ("train", "resume"):
        private_and_stoppable()
    try:
        verb = VERBS.get(words[0])
        if verb is None:
            raise UserError(f"{words[0]}: no such verb; {schema.nearest(words[0], list(VERBS))}")
        return verb(words[1:])
    except UserError as failure:
        print(f"ftdist: {failure}", file=sys.stderr)
        return USAGE
    except Failed as failure:
        print(f"ftdist: {failure}", file=sys.stderr)
        return failure.status
    except KeyboardInterrupt:
        print("\nftdist: interrupted; nothing is left running", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone, as `| head` does
        sys.stderr.close()
        return FAILED


def private_and_stoppable() -> None:
    """What a run writes is its owner's; a signal that asks for an end outside training ends it in order."""
    import signal
    import time

    from ftdist import rundir, stops

    def stop(number: int, _: object) -> None:
        raise Failed(f"stopped ({signal.Signals(number).name}) outside training; start it again to go on", STOPPED)

    for number in stops.SIGNALS:
        if number != signal.SIGINT:
            signal.signal(number, stop)
    os.umask(rundir.PRIVATE)
    os.environ[stops.STARTED] = str(time.time())


def train(argv: list[str]) -> int:
    """One run, several that follow one another, or with -m or sweep=search a sweep."""
    from ftdist import compose, stages

    made = compose.several("train", argv)
    if made.several or made.sweep.get("name") == "search":
        from ftdist.sweep import start

        start.start(made, argv)
        return OK
    for config in made.configs:
        recipe = stages.of("train", config, argv)
        stages.ready(recipe)
        try:
            if config["cluster"]["name"] == "slurm":
                from ftdist import submit

                run_dir = Path(config["run_dir"]).expanduser().absolute()
                if status := submit.run(config, run_dir):
                    return status
                if config["cluster"]["test_only"]:
                    continue
            else:
                run_dir = stages.run(recipe)
        except KeyboardInterrupt:
            begun = [stage["run_dir"] for stage in recipe if Path(stage["run_dir"], "config.yaml").is_file()]
            if begun:
                print(f"\nftdist: stopped; unfinished run in {begun[-1]}", file=sys.stderr)
                return INTERRUPTED
            raise
        print(f"run: {run_dir}")
    return OK


def resume(argv: list[str]) -> int:
    """Go on with a run or a sweep that was stopped or killed."""
    from ftdist import resume

    if not argv or "=" in argv[0]:
        raise UserError("resume: which run? ftdist resume RUN [cluster.processes=4]")
    run_dir = Path(argv[0]).expanduser().absolute()
    if (run_dir / "sweep.yaml").is_file():
        from ftdist.sweep import start

        start.go_on(run_dir, argv[1:])
        return OK
    status = resume.from_words(run_dir, argv[1:])
    if status == OK:
        print(f"run: {run_dir}")
    return status


def status(argv: list[str]) -> int:
    """What runs are doing, a line each; without names all below runs/ and sweeps/."""
    from ftdist import follow

    as_json = "--json" in argv
    argv = [word for word in argv if word != "--json"]
    named = _runs("status", argv) if argv else []
    states = follow.status([run for one in named for run in _members(one)] if argv else follow.default_runs())
    states += [state for one in named for state in _not_begun(one)]
    print(json.dumps(states, indent=2) if as_json else follow.table(states))
    return OK


def logs(argv: list[str]) -> int:
    """What a run says; with --follow until it ends, with the run's exit status."""
    from ftdist import follow

    wanted = "--follow" in argv
    argv, rank = _option([word for word in argv if word != "--follow"], "--rank")
    if rank is not None and not rank.isdigit():
        raise UserError(f"--rank={rank}: which rank? --rank 1")
    if len(argv) != 1:
        raise UserError("logs: which run? ftdist logs RUN [--follow] [--rank N]")
    (run_dir,) = _runs("logs", argv)
    if (run_dir / "sweep.yaml").is_file():
        raise UserError(f"{argv[0]}: a sweep; ftdist logs RUN for one of its members, such as "
                        f"{next(iter(_members(run_dir)), 'NAME')}")  # fmt: skip
    return follow.logs(run_dir, wanted, None if rank is None else int(rank))


def stop(argv: list[str]) -> int:
    """Ask runs to save and stop; take those that wait out of the queue."""
    from ftdist import follow

    refused = []
    for run_dir in _runs("stop", argv):
        try:
            if (run_dir / "sweep.yaml").is_file():
                from ftdist.sweep import start

                print(f"{run_dir}: {start.stop(run_dir)}")
            else:
                print(f"{run_dir}: {follow.stop(run_dir)}")
        except UserError as failure:  # the others are to be stopped all the same
            refused.append(str(failure))
    if refused:
        raise UserError("; ".join(refused))
    return OK


def _members(named: Path) -> list[Path]:
    """The runs that a sweep has by now; of anything else itself."""
    if not (named / "sweep.yaml").is_file():
        return [named]
    from ftdist.sweep import directory

    return [run for member in directory.members(named) if (run := named / member.name).is_dir()]


def _not_begun(named: Path) -> list[dict[str, Any]]:
    """The members of a sweep that have no run directory, as `follow.status` has those that have."""
    if not (named / "sweep.yaml").is_file():
        return []
    from ftdist.sweep import directory

    states = {m.name: directory.state(named, m.name) for m in directory.members(named) if not (named / m.name).is_dir()}
    return [{"run": str(named / name), "state": one.state, "detail": one.reason or "", "step": None, "steps": None,
             "seconds_left": None, "job": None} for name, one in states.items()]  # fmt: skip


def _runs(verb: str, argv: list[str]) -> list[Path]:
    if not argv:
        raise UserError(f"{verb}: which run? ftdist {verb} RUN")
    from ftdist import follow

    for word in argv:
        path = Path(word).expanduser()
        if word.startswith("-") or not (follow.is_run(path) or (path / "sweep.yaml").is_file()):
            raise UserError(f"{word}: no run directory; ftdist {verb} RUN")
    return [Path(word).expanduser().absolute() for word in argv]


def plan(argv: list[str]) -> int:
    """Steps 1 and 2 of a run; leaves nothing."""
    from ftdist import compose, job, stages
    from ftdist.plan.text import render, scaling

    as_json, fit = "--json" in argv, "--fit" in argv
    argv, sizes = _option([word for word in argv if word not in ("--json", "--fit")], "--sizes")
    devices = [int(part) for part in (sizes or "").split(",") if re.fullmatch(r"[1-9]\d{0,6}", part)]
    if sizes is not None and len(devices) != len(sizes.split(",")):
        raise UserError(f"--sizes={sizes}: numbers of devices, with commas between them: --sizes 8,16,64")
    plans = []
    for config in [stage for first in compose.compose("plan", argv) for stage in stages.of("plan", first, argv)]:
        job.decide(config)
        made: dict[str, Any] = dict(job.plan(config))
        if fit:
            made = job.fitted(config)
        if devices:
            made["sizes"] = job.scaling(config, devices)
        plans.append(made)
        if as_json:
            continue
        print(render(made))  # type: ignore[arg-type]
        if fit:
            print(f"\nthe fastest that fits, with the same global batch:\n  {' '.join(made['overrides'])}")
        if devices:
            print(f"\n{scaling(made['sizes'])}")
    if as_json:
        print(json.dumps(plans if len(plans) > 1 else plans[0], indent=2))
    return OK


def data(argv: list[str]) -> int:
    """Prepare the data, tell where it is and what is in it."""
    from ftdist import compose, job, models

    argv, count = _option(argv, "--show")
    if count is not None and not count.isdigit():
        raise UserError(f"--show={count}: how many rows? --show 5")
    for config in compose.compose("data", argv):
        job.decide(config)
        prepared = job.prepared_data(config, preference=job.is_preference(config["data"]))
        from ftdist.data.show import report, show

        print(report(prepared))
        if count:
            model = config["model"]
            show(prepared, models.local_path(model["path"], model["revision"]), int(count))
        print(f"data: {prepared}")
    return OK


def scan(argv: list[str]) -> int:
    """Scan a model's weights and select from them, as strategy=spectrum would."""
    from ftdist import compose, job, models
    from ftdist.spectrum import verb

    if not any(word.startswith("strategy=") for word in argv):
        argv = ["strategy=spectrum", *argv]
    for config in compose.compose("scan", argv):
        named = config["run_dir"]
        job.decide(config)
        model, strategy, processes = config["model"], config["strategy"], config["cluster"]["processes"]
        if strategy["name"] != "spectrum":
            raise UserError(f"strategy={strategy['name']}: a scan is Spectrum's; leave it out")
        output = Path(named or f"scans/{Path(model['path']).name}").expanduser().absolute()
        verb.run(
            model_path=models.local_path(model["path"], model["revision"]),
            processes=None if processes == "auto" else processes,
            device="auto",
            output_dir=output,
            shapes=job.shapes_of(model).architecture.parameters,
            **schema.pick(verb.run, strategy),
        )
    return OK


def evaluate(argv: list[str]) -> int:
    """Evaluate a finished run again, with other settings if wanted."""
    from ftdist import compose, rundir
    from ftdist import evaluate as evaluation

    directory = _run_directory("eval", argv)
    if evaluation.is_exported(directory):
        frozen, defaults = {}, compose.compose("eval", [])[0]
    else:
        frozen, defaults = rundir.read_config(directory)["eval"], None
    wanted = compose.group("eval", "eval", argv[1:], frozen)
    if wanted["samples"] == 0 and not any(word.startswith("eval.samples=") for word in argv):
        wanted["samples"] = evaluation.USUAL
    evaluation.check(wanted)
    evaluation.evaluate(directory, wanted, defaults)
    return OK


def doctor(argv: list[str]) -> int:
    """What is wrong with this installation and machine; or the fault drill, or measuring it for plans."""
    if argv == ["--calibrate"]:
        from ftdist import calibrate

        print(calibrate.run())
        return OK
    argv, kills = _option(argv, "--kills")
    argv, seed = _option(argv, "--seed")
    if "--fault-drill" in argv:
        for name, value in (("--kills", kills), ("--seed", seed)):
            if value is not None and not value.isdigit():
                raise UserError(f"{name}={value}: should be a whole number")
        from ftdist import doctor

        words = [word for word in argv if word != "--fault-drill"]
        doctor.fault_drill(words, int(kills or 5), int(seed or 0))
        return OK
    as_json = "--json" in argv
    argv, shared = _option([word for word in argv if word != "--json"], "--shared", "which directory? --shared DIR")
    if kills or seed or any("=" not in word for word in argv):
        raise UserError(
            f"doctor {' '.join(argv)}: no such argument; ftdist doctor [--shared DIR] [--json] [overrides] | "
            "--calibrate | --fault-drill [--kills N]"
        )
    from ftdist import checkup

    found = list(checkup.findings(Path(shared).expanduser().absolute() if shared else None))
    found += [checkup.cluster(argv)] if argv else []
    print(checkup.text(found, as_json))
    return FAILED if any(finding.level == checkup.WRONG for finding in found) else OK


def export(argv: list[str]) -> int:
    """Write a finished run as a plain model directory and check it."""
    from ftdist import compose, rundir
    from ftdist.export import export, summary

    run_dir = _run_directory("export", argv)
    wanted = compose.group("export", "export", argv[1:], rundir.read_config(run_dir).get("export", {}))
    schema.check("export", wanted, export)
    directory = export(run_dir, **wanted)
    print("\n".join(summary(directory)))
    print(f"model: {directory}")
    return OK


def chat(argv: list[str]) -> int:
    """Talk to base and tuned of a finished run."""
    from ftdist import chat, compose, rundir

    run_dir = _run_directory("chat", argv)
    wanted = compose.group("chat", "chat", argv[1:], rundir.read_config(run_dir).get("chat", {}))
    schema.check("chat", wanted, chat.settings)
    chat.chat(run_dir, **wanted)
    return OK


def report(argv: list[str]) -> int:
    """One page for a run, or one that compares several."""
    from ftdist.report import write

    argv, output = _option(argv, "--output", "which file? --output report.html")
    for word in argv:
        if word.startswith("-") or not Path(word).expanduser().is_dir():
            raise UserError(f"{word}: no such directory; ftdist report RUN… [--output FILE]")
    if not argv:
        raise UserError("report: which run? ftdist report RUN…")
    runs = [Path(word).expanduser().absolute() for word in argv]
    print(f"report: {write(runs, Path(output).expanduser().absolute() if output else None)}")
    return OK


def _run_directory(verb: str, argv: list[str]) -> Path:
    if not argv or "=" in argv[0] or argv[0].startswith("-"):
        raise UserError(f"{verb}: which run? ftdist {verb} RUN [{verb}.KEY=VALUE]")
    return Path(argv[0]).expanduser().absolute()


def ls(argv: list[str]) -> int:
    """Groups, or the choices of one, a line each."""
    from ftdist import compose

    rows = compose.choices(argv[0] if argv else None)
    width = max(map(len, rows))
    for name, meaning in rows.items():
        print(f"{name:<{width}}  {meaning}".rstrip())
    return OK


def completion(argv: list[str]) -> int:
    """The shell's function, or (called by it) the words that may follow a line."""
    if argv[:1] == ["bash"]:
        print(COMPLETION)
        return OK
    if len(argv) != 2 or argv[0] != "words":
        raise UserError('completion: which shell? eval "$(ftdist completion bash)"')
    words = argv[1].split(" ")
    current = words[-1]
    if len(words) <= 2:
        print("\n".join(verb for verb in VERBS if verb.startswith(current)))
        return OK
    if words[1] == "ls":
        from ftdist import compose

        print("\n".join(name for name in compose.choices(None) if name.startswith(current)))
        return OK
    from ftdist import compose

    # bash splits words at `=`: what is offered must begin after the last one
    cut = current.rfind("=") + 1
    print("\n".join(word[cut:] for word in compose.complete(words[2:]) if word.startswith(current)))
    return OK


def _option(argv: list[str], name: str, ask: str | None = None) -> tuple[list[str], str | None]:
    """`argv` without `--name VALUE` (or `--name=VALUE`), and the value."""
    for i, word in enumerate(argv):
        if word == name and i + 1 < len(argv):
            return argv[:i] + argv[i + 2 :], argv[i + 1]
        if word.startswith(f"{name}="):
            return argv[:i] + argv[i + 1 :], word.partition("=")[2]
    if name in argv:
        raise UserError(f"{name}: {ask or f'how many? {name} 5'}")
    return argv, None


VERBS: dict[str, Callable[[list[str]], int]] = {
    "train": train,
    "plan": plan,
    "data": data,
    "resume": resume,
    "status": status,
    "logs": logs,
    "stop": stop,
    "scan": scan,
    "eval": evaluate,
    "doctor": doctor,
    "export": export,
    "chat": chat,
    "report": report,
    "ls": ls,
    "completion": completion,
}

if __name__ == "__main__":
    sys.exit(main())
