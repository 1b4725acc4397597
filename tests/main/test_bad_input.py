"""What users get wrong, and what machines do: one line or a clean stop, nothing left over, nothing overwritten."""

import hashlib
import json
import os
import shutil
import signal
import time

import plugin
import psutil
import pytest

from ftdist import launcher, report

# --- refused in one line, nothing made ----------------------------------------------------------------------------


@pytest.fixture
def refused(run, verb, model, chat, tmp_path):
    """`refused(words, *parts)`: `train` ends in one line with these parts and leaves no file."""

    def refused(words, *parts, script=False):
        place = tmp_path / "here"
        place.mkdir()
        given = (f"model.path={model}", f"data.path={chat}", "tracking=none", *words)
        (run if script else verb)("train", *given, cwd=place).refused(*parts)
        assert list(place.iterdir()) == []

    return refused


def test_missing_data(refused, tmp_path):
    refused([f"data.path={tmp_path}/chat.jsonl"], f"data.path={tmp_path}/chat.jsonl", "no such file", script=True)


def test_a_link_to_nowhere(refused, tmp_path):
    (tmp_path / "chat.jsonl").symlink_to(tmp_path / "gone.jsonl")
    refused([f"data.path={tmp_path}/chat.jsonl"], f"data.path={tmp_path}/chat.jsonl")


@pytest.mark.skipif(os.geteuid() == 0, reason="root can read every file")
def test_data_without_permission(refused, chat, tmp_path):
    shutil.copy(chat, tmp_path / "mine.jsonl")
    (tmp_path / "mine.jsonl").chmod(0)
    refused([f"data.path={tmp_path}/mine.jsonl"], "mine.jsonl", "ermission")


def test_a_folder_without_data(refused, tmp_path):
    (tmp_path / "folder").mkdir()
    refused([f"data.path={tmp_path}/folder"], f"{tmp_path}/folder", "no data file")


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_data_set(refused, tmp_path, content):
    (tmp_path / "chat.jsonl").write_text(content)
    refused([f"data.path={tmp_path}/chat.jsonl"], "chat.jsonl", "empty")


def test_a_row_without_the_expected_keys(refused, chat, tmp_path):
    rows = [*chat.read_text().splitlines()[:5], '{"foo": "bar"}']
    (tmp_path / "chat.jsonl").write_text("\n".join(rows))
    refused([f"data.path={tmp_path}/chat.jsonl"], "chat.jsonl", "line 6", "foo")


def test_a_row_that_is_no_json(refused, chat, tmp_path):
    rows = [*chat.read_text().splitlines()[:5], '{"messages": [']
    (tmp_path / "chat.jsonl").write_text("\n".join(rows))
    refused([f"data.path={tmp_path}/chat.jsonl"], "chat.jsonl", "line 6", script=True)


def test_a_missing_model(refused, tmp_path):
    refused([f"model.path={tmp_path}/model"], f"model.path={tmp_path}/model", "no such directory")


@pytest.mark.parametrize(
    ("gone", "said"),
    [("model.safetensors", "weights"), ("config.json", "config.json"), ("tokenizer.json", "tokenizer")],
)
def test_a_model_directory_without(refused, model, tmp_path, gone, said):
    shutil.copytree(model, tmp_path / "model", ignore=shutil.ignore_patterns(gone))
    refused([f"model.path={tmp_path}/model"], f"model.path={tmp_path}/model", said)


