"""Starts of the worker, forked from one process that has imported everything: 0.1 s each instead of 10 s.

Reads a JSON line a command, answers with JSON lines. `{"freeze": [words]}` makes a run directory as `ftdist train`
does before it launches. `{"start": RUN, "world": N}` starts the ranks as torchrun would (the same variables; one rank
that fails ends the others), answers with their pids and, when all have ended, with their statuses. `{"finish": RUN}`
does what follows training.
"""

import contextlib
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

GRACE = 20.0  # seconds that the other ranks have after one has failed


def preload():
    from ftdist import imports

    imports.bitsandbytes()
    import datasets  # noqa: F401
    import deepspeed  # noqa: F401
    import peft  # noqa: F401
    from transformers import AutoTokenizer, LlamaForCausalLM  # noqa: F401
    from trl import SFTConfig  # noqa: F401

    import ftdist.trainer
    import ftdist.worker  # noqa: F401
    from ftdist import compose, job, save  # noqa: F401


def freeze(words):
    from ftdist import compose, job, lease, rundir

    sys.argv = ["ftdist", "train", *words]  # which env.json tells
    (config,) = compose.compose("train", words)
    job.decide(config)
    run_dir = Path(config["run_dir"])
    with rundir.claimed(run_dir) as token:
        job.freeze(config, run_dir)
    lease.release(run_dir, token)
    return 0


def change(run_dir, words):
    """What `ftdist resume RUN words` writes before it launches."""
    from ftdist import job, resume

    job.launch = lambda *_: None
    resume.from_words(Path(run_dir), words)
    return 0


def finish(run_dir):
    from ftdist import job

    job.finish(Path(run_dir))
    return 0


def rank(run_dir, number, world, port):
    os.setsid()
    os.environ |= {
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    from ftdist import worker

    return worker.main(Path(run_dir))


def forked(function, *arguments):
    """The pid of a child that ends with what the function returns, or 99 with the exception's text on stderr."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    status = 99
    try:
        status = function(*arguments)
    except BaseException as failure:
        print(f"{type(failure).__name__}: {failure}", file=sys.stderr, flush=True)
    finally:
        os._exit(status)


def wait(pids):
    statuses, failed = {}, None
    while len(statuses) < len(pids):
        for pid in set(pids) - set(statuses):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                statuses[pid] = os.waitstatus_to_exitcode(status)
                if statuses[pid] and failed is None:
                    failed = time.monotonic()
                    for other in set(pids) - set(statuses):
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(other, signal.SIGTERM)
        if failed and time.monotonic() - failed > GRACE:
            for other in set(pids) - set(statuses):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(other, signal.SIGKILL)
        time.sleep(0.02)
    return [statuses[pid] for pid in pids]


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


ANSWERS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # whatever else is printed


def answer(**values):
    print(json.dumps(values), file=ANSWERS, flush=True)


def main():
    preload()
    answer(ready=True)
    for line in sys.stdin:
        command = json.loads(line)
        if "freeze" in command:
            pids = [forked(freeze, command["freeze"])]
        elif "finish" in command:
            pids = [forked(finish, command["finish"])]
        elif "change" in command:
            pids = [forked(change, command["change"], command["words"])]
        else:
            port, world = free_port(), command["world"]
            pids = [forked(rank, command["start"], number, world, port) for number in range(world)]
        answer(pids=pids)
        answer(statuses=wait(pids))


if __name__ == "__main__":
    main()
