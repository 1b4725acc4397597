"""The command line: verbs and their arguments. Everything heavy is imported by the verb that needs it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

from ftdist import schema
from ftdist.errors import FAILED, INTERRUPTED, OK, USAGE, Failed, UserError

HELP = """ftdist VERB …   distributed fine-tuning of language models that can be trusted

  train [overrides]          plan, prepare, launch, train, evaluate; prints `run: DIR` last (-m: a sweep)
  plan  [overrides] [--json] what would run, with the arithmetic; needs no GPU
  data  [overrides] [--show N]  prepare the data alone; show N rows token by token with their mask
  scan  [overrides]          signal-to-noise ratio of every weight matrix (Spectrum)
  eval  RUN [eval.key=value] held-out loss and answers, base beside tuned
  ls    [GROUP]              config groups, or the choices in one
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


def train(argv: list[str]) -> int:
    """One run, or with -m one after another."""
    from ftdist import compose, job

    configs = compose.compose("train", argv)
    for config in configs:  # everything is checked before anything starts
        job.ready(config)
    for config in configs:
        try:
            run_dir = job.run(config)
        except KeyboardInterrupt:
            if Path(config["run_dir"], "config.yaml").is_file():
                print(f"\nftdist: stopped; unfinished run in {config['run_dir']}", file=sys.stderr)
                return INTERRUPTED
            raise
        print(f"run: {run_dir}")
    return OK


def plan(argv: list[str]) -> int:
    """Steps 1 and 2 of a run; leaves nothing."""
    from ftdist import compose, job
    from ftdist.plan.text import render

    as_json = "--json" in argv
    for config in compose.compose("plan", [word for word in argv if word != "--json"]):
        job.decide(config)
        made = job.plan(config)
        print(json.dumps(made, indent=2) if as_json else render(made))
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
    from ftdist import rundir
    from ftdist.evaluate import evaluate, settings

    if not argv or "=" in argv[0]:
        raise UserError("eval: which run? ftdist eval RUN [eval.samples=200]")
    run_dir = Path(argv[0]).expanduser().absolute()
    wanted = dict(rundir.read_config(run_dir)["eval"])
    for word in argv[1:]:
        key, _, value = word.partition("=")
        name = key.removeprefix("eval.")
        if name not in wanted:
            raise UserError(f"{key}: no such key; {schema.nearest(name, list(wanted), 'eval.')}")
        wanted[name] = value
    schema.check("eval", wanted, settings)
    if int(wanted["samples"]) == 0:
        raise UserError("eval.samples=0: nothing to evaluate; set eval.samples=200")
    evaluate(run_dir, wanted)
    return OK


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


def _option(argv: list[str], name: str) -> tuple[list[str], str | None]:
    """`argv` without `--name VALUE` (or `--name=VALUE`), and the value."""
    for i, word in enumerate(argv):
        if word == name and i + 1 < len(argv):
            return argv[:i] + argv[i + 2 :], argv[i + 1]
        if word.startswith(f"{name}="):
            return argv[:i] + argv[i + 1 :], word.partition("=")[2]
    if name in argv:
        raise UserError(f"{name}: how many? {name} 5")
    return argv, None


VERBS: dict[str, Callable[[list[str]], int]] = {
    "train": train,
    "plan": plan,
    "data": data,
    "scan": scan,
    "eval": evaluate,
    "ls": ls,
    "completion": completion,
}

if __name__ == "__main__":
    sys.exit(main())