def test_a_model_file_that_is_cut(refused, model, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    with (tmp_path / "model" / "model.safetensors").open("r+b") as file:
        file.truncate(5000)
    refused([f"model.path={tmp_path}/model"], f"{tmp_path}/model", "model.safetensors")


def test_more_processes_than_devices(refused):
    count = len(os.sched_getaffinity(0))
    refused([f"cluster.processes={count + 1}"], f"cluster.processes={count + 1}", f"has {count} devices")


def test_a_run_directory_that_cannot_be_made(refused, chat):
    refused([f"run_dir={chat}/run"], f"run_dir={chat}/run", "choose another")


def test_a_run_directory_where_nothing_can_be_written(refused):
    refused(["run_dir=/proc/run"], "run_dir=/proc/run", "choose another")


# --- a run directory belongs to one run ---------------------------------------------------------------------------


def contents(directory):
    files = sorted(file for file in directory.rglob("*") if file.is_file())
    return {file: (hashlib.sha256(file.read_bytes()).hexdigest(), file.stat().st_mtime_ns) for file in files}


def test_a_finished_run_is_not_overwritten(verb, small, cell):
    run_dir = cell("full", "single").run_dir
    before = contents(run_dir)
    verb("train", *small, f"run_dir={run_dir}").refused(f"run_dir={run_dir}", "choose another")
    assert contents(run_dir) == before


def test_files_of_the_user_are_not_overwritten(verb, small, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    verb("train", *small, f"run_dir={tmp_path}").refused(f"run_dir={tmp_path}", "choose another")
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_two_runs_at_once_in_one_directory(start, forks, small, tmp_path):
    words = ("train", *small, "engine=single", "train.max_steps=1", f"run_dir={tmp_path / 'run'}")
    both = [start(forks.python, "-m", "ftdist.cli", *words, cwd=tmp_path) for _ in range(2)]
    said = [process.communicate(timeout=300) for process in both]
    assert sorted(process.returncode for process in both) == [0, 2], said
    (line,) = (stderr for process, (_, stderr) in zip(both, said, strict=True) if process.returncode == 2)
    assert line.startswith(f"ftdist: run_dir={tmp_path / 'run'}: ") and line.count("\n") == 1
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()
    assert [row["step"] for row in map(json.loads, (tmp_path / "run" / "metrics.jsonl").open())] == [1, 1]


# --- stopped on the way -------------------------------------------------------------------------------------------


def until(condition, process):
    """Waits for something that the process does, as long as it lives."""
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def family(process):
    """The process and everything that it started."""
    parent = psutil.Process(process.pid)
    return [parent, *parent.children(recursive=True)]


def gone(processes):
    """None of them is left, zombies aside."""
    _, alive = psutil.wait_procs(processes, timeout=60)
    return [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []


LONG = ("engine=zero2", "cluster.processes=2", "cluster.oversubscribe=true", "train.max_steps=100000")


@pytest.fixture
def training(start, small, tmp_path):
    """A run of two ranks that has finished its first step, and its processes."""
    process = start("ftdist", "train", *small, *LONG, f"run_dir={tmp_path / 'run'}", cwd=tmp_path)
    metrics = tmp_path / "run" / "metrics.jsonl"
    until(lambda: metrics.is_file() and "\n" in metrics.read_text(), process)
    processes = family(process)
    assert sum("ftdist.worker" in p.cmdline() for p in processes) >= 2
    return process, processes, tmp_path / "run"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "terminate"])
def test_stopped_during_training(training, model, chat, number):
    process, processes, run_dir = training
    before = contents(model) | contents(chat.parent)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # what a terminal does
    else:
        process.send_signal(number)
    _, stderr = process.communicate(timeout=100)
    assert process.returncode == (130 if number == signal.SIGINT else 75)
    (line,) = stderr.strip().splitlines()
    assert line.startswith("ftdist: stopped (") and line.endswith(f"go on with: ftdist resume {run_dir}")
    assert gone(processes)
    assert not (run_dir / "final").exists()
    assert list((run_dir / "checkpoints").glob("step-*/manifest.json"))
    assert contents(model) | contents(chat.parent) == before


def test_a_second_ctrl_c_does_not_wait(training):
    process, processes, run_dir = training
    ranks = [p for p in processes if "ftdist.worker" in p.cmdline()]
    for rank in ranks:
        rank.suspend()  # ranks that will never save
    os.killpg(process.pid, signal.SIGINT)
    until(lambda: (run_dir / "stop.json").exists(), process)
    time.sleep(1.1)  # what comes within a second is the same Ctrl-C, passed on
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=100)
    assert process.returncode == 130
    assert stderr.strip().splitlines()[-1] == f"ftdist: stopped; unfinished run in {run_dir}"
    assert gone(processes)


def test_killed_during_training(training):
    """Even when nobody is left to tidy up, no rank goes on."""
    process, processes, run_dir = training
    process.kill()
    process.communicate(timeout=100)
    assert gone(processes)
    assert not (run_dir / "final").exists()


def test_stopped_while_the_data_are_prepared(start, model, tmp_path):
    rows = ({"messages": [{"role": "user", "content": f"What is {i} plus {i}? " + "Think. " * 50},
                          {"role": "assistant", "content": f"{i + i}"}]} for i in range(60_000))  # fmt: skip
    data, cache = tmp_path / "chat.jsonl", tmp_path / "cache"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = contents(model) | {data: hashlib.sha256(data.read_bytes()).hexdigest()}
    process = start("ftdist", "train", f"model.path={model}", f"data.path={data}", "tracking=none", "run_dir=runs/a",
                    cwd=tmp_path, env={"FTDIST_CACHE": str(cache)})  # fmt: skip
    until(lambda: any(cache.glob("data/.making*/work/*")) and len(family(process)) > 1, process)
    processes = family(process)
    assert (tmp_path / "runs" / "a").is_dir()
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=100)
    assert process.returncode == 130
    assert [line for line in stderr.splitlines() if line.startswith("ftdist:")][-1].startswith("ftdist: interrupted")
    assert "Traceback" not in stderr
    assert gone(processes)
    assert not (tmp_path / "runs").exists()
    assert not [d for d in (cache / "data").iterdir() if d.is_dir() and not d.name.startswith(".")]
    assert contents(model) | {data: hashlib.sha256(data.read_bytes()).hexdigest()} == before


