"""What the tests' forks promise: a program in one of them is what it is in a new interpreter, and leaves nothing."""

import os
import signal
import sys
import time

import psutil
import pytest

TELLS = """
import os, signal, sys
umask = os.umask(0)
os.umask(umask)
print(sys.argv[1:], os.getcwd(), oct(umask), sys.stdin.read(), __name__, hasattr(os, "left"), __import__("mine").NAME)
print([signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGPIPE)])
print(sorted((k, v) for k, v in os.environ.items() if k not in ("_", "LC_CTYPE")))
print("to stderr", file=sys.stderr)
sys.exit("the end" if sys.argv[1] == "text" else int(sys.argv[1]))
"""
LEAVES = """
import os, signal, sys
os.umask(0o077), os.chdir("/"), os.environ.update(LEFT="1"), signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.left, sys.argv, sys.path[:] = True, ["other"], []
raise RuntimeError("left")
"""
WAITS = """
import signal, sys, time
if sys.argv[1] == "heeds":
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit(7))
print("waiting", __import__("os").getpid(), flush=True)
time.sleep(300)
"""


@pytest.fixture
def both(forks, execute, tmp_path):
    """`both(source, *words)`: what a fork and a new interpreter make of a script."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "mine.py").write_text("NAME = 'my own module'\n")
    env = {"PYTHONPATH": str(tmp_path / "site"), "OWN": "1", "HF_HUB_OFFLINE": None}

    def both(source, *words):
        (tmp_path / "script.py").write_text(source)
        for python in (forks.python, sys.executable):
            yield execute(python, tmp_path / "script.py", *words, cwd=tmp_path, env=env)

    return both


def test_a_fork_is_a_new_interpreter(both):
    for words in (("0", "a b"), ("3",), ("text",)):
        fork, new = both(TELLS, *words)
        assert fork == new and "my own module" in new.stdout and "to stderr" in new.stderr
    fork, new = both(LEAVES)
    assert fork.status == new.status == 1 and fork.stderr.splitlines()[-1] == "RuntimeError: left"
    fork, new = both(TELLS, "0")
    assert fork == new


@pytest.mark.parametrize(
    ("how", "number", "status"),
    [
        ("heeds", signal.SIGUSR1, 7),
        ("dies", signal.SIGTERM, -15),
        ("dies", signal.SIGINT, -2),
        ("dies", signal.SIGKILL, -9),
    ],
)
def test_signals_reach_it(forks, start, tmp_path, how, number, status):
    (tmp_path / "script.py").write_text(WAITS)
    process = start(forks.python, tmp_path / "script.py", how, cwd=tmp_path)
    pid = int(process.stdout.readline().split()[1])
    assert pid != process.pid and psutil.pid_exists(pid)
    os.kill(process.pid, number)
    assert process.wait(timeout=60) == status
    deadline = time.monotonic() + 60
    while psutil.pid_exists(pid):  # its parent buries it
        assert time.monotonic() < deadline
        time.sleep(0.01)
