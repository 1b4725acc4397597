"""Starts of Python, forked from one process that has imported everything: 0.1 s each instead of 10 s.

Reads a JSON line a command, answers with JSON lines. `{"freeze": [words]}` makes a run directory as `ftdist train`
does before it launches. `{"start": RUN, "world": N}` starts the ranks as torchrun would (the same variables; one rank
that fails ends the others), answers with their pids and, when all have ended, with their statuses. `{"finish": RUN}`
does what follows training.

Its first argument is a file that it makes: a program that is started as `python -m MODULE …` or `python FILE …` is, and
has the module run by a fork, with its own arguments, directory, environment, umask and files 0 to 2. Signals reach the
fork, and its status comes back. For the fork itself that program is `sys.executable`, so what it starts is forked too:
launchers and their ranks, evaluations, scans.
"""

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import pkgutil
import runpy
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path

GRACE = 20.0  # seconds that the other ranks have after one has failed
PYTHON = """#!{python} -IS
import json, os, signal, socket, sys

words = sys.argv[1:]
while words and words[0] in ("-u", "-I"):
    words.pop(0)
if not words or words[0][0] == "-" and words[0] != "-m":
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
umask = os.umask(0)
os.umask(umask)
asked = {{"words": words, "cwd": os.getcwd(), "env": dict(os.environ), "umask": umask}}
asked["isolated"] = "-I" in sys.argv[1:3]
server = socket.socket(socket.AF_UNIX)
server.connect({socket!r})
socket.send_fds(server, [json.dumps(asked).encode() + b"\\n"], [0, 1, 2])
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, lambda number, _: server.send(bytes([number])))
status = int(server.recv(100) or -9)
if status < 0:
    signal.signal(-status, signal.SIG_DFL) if status != -9 else None
    os.kill(os.getpid(), -status)
os._exit(status)
"""


def preload():
    from ftdist import imports

    with imports.uncollected():
        imports.bitsandbytes()
        import accelerate.commands.launch  # noqa: F401
        import datasets  # noqa: F401
        import deepspeed  # noqa: F401
        import matplotlib.backends.backend_svg  # noqa: F401
        import peft  # noqa: F401
        import sacrebleu  # noqa: F401
        import torch.distributed.run  # noqa: F401
        from transformers import AutoTokenizer, LlamaForCausalLM  # noqa: F401
        from trl import SFTConfig  # noqa: F401

        import ftdist

        for module in pkgutil.walk_packages(ftdist.__path__, "ftdist."):
            if not module.name.startswith(("ftdist.conf", "ftdist.launch.", "ftdist.slurm")):
                importlib.import_module(module.name)
        ftdist.compose.compose("plan", [])  # what Hydra imports


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


def program(asked, files):
    """`python -m MODULE …` or `python FILE …`, from its arguments to its status."""
    os.setsid()
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    os.chdir(asked["cwd"])
    os.umask(asked["umask"])
    os.environ.clear()
    os.environ.update(asked["env"])
    words = asked["words"]
    if not asked["isolated"]:
        sys.path[:0] = [asked["cwd"], *filter(None, os.environ.get("PYTHONPATH", "").split(":"))]
        importlib.invalidate_caches()
    status = 0
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            for part in (words[1], f"{words[1]}.__main__"):
                sys.modules.pop(part, None) if not hasattr(sys.modules.get(part), "__path__") else None
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        status = end.code or 0
        if not isinstance(status, int):
            print(status, file=sys.stderr)
            status = 1
    except KeyboardInterrupt:
        status = -signal.SIGINT
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status & 0xFF


def serve(listening):
    """Programs, as many at once as are asked for; those whose asker has gone are killed."""
    ready = selectors.DefaultSelector()
    ready.register(listening, selectors.EVENT_READ)
    while True:
        for key, _ in ready.select():
            if key.fileobj is listening:
                asker, _ = listening.accept()
                text, files, _, _ = socket.recv_fds(asker, 1 << 16, 3)
                while not text.endswith(b"\n") and (more := asker.recv(1 << 16)):
                    text += more
                whole = text.endswith(b"\n")  # not of who was killed while it asked
                pid = forked(program, json.loads(text), files) if whole else None
                for file in files:
                    os.close(file)
                if pid is None:
                    asker.close()
                    continue
                ended = os.pidfd_open(pid)
                ready.register(asker, selectors.EVENT_READ, pid)
                ready.register(ended, selectors.EVENT_READ, (pid, asker))
            elif isinstance(key.data, int):
                if key.fileobj.fileno() == -1:  # ended in this very moment
                    continue
                said = key.fileobj.recv(1)
                os.kill(key.data, said[0] if said else signal.SIGKILL)
                if not said:
                    ready.unregister(key.fileobj)
            else:
                pid, asker = key.data
                _, status = os.waitpid(pid, 0)
                with contextlib.suppress(OSError):
                    asker.send(str(os.waitstatus_to_exitcode(status)).encode())
                with contextlib.suppress(KeyError):
                    ready.unregister(asker)
                ready.unregister(key.fileobj)
                asker.close()
                os.close(key.fileobj)


def forked(function, *arguments):
    """The pid of a child that ends with what the function returns, or 99 with the exception's text on stderr.

    It does not outlive this process.
    """
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    status = 99
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
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
    python = Path(sys.argv[1])
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(python.with_suffix(".socket")))
    listening.listen(64)
    preload()
    gc.collect()
    gc.freeze()  # pages that no collection touches stay shared
    python.write_text(PYTHON.format(python=sys.executable, socket=listening.getsockname()))
    python.chmod(0o700)
    sys.executable = str(python)
    forked(serve, listening)
    listening.close()
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