def test_stopped_while_the_ranks_start(start, small, tmp_path):
    process = start("ftdist", "train", *small, *LONG, f"run_dir={tmp_path / 'run'}", cwd=tmp_path)
    until(lambda: len(family(process)) > 1 and (tmp_path / "run" / "logs" / "launcher.log").is_file(), process)
    processes = family(process)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=100)
    assert process.returncode == 130
    assert stderr.strip().splitlines() == [f"ftdist: stopped; unfinished run in {tmp_path / 'run'}"]
    assert gone(processes)
    assert not (tmp_path / "run" / "final").exists()


# --- a rank that fails --------------------------------------------------------------------------------------------

FAILING = '''
    import os
    from ftdist.strategies import Base, Recipe

    def failing(base: Base, *, how: str) -> Recipe:
        """Everything is trained, until the second step of rank 1."""
        from transformers import TrainerCallback

        class Fail(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step == 2 and os.environ["RANK"] == "1":
                    if how == "killed":
                        os.kill(os.getpid(), 9)
                    raise OverflowError("the second rank has had enough\\nand more")

        return Recipe(callbacks=(Fail(),))
'''


BOTH = """E0101 failed (exitcode: 1) local_rank: 0 (pid: 5) of binary: python
[1]:
  rank      : 1 (local_rank: 1)
  exitcode  : {} (pid: 6)  (SIG)
Root Cause (first observed failure):
"""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "failed (exitcode: -9) local_rank: 1 (pid: 6) of binary: python",
            ("1", "killed by signal 9 (out of memory?)"),
        ),
        (BOTH.format(-11), ("1", "killed by signal 11")),
        (BOTH.format(-15), (0, "the connection is gone")),  # the launcher ends the others so
        ("the rank died with <Signals.SIGKILL: 9>", (0, "killed by signal 9 (out of memory?)")),
    ],
)
def test_a_killed_rank_is_found_in_the_launchers_words(tmp_path, text, said):
    """Whoever else failed of it, in the same moment, is not to blame."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "launcher.log").write_text(text)
    other = {"rank": 0, "message": "the connection is gone", "time": 1.0, "log": "l", "status": 1}
    (tmp_path / "logs" / "rank-0.error.json").write_text(json.dumps(other))
    error = launcher.first_error(tmp_path)
    assert (error["rank"], error["message"]) == said


@pytest.mark.parametrize("how", ["raises", "killed"])
def test_a_rank_that_fails_stops_the_others(start, forks, small, tmp_path, how):
    found = plugin.install(tmp_path, "fragile", FAILING, failing=f"# fails\nname: failing\nhow: {how}\n")
    words = (*small, *LONG, "strategy=failing", f"run_dir={tmp_path / 'run'}")
    ftdist = ("ftdist",) if how == "killed" else (forks.python, "-m", "ftdist.cli")
    process = start(*ftdist, "train", *words, cwd=tmp_path, env=found)
    metrics = tmp_path / "run" / "metrics.jsonl"
    until(metrics.is_file, process)
    processes = family(process)
    stdout, stderr = process.communicate(timeout=200)
    assert process.returncode == 1, stderr
    lines = [line for line in stderr.splitlines() if line.startswith("ftdist:")]
    assert stderr.splitlines()[-1] == lines[-1]
    if how == "raises":
        assert lines == [
            f"ftdist: rank 1: OverflowError: the second rank has had enough (log: {tmp_path}/run/logs/rank-1.log)"
        ]
        assert "Traceback" in (tmp_path / "run" / "logs" / "rank-1.log").read_text()
    else:
        assert len(lines) == 1 and lines[0].startswith("ftdist: rank 1: killed by signal 9"), lines
    assert "run: " not in stdout
    assert gone(processes)
    assert not (tmp_path / "run" / "final").exists()
    report.write([tmp_path / "run"])
    reason = lines[0].removeprefix("ftdist: ").partition(" (log")[0].partition(" (out")[0]
    assert f"It failed: {reason}" in (tmp_path / "run" / "report.html").read_text()
