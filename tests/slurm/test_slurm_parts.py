"""What surrounds a job, without a SLURM: times, names of GPUs, checks of nodes, words for states."""

import errno
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import yaml
from nodes import IPV6_ALONE, SCRIPT, until

from ftdist import batch, follow, forecast, launcher, lease, preflight, resume, rundir, stops, submit
from ftdist import job as job_module
from ftdist import node as node_module
from ftdist import scheduler as slurm
from ftdist.errors import Failed, UserError
from ftdist.job import conclude
from ftdist.plan import hardware
from ftdist.sweep import array
from ftdist.sweep import start as sweep

REPOSITORY = Path(__file__).parents[2]
VALUES = {"name": "auto", "match": None, "memory": None, "capability": None, "price_per_hour": 2.0}


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("1-02:03:04", 93784), ("2:03:04", 7384), ("3:04", 184), ("UNLIMITED", None), ("INVALID", None)],
)
def test_times_of_slurm(text, seconds):
    assert slurm.seconds(text) == seconds


@pytest.mark.parametrize(
    ("kind", "name"),
    [("h100", "h100"), ("a100", "a100"), ("NVIDIA H200", "h200"), ("nvidia_h100_80gb_hbm3", "h100"), (None, "cpu")],
)
def test_gpus_by_the_scheduler_s_names(kind, name):
    found = hardware.elsewhere(VALUES, kind)
    assert found["name"] == name and found["price_per_hour"] == 2.0
    assert (found["memory"] is None) == (kind is None)


@pytest.mark.parametrize("kind", ["", "tesla_k80"])
def test_gpus_that_nothing_is_known_of(kind):
    with pytest.raises(UserError, match="hardware=h100"):
        hardware.elsewhere(VALUES, kind)


@pytest.mark.parametrize(("text", "size"), [("64G", 2**36), ("100", 100 * 2**20), ("0", None), (None, None)])
def test_memory_as_sbatch_reads_it(text, size):
    assert slurm.memory_bytes(text) == size


def test_memory_that_is_none():
    with pytest.raises(UserError, match="cluster.memory=lots"):
        slurm.memory_bytes("lots")


def test_a_script_is_of_whole_lines():
    text = slurm.script({"comment": "a 'b' $HOME", "requeue": True}, ["export A=1"], ["python", "x y"])
    assert "#SBATCH --requeue\n" in text and "exec python 'x y')" in text
    for value in ("a\nb", "a\rb", "a\x00"):
        with pytest.raises(UserError, match="comment="):
            slurm.script({"comment": value}, [], ["true"])
    with pytest.raises(UserError, match=r"cluster.environment.1A"):
        slurm.setup(modules=[], environment={"1A": 1}, setup=[])


@pytest.fixture
def answers(tmp_path):
    (tmp_path / preflight.WORD).mkdir()
    found = []
    for number in range(2):
        (tmp_path / preflight.WORD / f"node-{number}").write_text("word")
        found.append({"node": f"node{number + 1}", "id": number, "sees": True, "versions": {"torch": "2.13"},
                      "free": 2**40, "temporary": "/tmp", "gpus": 8, "late": 0.1})  # fmt: skip
    return found


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sees": "No such file or directory"}, "node2: run directory"),
        ({"versions": {"torch": "2.12"}}, "node2: versions: torch 2.12, 2.13 on node1"),
        ({"gpus": 7}, "node2: devices: torch sees 7 of 8 GPUs"),
        ({"free": 2**29}, "node2: local disk: 0.5 GiB"),
        ({"late": 3600.0}, "node2: clock: 3600 s behind"),
        ({"node": "node9"}, "node2: answer"),
    ],
)
def test_a_node_that_is_not_as_the_others(answers, tmp_path, change, said):
    checked = (["node1", "node2"], tmp_path, "word", 8, 1.0)
    preflight.judge(answers, *checked)
    with pytest.raises(Failed, match=said):
        preflight.judge([answers[0], answers[1] | change], *checked)


def test_starts_without_progress(tmp_path):
    restarts = itertools.count()

    def start(step, job="7"):
        rundir.record(tmp_path, None, "job", step, job=job, restart=next(restarts))

    start(None)
    assert batch.fruitless(tmp_path, "7") == 0
    start(None)
    start(None)
    assert batch.fruitless(tmp_path, "7") == 2
    (tmp_path / "checkpoints" / "step-00000003").mkdir(parents=True)
    assert batch.fruitless(tmp_path, "7") == 0
    start(3, job="8")
    start(3)
    assert batch.fruitless(tmp_path, "7") == 0


def job(state, reason="", nodes=""):
    return {"7": slurm.Job("7", state, reason, None, nodes)}


def words(run_dir, jobs):
    found = follow.state(run_dir, jobs)
    return found["state"], found["detail"]


def test_words_for_what_a_run_does(tmp_path):
    (tmp_path / "config.yaml").touch()
    rundir.write_json(tmp_path / "plan.json", {"total_steps": 100, "real_tokens_per_step": 50})
    assert words(tmp_path, {})[0] == "killed"
    rundir.write_json(tmp_path / "job.json", {"job": "7", "prepare": None, "submitted": time.time()})
    assert words(tmp_path, job("PENDING", "Priority")) == ("queued", "Priority")
    (tmp_path / ".training").touch()
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 40, "loss": 1.0, "tokens_per_second": 10.0}) + "\n")
    assert words(tmp_path, job("RUNNING", nodes="node[1-2]")) == ("running", "on node[1-2]")
    assert follow.state(tmp_path, job("RUNNING"))["seconds_left"] == 60 * 50 / 10
    rundir.record(tmp_path, None, "requeue", 40, reason="pre-empted")
    assert words(tmp_path, job("PENDING", "BeginTime")) == ("pre-empted", "pre-empted; waits again (BeginTime)")
    assert words(tmp_path, job("RESV_DEL_HOLD"))[0] == "pre-empted"
    assert words(tmp_path, job("OUT_OF_MEMORY"))[0] == "failed"
    assert words(tmp_path, job("CANCELLED"))[0] == "cancelled"
    rundir.write_json(tmp_path / "outcome.json", {"outcome": "stopped", "reason": "ftdist stop", "status": 75})
    assert words(tmp_path, job("FAILED")) == ("stopped", "ftdist stop")
    (tmp_path / "final").mkdir()
    assert words(tmp_path, job("COMPLETED"))[0] == "done"
    assert words(tmp_path, job("FAILED"))[0] == "stopped"  # trained, and its evaluation was not


@pytest.mark.parametrize(
    ("state", "active"),
    [("RESV_DEL_HOLD", True), ("POWER_UP_NODE", True), ("COMPLETING", True), ("DEADLINE", False), ("PREEMPTED", False)],
)
def test_words_for_jobs_that_are_over(state, active):
    """They are the closed list: a word that is new to us is not taken for an end."""
    assert job(state)["7"].active is active


KNOWN = ["nodes", "gpus_per_node", "time", "output", "array", "wait", "test-only", "gpus_per_task", "mem_per_cpu",
         "mem-per-gpu", "cpus_per_gpu", "part"]  # fmt: skip


@pytest.mark.parametrize("key", KNOWN)
def test_options_that_the_plan_would_not_know_of(key):
    with pytest.raises(UserError, match=rf"cluster\.sbatch\.{key}=2: .*use the key of `cluster`"):
        slurm.refuse_own({"nice": 100, key: 2})
    with pytest.raises(UserError, match="SLURM_CLUSTERS=other"):
        slurm.refuse_own({"clusters": "other"})
    slurm.refuse_own({"nice": 100, "exclude": "node9", "gres_flags": "enforce-binding", "time_min": "1:00"})


# --- a job's own process ---------------------------------------------------------------------------

LISTENS = """
import pathlib, sys, time
from ftdist import batch
here = pathlib.Path(sys.argv[1])
(here / "up").touch()
while not (here / "go").exists(): time.sleep(0.01)
batch.listen()
while not batch._signals: time.sleep(0.01)
print(*batch._signals, flush=True)
sys.exit(7)
"""


@pytest.mark.parametrize(("signal_first", "lines"), [(False, []), (True, ["kill -TERM $$", "false"])])
def test_a_signal_that_comes_too_early(signal_first, lines, tmp_path):
    """Before the batch process listens, or while the lines before it run, one of which it may have broken."""
    text = slurm.script({}, lines, [sys.executable, "-c", LISTENS, str(tmp_path)])
    script = subprocess.Popen(["bash", "-c", text], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    until((tmp_path / "up").exists)
    if not signal_first:
        script.send_signal(signal.SIGUSR1)  # bash has told nobody yet when the process begins to listen
    (tmp_path / "go").touch()
    said, _ = script.communicate(timeout=60)
    assert script.returncode == 7 and said.split()[0] == ("SIGTERM" if signal_first else "SIGUSR1"), said


def test_a_process_that_ends_of_the_signal_while_the_script_passes_it_on(tmp_path):
    """The interrupted `wait` has another status than the process, which is gone before the script looks again."""
    ends = "signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75)); pathlib.Path('up').touch(); signal.pause()"
    gone = 'while builtin kill -0 "$batch" 2>/dev/null; do :; done'
    slow = f'kill() {{ builtin kill "$@" || return; [ "$1" = -0 ] || {gone}; }}'
    text = slurm.script({}, [slow], [sys.executable, "-c", f"import pathlib, signal, sys; {ends}"])
    script = subprocess.Popen(["bash", "-c", text], cwd=tmp_path)
    until((tmp_path / "up").exists)
    script.send_signal(signal.SIGUSR1)
    assert script.wait(60) == 75


def test_a_line_that_fails_ends_the_job():
    text = slurm.script({}, ["false", "echo on"], ["echo", "began"])
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    text = slurm.script({}, ["true"], ["bash", "-c", "echo began; exit 93"])
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (93, "began\n")


def test_train_sbatch_is_such_a_script():
    text = (REPOSITORY / "slurm" / "train.sbatch").read_text()
    assert slurm.KEEPS in text and text.endswith(slurm.BEGINS % 'python3 -m ftdist.batch words "$@"')


@pytest.fixture
def in_a_job(tmp_path, monkeypatch, programs):
    """A job of one node that SLURM knows nothing special of; the batch process' part of it."""
    programs(scontrol=in_scontrol())
    monkeypatch.setattr(slurm, "hosts", lambda nodes: [nodes])
    monkeypatch.setattr(slurm, "left", lambda number: None)
    monkeypatch.setattr(slurm, "address", lambda node: node)
    monkeypatch.setattr(slurm, "binds", lambda: False)
    monkeypatch.setattr(batch, "_signals", [])
    monkeypatch.setattr(slurm.time, "sleep", lambda seconds: None)
    place = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1", "FTDIST_LEASE": "", "FTDIST_GRACE": ""}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    token = lease.take(tmp_path).token
    cluster = yaml.safe_load((REPOSITORY / "conf" / "cluster" / "slurm.yaml").read_text())
    config = {"cluster": cluster | {"processes": 1, "gpus": 0}, "health": {"grace_seconds": 1}}
    job = batch.Job(tmp_path, config, "7", token)
    monkeypatch.setattr(job, "preflight", lambda: ("node1", 20000))
    return job


def says(job, message, status=1, name=None):
    rank = {"rank": 0, "time": time.time(), "message": message, "status": status, "log": "", "lease": str(job.token),
            "signal": name}  # fmt: skip
    rundir.write_json(job.run_dir / "logs" / "rank-0.error.json", rank)
    return status


def torch_s_words():
    import torch.distributed as dist

    with socket.create_server(("127.0.0.1", 0)) as other:
        try:
            dist.TCPStore("127.0.0.1", other.getsockname()[1], 2, is_master=True)
        except dist.DistNetworkError as failure:
            return f"DistNetworkError: {failure}"


def test_a_port_that_is_taken_meanwhile(in_a_job, monkeypatch, capsys):
    """Another one, and not for ever; any other failure is not the port's."""
    words, starts = torch_s_words(), []

    def ranks(command, **_):
        starts.append(command)
        if len(starts) < 3:
            return says(in_a_job, words)
        rundir.write_json(in_a_job.run_dir / "outcome.json", {"status": 0})
        return 0

    monkeypatch.setattr(in_a_job, "follow", ranks)
    in_a_job.start()
    assert len(starts) == 3
    assert capsys.readouterr().out.count("the port was taken meanwhile") == 2
    starts.clear()
    monkeypatch.setattr(in_a_job, "follow", lambda command, **_: starts.append(command) or says(in_a_job, words))
    with pytest.raises(Failed, match="EADDRINUSE"):
        in_a_job.start()
    assert len(starts) == batch.ATTEMPTS
    starts.clear()
    monkeypatch.setattr(in_a_job, "follow", lambda command, **_: starts.append(command) or says(in_a_job, "a bug"))
    with pytest.raises(Failed, match="a bug"):
        in_a_job.start()
    assert len(starts) == 1


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """`programs(squeue="…")`: shell scripts in the place of SLURM's commands; gives the file of what they are told."""
    folder, told = tmp_path / "programs", tmp_path / "told"
    folder.mkdir()
    told.touch()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def programs(**scripts):
        for name, text in scripts.items():
            (folder / name).write_text(f'#!/bin/bash\necho "{name} $*" >>{told}\n{text}\n')
            (folder / name).chmod(0o755)
        return told

    return programs


@pytest.mark.parametrize(("own", "member"), [("12", "1"), ("14", "0")])
def test_a_member_of_an_array_asks_for_itself_alone(own, member, programs, tmp_path, monkeypatch):
    """SLURM gives the last member that starts the number of the array, by which all of them are meant."""
    answers = {"12_0": ("JobId=14 JobState=RUNNING", "5:00"), "12_1": ("JobId=12 JobState=PREEMPTED", "7:00")}
    both = "12) {0}; {1} ;; 12_0|14) {0} ;; 12_1) {1} ;;"
    shown = both.format(*(f"echo {said}" for said, _ in answers.values()))
    told = programs(
        scontrol=f"""case "${{@: -1}}" in {shown} esac""",
        squeue=f"""case "$3" in {both.format(*(f"echo {left}" for _, left in answers.values()))} esac""",
    )
    place = {"SLURM_JOB_ID": own, "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": member}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(batch, "LEAVE", 0.0)
    assert slurm.show(slurm.own_name())["JobId"] == own
    assert slurm.left(slurm.own_name()) == (300 if member == "0" else 420)
    assert batch.requeue(tmp_path, own, "SIGUSR1", 0.0) == 75
    assert told.read_text().splitlines()[-1] == f"scontrol requeue 12_{member}"


def in_scontrol(**fields):
    """A script that shows such a job: it runs since a minute, of ten hours."""
    shown = {"JobState": "RUNNING", "StartTime": "2026-01-02T03:00:00", "RunTime": "00:01:00", "TimeLimit": "10:00:00"}
    return "echo " + " ".join(f"{key}={value}" for key, value in (shown | fields).items())


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, "SIGUSR1"),
        ({"RunTime": "09:59:00"}, "time limit"),
        ({"PreemptTime": "2026-01-02T03:04:05"}, "pre-empted"),
        ({"PreemptTime": "2026-01-01T03:04:05"}, "SIGUSR1"),  # an earlier start
        ({"JobState": "CANCELLED"}, None),
    ],
)
def test_a_signal_is_passed_on_before_anybody_is_asked_what_it_means(fields, reason, in_a_job, programs):
    """A controller that is slow costs no time that the save has; its answer is in outcome.json in the end."""
    told = programs(scontrol=in_scontrol(**fields), squeue="echo 9:00:00")
    told.write_text("")
    run_dir = in_a_job.run_dir
    (run_dir / stops.RUNNING).touch()
    rundir.record(run_dir, None, "job", None, job="7", restart=0)
    batch._signals.append("SIGUSR1")
    saves = f"until [ -e {run_dir / stops.REQUEST} ]; do sleep 0.01; done"
    assert in_a_job.follow(["bash", "-c", saves], trains=True) == 0
    assert stops.requested(run_dir) == "SIGUSR1" and not told.read_text()
    rundir.write_json(run_dir / "outcome.json", {"outcome": "stopped", "reason": "SIGUSR1", "step": 3, "status": 75})
    failure = Failed("stopped (SIGUSR1) after step 3", 75)
    assert in_a_job.verdict(failure) == (failure, reason)
    assert launcher.outcome_of(run_dir)["reason"] == (reason or "cancelled")


PREEMPTED = {"PreemptTime": "2026-01-02T03:04:05"}


@pytest.mark.parametrize(
    ("name", "status", "fields", "reason"),
    [
        ("SIGTERM", 75, PREEMPTED, "pre-empted"),
        ("SIGTERM", 75, {}, "SIGTERM"),
        ("Ctrl-C", 75, {}, None),
        (None, 1, PREEMPTED, "pre-empted"),
        (None, 1, {}, None),
    ],
)
def test_a_signal_to_the_tasks_alone(name, status, fields, reason, in_a_job, programs, monkeypatch):
    """Before training, as pre-emption sends it where a site has not set preempt_send_user_signal."""
    programs(scontrol=in_scontrol(**fields))
    rundir.record(in_a_job.run_dir, None, "job", None, job="7", restart=0)
    monkeypatch.setattr(in_a_job, "follow", lambda command, **_: says(in_a_job, "ended", status, name))
    monkeypatch.setattr(in_a_job, "lost", lambda: None)
    with pytest.raises(Failed) as failure:
        in_a_job.start()
    assert failure.value.status == (75 if reason else status)  # not a failure that is tried again inside the job
    assert in_a_job.verdict(failure.value) == (failure.value, reason)


@pytest.mark.parametrize(("ended", "status", "reason"), [(143, 75, "SIGTERM"), (138, 75, "SIGUSR1"), (137, 1, None)])
def test_a_signal_outside_training(ended, status, reason, in_a_job, monkeypatch):
    """To the checks of the nodes, or to the evaluation; a status that the job's table does not have is a failure."""
    rundir.record(in_a_job.run_dir, None, "job", None, job="7", restart=0)
    monkeypatch.setattr(in_a_job, "follow", lambda *_, **__: ended)
    monkeypatch.setattr(in_a_job, "lost", lambda: None)
    for part in (in_a_job.evaluate, lambda: batch.Job.preflight(in_a_job)):
        with pytest.raises(Failed) as failure:
            part()
        assert failure.value.status == status
        assert in_a_job.verdict(failure.value) == (failure.value, reason)


def test_a_node_that_fails_its_check_is_named(in_a_job, monkeypatch):
    """Though srun ends the tasks of the others, which shows as their signal."""

    def other(command, read, **_):
        read("srun: error: node2: task 1: Exited with exit code 1\n")
        return 143

    monkeypatch.setattr(in_a_job, "follow", other)
    with pytest.raises(Failed, match="node1: answer") as failure:
        batch.Job.preflight(in_a_job)
    assert failure.value.status == 1


@pytest.mark.parametrize(("sent", "status"), [({signal.SIGTERM}, 75), (set(), 1)])
def test_a_rank_that_cannot_listen_yet(sent, status, tmp_path):
    """A signal that its node has passed on ends it as asked; the same from elsewhere is a failure."""
    (tmp_path / "logs").mkdir()
    rank = subprocess.Popen(["sleep", "60"])
    rank.terminate()
    assert node_module.wait({0: rank}, tmp_path, 1.0, sent) == (0 if sent else 1)
    with pytest.raises(Failed) as failure:
        launcher.judge(tmp_path, 1)
    assert failure.value.status == status
    assert launcher.first_error(tmp_path)["signal"] == ("SIGTERM" if sent else None)


def test_a_rank_that_is_signalled_before_training(tmp_path):
    (tmp_path / "logs").mkdir()
    text = """
        import os, pathlib, signal, sys
        from functools import partial
        from ftdist import stops, worker
        stops.listen(partial(worker.fail, pathlib.Path(sys.argv[1])))
        os.kill(os.getpid(), signal.SIGUSR1)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(text), str(tmp_path)], env=os.environ | {"RANK": "0"})
    said = launcher.first_error(tmp_path)
    assert done.returncode == 75 == said["status"] and said["signal"] == "SIGUSR1"


def full(*_):
    raise OSError(errno.EDQUOT, "Disk quota exceeded")


def test_a_request_that_cannot_be_written(in_a_job, monkeypatch, capsys):
    """The ranks are told by a signal, and save: that the quota was used up, does not end them without it."""
    run_dir = in_a_job.run_dir
    (run_dir / stops.RUNNING).touch()
    batch._signals.append("SIGUSR1")
    monkeypatch.setattr(stops, "request", lambda *_: until((run_dir / "up").exists) or full())
    saves = f"trap 'exit 75' TERM; touch {run_dir}/up; while true; do sleep 0.01; done"
    assert in_a_job.follow(["bash", "-c", saves], trains=True) == 75
    assert "stop.json: Disk quota exceeded; the ranks are told by SIGTERM" in capsys.readouterr().out


def test_a_full_disk_ends_a_job_in_order(in_a_job, monkeypatch, capsys):
    run_dir = in_a_job.run_dir
    lease.release(run_dir, in_a_job.token)
    monkeypatch.setattr(rundir, "read_config", lambda _: {"cluster": in_a_job.cluster, "health": in_a_job.health})
    monkeypatch.setattr(batch.Job, "train", full)
    monkeypatch.setattr(batch.Job, "lost", lambda _: None)
    assert batch.run(run_dir) == 1
    assert launcher.outcome_of(run_dir)["outcome"] == "failed" and "Disk quota exceeded" in capsys.readouterr().err


def test_a_job_that_is_requeued_ends_when_it_is_told_to(programs, tmp_path):
    """SLURM sends SIGTERM, and would wait for KillWait until it kills."""
    programs(scontrol="kill -TERM $PPID")
    text = "from ftdist import batch; batch.listen(); batch.requeue(pathlib.Path(sys.argv[1]), '7', 'SIGUSR1', 9)"
    words = [sys.executable, "-c", f"import pathlib, sys; {text}", str(tmp_path)]
    done = subprocess.run(words, env=os.environ | {"SLURM_JOB_ID": "7"}, timeout=60)
    assert done.returncode == -signal.SIGTERM


def test_a_member_of_a_sweep_hears_the_signals_of_its_job(tmp_path):
    text = """
        import os, runpy, signal, sys
        from ftdist import batch
        from ftdist.sweep import array
        def member(sweep_dir, number):
            os.kill(os.getpid(), signal.SIGUSR1)
            return 75 if batch.told_to_end() else 0
        array.member = member
        runpy.run_module("ftdist.batch", run_name="__main__")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(text), "member", str(tmp_path), "0"])
    assert done.returncode == 75


SRUN = """
import pathlib, signal, sys, time
here, heard = pathlib.Path(sys.argv[1]), []
def interrupt(*_):
    heard.append(time.monotonic())
    if len(heard) > 1 and heard[-1] - heard[-2] < 1:
        (here / "aborted").touch()
        sys.exit(1)
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as its tasks do, which it passes it on to
signal.signal(signal.SIGINT, interrupt)
(here / "up").touch()
while True: signal.pause()
"""


def test_a_step_that_does_not_end_by_itself(tmp_path, monkeypatch):
    """srun ends it when it is interrupted twice within a second; killed, it would leave its tasks behind."""
    monkeypatch.setattr(batch, "POLITE", 0.1)
    step = subprocess.Popen([sys.executable, "-c", SRUN, str(tmp_path)], text=True)
    until((tmp_path / "up").exists)
    batch._end(step)
    assert step.wait(60) == 1 and (tmp_path / "aborted").exists()


@pytest.mark.parametrize("verb", ["finish", "prepare"])
def test_what_has_nothing_to_save_is_ended_by_a_signal(verb, tmp_path):
    text = f"""
        import os, signal, sys
        from ftdist import batch
        batch.{verb} = lambda run_dir: os.kill(os.getpid(), signal.SIGTERM)
        batch.main(["{verb}", sys.argv[1]])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(text), str(tmp_path)])
    assert done.returncode == -signal.SIGTERM


# --- a controller that is away ---------------------------------------------------------------------


@pytest.fixture
def nobody(tmp_path, monkeypatch):
    """A configuration of SLURM whose controller is not there."""
    if shutil.which("scontrol") is None:
        pytest.skip("no SLURM here")
    (tmp_path / "slurm.conf").write_text(
        "ClusterName=none\nSlurmctldHost=here(127.0.0.1)\nSlurmctldPort=1\nAuthType=auth/none\nMessageTimeout=2\n"
        "NodeName=node1 NodeAddr=127.0.0.1\nPartitionName=main Nodes=node1\n"
    )
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))


def test_the_words_of_a_controller_that_is_away(nobody):
    with pytest.raises(slurm.Away):
        slurm.requeue("7")
    with pytest.raises(slurm.Away, match="is the controller up"):
        slurm.node_state("node1")


def away(*_):
    raise slurm.Away("away")


def test_a_rank_s_error_while_nobody_answers(in_a_job, monkeypatch):
    """It is the job's last word, with its own status: what is asked about nodes afterwards hides nothing."""
    monkeypatch.setattr(slurm, "command", away)
    monkeypatch.setattr(slurm, "PATIENCE", 0)
    failure = Failed("rank 0: a bug", 1)
    assert in_a_job.verdict(failure) == (failure, None)
    in_a_job.ended(failure)
    assert launcher.outcome_of(in_a_job.run_dir)["reason"] == "rank 0: a bug"


def test_a_requeue_waits_for_the_controller(tmp_path, monkeypatch, capsys):
    """As long as the job has time, then the last line says what to do."""
    asked = []

    def at_last(*_):
        asked.append(1)
        return subprocess.CompletedProcess([], 0, "", "") if len(asked) > 4 else away()

    clock = itertools.count(0, 10)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(slurm.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(slurm.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(slurm, "command", at_last)
    assert batch.requeue(tmp_path, "7", "time limit", 200.0) == 75 and len(asked) == 5
    said = capsys.readouterr()
    assert said.out.count("away") == 1 and not said.err
    monkeypatch.setattr(slurm, "command", away)
    assert batch.requeue(tmp_path, "7", "time limit", 200.0) == 75
    assert f"not requeued (away); go on with: ftdist resume {tmp_path}" in capsys.readouterr().err


# --- ftdist stop -----------------------------------------------------------------------------------

HOLDS = "import pathlib, signal, sys; from ftdist import lease; lease.take(pathlib.Path(sys.argv[1])); signal.pause()"


@pytest.mark.parametrize(("files", "word"), [([rundir.CLAIM], "preparing"), (["config.yaml", "final/x"], "evaluating")])
def test_stopping_what_reads_no_requests(files, word, tmp_path):
    """A run of this machine that prepares or evaluates: its process is told."""
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    process = subprocess.Popen([sys.executable, "-c", HOLDS, str(tmp_path)])
    try:
        until((tmp_path / "lease.json").exists)
        assert follow.stop(tmp_path) == f"ended while {word}"
        assert process.wait(60) == -signal.SIGTERM
    finally:
        process.kill()
        process.wait()


def test_a_request_outlives_the_beginning_of_the_start_that_it_was_made_to(tmp_path):
    stops.request(tmp_path, "of an earlier start")
    token = lease.take(tmp_path).token
    assert stops.requested(tmp_path) is None
    stops.request(tmp_path, "mine")
    rundir.forget_last_start(tmp_path)  # what the ranks' start does
    assert stops.requested(tmp_path) == "mine"
    lease.release(tmp_path, token)


def test_a_job_that_has_not_begun_is_cancelled(tmp_path, monkeypatch):
    """SLURM says RUNNING, and its batch process has not taken the run yet: it would not see a request."""
    (tmp_path / "config.yaml").touch()
    rundir.write_json(tmp_path / "job.json", {"job": "7", "prepare": None, "submitted": time.time()})
    cancelled = []
    monkeypatch.setattr(follow.shutil, "which", lambda name: name)
    monkeypatch.setattr(slurm, "jobs", lambda ids: job("RUNNING"))
    monkeypatch.setattr(slurm, "cancel", cancelled.extend)
    known = {"JobId": "7", "Restarts": "1"}
    monkeypatch.setattr(slurm, "show", lambda number: known)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    lease.take(tmp_path)  # by the start before this one
    assert "out of the queue" in follow.stop(tmp_path) and cancelled == ["7"]
    known["Restarts"] = "0"
    assert "asked to stop" in follow.stop(tmp_path) and cancelled == ["7"]
    assert stops.requested(tmp_path) == follow.STOP


# --- GPUs of a partition ---------------------------------------------------------------------------

MIXED = "gpu*|intel,a100|gpu:A100:4(S:0-1)\ngpu*|amd,h100|gpu:h100:8,shard:h100:32\ngpu*|amd,h100|gpu:h100:4\n"


@pytest.fixture
def sinfo(monkeypatch):
    """`sinfo(rows)`: what SLURM says of every partition."""

    def sinfo(rows):
        slurm.partition_gpus.cache_clear()
        monkeypatch.setattr(slurm.shutil, "which", lambda name: name)
        monkeypatch.setattr(slurm, "command", lambda *words, **_: subprocess.CompletedProcess(words, 0, rows, ""))

    yield sinfo
    slurm.partition_gpus.cache_clear()


def node(**keys):
    given = {"processes": "auto", "oversubscribe": False, "partition": "gpu", "constraint": None, "gpus": "auto"}
    found = slurm.resolved(**given | {"gpu_type": None, "cpu": False, "known": False} | keys)
    return found["gpus"], found["processes"]


@pytest.mark.parametrize(
    ("rows", "least"),
    [
        (MIXED, {"A100": 4, "h100": 4}),
        ("gpu*|x|gpu:4\ngpu*|x|gpu:2(S:0)\n", {"": 2}),
        ("cpu*|x|(null)\ncpu*|x|gpu:a100\n", {"a100": 1}),
        ("gpu*|x|gpu:1g.10gb:7,gpu:a100_3g.20gb:2\n", {"1g.10gb": 7, "a100_3g.20gb": 2}),
        ("cpu*|x|(null)\ncpu*|x|craynetwork:4\n", {}),
    ],
)
def test_kinds_of_gpu(sinfo, rows, least):
    sinfo(rows)
    assert slurm.partition_gpus("gpu") == least


def test_a_partition_of_several_kinds(sinfo):
    """The plan has to know which: it is told, or refuses with what there is."""
    sinfo(MIXED)
    for keys in ({}, {"gpus": 4}, {"gpus": 4, "processes": 4, "known": True}):
        with pytest.raises(UserError, match=r"partition=gpu has several .*A100 \(4 on a node\), h100 \(4 on a node\)"):
            node(**keys)
    assert node(gpu_type="a100") == (4, 4) and node(constraint="h100&amd") == (4, 4)
    assert node(constraint="intel|ib") == (4, 4) and node(gpus=0, cpu=True) == (0, 1)
    with pytest.raises(UserError, match=r"cluster.gpu_type=v100: .*A100 \(4 on a node\)"):
        node(gpu_type="v100")
    with pytest.raises(UserError, match="cluster.processes=2: 1 GPUs on a node .*oversubscribe"):
        node(processes=2, gpus=1, gpu_type="h100")
    sinfo("gpu*|x|gpu:8\ngpu*|x|(null)\n")
    assert node() == (8, 8) and node(processes=2) == (2, 2)


def test_a_slice_of_a_gpu(sinfo):
    """One of it, and its own memory, whatever the card has."""
    sinfo("mig*|x|gpu:a100_1g.5gb:7\n")
    assert node() == (1, 1)
    with pytest.raises(UserError, match="a100_1g.5gb is a slice of a GPU"):
        node(gpus=2)
    whole = hardware.elsewhere(VALUES | {"bf16_flops": None, "fp32_flops": None, "bandwidth": None}, "a100_1g.5gb")
    part = hardware.sliced(whole, 1, 5)
    assert part["name"] == "a100" and part["memory"] == 5e9 and part["bf16_flops"] == whole["bf16_flops"] / 7
    cluster = {"gpus": 1, "gpu_type": "3g.40gb", "partition": None, "constraint": None, "memory": None}
    named = forecast._in_queue({**whole, "host_memory": None, "name": "a100"}, cluster)
    assert named["memory"] == 40e9


# --- IPv6 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "address"), [(socket.AF_INET6, "::1"), (socket.AF_INET, "127.0.0.1")])
def test_ports_that_somebody_has(family, address):
    """Of either kind: torch listens at both."""
    try:
        other = socket.create_server((address, 0), family=family)
    except OSError:
        pytest.skip(f"no {address} here")
    with other:
        port = other.getsockname()[1]
        assert not preflight._free(port)
    assert preflight._free(port)


def test_ranks_that_meet_over_ipv6(tmp_path):
    """In a network that has nothing else."""
    if subprocess.run([*IPV6_ALONE, "grep", "-q", "0001 .* lo$", "/proc/net/if_inet6"], capture_output=True).returncode:
        pytest.skip("no network of its own to be had")
    ranks = """
        import os, pathlib, sys
        rank = 0 if os.fork() else 1
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        from ftdist import preflight
        status = preflight.as_rank(pathlib.Path(sys.argv[1]), 0.0)
        sys.exit(status or (os.waitstatus_to_exitcode(os.wait()[1]) if rank == 0 else 0))
    """
    (tmp_path / "logs").mkdir()
    place = {"MASTER_ADDR": "::1", "MASTER_PORT": "20001", "WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo"}
    words = [*IPV6_ALONE, sys.executable, "-c", textwrap.dedent(ranks), str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | place, timeout=120)
    assert done.returncode == 0 and "GB/s a rank" in done.stdout, done


# --- ftdist logs, and what is left behind ----------------------------------------------------------


def test_a_local_run_s_logs_are_in_the_order_of_its_steps(tmp_path, capsys):
    (tmp_path / "config.yaml").touch()
    for step in range(1, 5):
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "loss": 1.0}) + "\n")
    for name, step in (("start", 0), ("checkpoint", 2), ("resume", 2), ("finished", 4)):
        rundir.record(tmp_path, None, name, step)
    follow.logs(tmp_path, follow=False)
    said = [re.sub(r"^\d\d:\d\d:\d\d | ·.*", "", line) for line in capsys.readouterr().out.splitlines()]
    ends = "checkpoint at step 2", "resume at step 2", "step 3", "step 4", "finished at step 4"
    assert said == ["start at step 0", "step 1", "step 2", *ends]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_whoever_follows_a_job(number, tmp_path, monkeypatch):
    """`cluster.wait=true` and `ftdist logs --follow`: the run goes on, and that is what is said."""
    monkeypatch.setattr(follow, "_logs", lambda *_: os.kill(os.getpid(), number) or time.sleep(60))
    with pytest.raises(Failed, match="the run goes on") as failure:
        follow.logs(tmp_path, follow=True)
    assert failure.value.status == 130


def test_an_evaluation_s_end_is_the_run_s(tmp_path):
    """What was trained stays; how the evaluation went, now and later, is in outcome.json and in `ftdist status`."""
    (tmp_path / "config.yaml").touch()
    (tmp_path / "final").mkdir()
    rundir.write_json(tmp_path / "outcome.json", {"outcome": "finished", "reason": None, "step": 30, "status": 0})
    token = lease.take(tmp_path).token

    def ends(failure):
        def end():
            raise failure

        with pytest.raises(type(failure)):
            conclude(tmp_path, token, end)
        lease.release(tmp_path, token)
        found = words(tmp_path, {}), launcher.outcome_of(tmp_path)["status"]
        assert launcher.outcome_of(tmp_path)["step"] == 30
        return found

    assert ends(Failed("stopped (SIGTERM)", 75)) == (("stopped", "evaluation: stopped (SIGTERM)"), 75)
    token = lease.take(tmp_path).token
    assert ends(RuntimeError("a bug")) == (("failed", "evaluation: a bug"), 1)
    token = lease.take(tmp_path).token
    conclude(tmp_path, token, lambda: None)
    lease.release(tmp_path, token)
    assert words(tmp_path, {})[0] == "done" and launcher.outcome_of(tmp_path)["outcome"] == "finished"


def test_a_number_that_is_another_process_by_now(tmp_path):
    """cluster.sh kills its own daemons alone."""
    (tmp_path / "run").mkdir()
    (tmp_path / "settings").write_text("SEPARATE=none\nTRACK=linuxproc\nNODES=1\nNAME=node\n")
    other = subprocess.Popen(["sleep", "600"])
    try:
        for name in ("slurmd.node1", "slurmctld", "munged"):
            (tmp_path / "run" / f"{name}.pid").write_text(f"{other.pid}\n")
        environment = os.environ | {"CLUSTER": str(tmp_path)}
        lost = subprocess.run([SCRIPT, "lose", "node1"], env=environment, capture_output=True, text=True)
        assert lost.returncode == 1 and "node1 has no daemon" in lost.stderr
        assert subprocess.run([SCRIPT, "down"], env=environment).returncode == 0
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


# --- the keys of `cluster` -------------------------------------------------------------------------

CLUSTER = yaml.safe_load((REPOSITORY / "conf" / "cluster" / "slurm.yaml").read_text()) | {"gpus": 0, "processes": 1}
RENDERED = {
    "nodes": (3, "--nodes=3"),
    "job_name": ("a b", "--job-name='a b'"),
    "account": ("me", "--account=me"),
    "partition": ("gpu,long", "--partition=gpu,long"),
    "qos": ("it's", """--qos='it'"'"'s'"""),
    "constraint": ("a100&ib|h100", "--constraint='a100&ib|h100'"),
    "reservation": ("mon", "--reservation=mon"),
    "time": ("1-00:00:00", "--time=1-00:00:00"),
    "gpus": (8, "--gpus-per-node=8"),
    "cpus": (64, "--cpus-per-task=64"),
    "memory": ("200G", "--mem=200G"),
    "exclusive": (True, "--exclusive"),
    "mail_type": ("END,FAIL", "--mail-type=END,FAIL"),
    "mail_user": ("me@here", "--mail-user=me@here"),
    "signal_seconds": (300, "--signal=B:USR1@300"),
    "sbatch": ({"nice": 100, "no_kill": True, "comment": "$x"}, "--comment='$x'"),
}


def script(run_dir=Path("/runs/one"), **keys):
    job_module.check_cluster(CLUSTER | keys)
    return submit.text(run_dir, CLUSTER | keys)


@pytest.mark.parametrize("key", RENDERED)
def test_what_sbatch_is_told(key):
    value, line = RENDERED[key]
    assert f"#SBATCH {line}\n" in script(**{key: value})
    if not isinstance(value, (dict, int)):
        for bad in ("a\nb", "a\x1bb"):
            with pytest.raises(UserError, match=rf"^cluster\.{key}='a\\"):
                script(**{key: bad})


def test_nothing_that_was_not_said_is_told():
    told = {line.split("=")[0].split("--")[1] for line in script().splitlines() if line.startswith("#SBATCH")}
    assert told == {"job-name", "nodes", "ntasks-per-node", "signal", "requeue", "open-mode", "output"}
    assert "#SBATCH --gres=gpu:h100:8\n" in script(gpus=8, gpu_type="h100", gpu_option="gres")
    assert "#SBATCH --gpus-per-node=h100:8\n" in script(gpus=8, gpu_type="h100")
    assert slurm.array(8, array_throttle=2) == "0-7%2" and slurm.array(8, array_throttle=None) == "0-7"
    prepares = submit.preparation(
        Path("/runs/one"), CLUSTER | {"gpus": 8, "exclusive": True, "prepare_partition": "cpu"}
    )
    assert "--partition=cpu\n" in prepares and "gpus" not in prepares and "--exclusive" not in prepares


@pytest.mark.parametrize(
    ("key", "value"),
    [("acount", "me"), ("gpu_option", "gpus"), ("signal_seconds", 0), ("cpus", 0), ("exclusive", "maybe"), ("time", 90),
     ("modules", 3), ("prepare", "there"), ("max_requeues", -1), ("network_check", -1), ("array_throttle", 0),
     ("preflight_seconds", 0), ("wrapper", "apptainer")],
)  # fmt: skip
def test_keys_that_cannot_be_meant(key, value):
    with pytest.raises(UserError, match=rf"cluster\.{key}"):
        script(**{key: value})


def test_what_comes_before_the_program(tmp_path):
    """Modules, variables and lines, through a shell, with whatever is in them."""
    odd = """it's "$HOME" `id` \\ #x"""
    keys = {"modules": ["cuda/12 x", "gcc"], "environment": {"ODD": odd, "NUMBER": 2}, "setup": ['echo "set $NUMBER"']}
    before = slurm.setup(**keys)
    text = slurm.script({}, ["module() { printf '<%s>' \"$@\"; }", *before], ["sh", "-c", 'printf %s "$ODD"'])
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True)
    assert done.stdout == f"<load><cuda/12 x><load><gcc>set 2\n{odd}" and done.returncode == 0, done
    for name in ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET", "db_password"):
        with pytest.raises(UserError, match=rf"cluster\.environment\.{name}: .*export {name}") as refused:
            script(environment={name: "s3cret"})
        assert "s3cret" not in str(refused.value)
    assert "export TOKENIZERS_PARALLELISM=true" in script(environment={"TOKENIZERS_PARALLELISM": "true"})
    for name, value in (("modules", ["a\nb"]), ("environment", {"A": "a\nb"}), ("setup", ["a\nb"])):
        with pytest.raises(UserError, match=rf"cluster\.{name}.*line breaks"):
            script(**{name: value})


def test_the_program_in_a_container(in_a_job):
    job = in_a_job
    keys = {"container_image": "nv#x y.sqsh", "container_mounts": "/a:/a", "wrapper": [], "python": "/opt/python"}
    job.more, job.before = slurm.in_task(**keys)
    command = job.task("ftdist.node", "one")
    assert command[-6:] == ["--container-image=nv#x y.sqsh", "--container-mounts=/a:/a", "/opt/python", "-m",
                            "ftdist.node", "one"]  # fmt: skip
    keys = {
        "container_image": None,
        "container_mounts": None,
        "wrapper": ["apptainer", "exec", "i.sif"],
        "python": None,
    }
    job.more, job.before = slurm.in_task(**keys)
    assert job.task("ftdist.node")[-6:] == ["apptainer", "exec", "i.sif", sys.executable, "-m", "ftdist.node"]


def test_logs_in_odd_directories():
    assert "--output='/a 100%% b/logs/job-%j.log'" in script(Path("/a 100% b"))
    with pytest.raises(UserError, match="backslash"):
        script(Path("/a\\b"))


def test_a_job_that_was_killed_is_over(tmp_path, monkeypatch):
    """Though its batch process could not give the lease back, and no signs of life are missed yet."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    lease.take(tmp_path)
    (tmp_path / "config.yaml").touch()
    elsewhere = rundir.read_json(tmp_path / "lease.json") | {"host": "node1"}
    rundir.write_json(tmp_path / "lease.json", elsewhere)
    rundir.write_json(tmp_path / "job.json", {"job": "7", "prepare": None, "submitted": time.time()})
    rundir.write_json(tmp_path / "outcome.json", {"outcome": "stopped", "reason": "SIGTERM", "status": 75})
    assert words(tmp_path, {})[0] == "ending"
    assert words(tmp_path, job("CANCELLED")) == ("stopped", "SIGTERM")


# --- a submission -----------------------------------------------------------------------------------


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """`commands(sbatch="echo 7")`: SLURM's commands are these lines of shell; `$0.said` has what they were told."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def commands(**lines):
        for name, line in lines.items():
            (folder / name).write_text(f'#!/bin/sh\necho "$*" >> "$0.said"\n{line}\n')
            (folder / name).chmod(0o755)
        return folder

    return commands


AWAY = "echo 'Unable to contact slurm controller (connect failure)' >&2; exit 1"


def freezes(run_dir):
    """What `submit.run` does with a new run, its freezing left out."""
    config = {"cluster": CLUSTER | {"check": False, "time": "1:00", "memory": "1G"}, "resume": "never"}
    return submit.run(config, run_dir)


@pytest.fixture
def plain(monkeypatch):
    monkeypatch.setattr(submit.job, "plan", lambda config: {"asks": {}})
    monkeypatch.setattr(submit.job, "freeze", lambda config, run_dir: (run_dir / "config.yaml").touch())


def test_a_job_that_was_taken_without_an_answer(commands, plain, tmp_path):
    """Its files stay, and its number is found: at once, or as soon as the controller answers."""
    run_dir = tmp_path / "run"
    folder = commands(sbatch=AWAY, squeue=f"printf '8|/els\\351where\\n7|{run_dir}/job.sbatch\\n'")
    assert freezes(run_dir) == 0
    assert rundir.read_json(run_dir / "job.json")["job"] == "7"
    run_dir = tmp_path / "later"
    commands(squeue=AWAY)
    with pytest.raises(slurm.Away, match=r"later/job\.sbatch is not known, so nothing is removed"):
        freezes(run_dir)
    assert (run_dir / "config.yaml").is_file() and rundir.read_json(run_dir / "job.json")["job"] == follow.UNKNOWN
    commands(
        squeue=f"""case "$*" in *%F*) echo '9|{run_dir}/job.sbatch';; *) echo '9|9|PENDING|1:00||Priority';; esac"""
    )
    with pytest.raises(UserError, match="its job 9 is pending"):
        submit.refuse_active(run_dir)
    assert rundir.read_json(run_dir / "job.json")["job"] == "9"
    assert (folder / "sbatch.said").read_text().count("job.sbatch") == 2


def test_a_submission_that_is_refused(commands, plain, tmp_path):
    """Nothing is left, the job that prepares does not wait for nobody, and an older job's number stays."""
    prepares = 'case "$*" in *prepare.sbatch) echo 6;; *) echo "sbatch: error: no" >&2; exit 1;; esac'
    folder = commands(sbatch=prepares, scancel="")
    (tmp_path / "run").mkdir()
    rundir.write_json(tmp_path / "run" / "job.json", {"job": "5", "prepare": None, "submitted": 1.0})
    with pytest.raises(UserError, match="sbatch refused the job: error: no"):
        submit.queue(tmp_path / "run", CLUSTER, prepare=True)
    assert (folder / "scancel.said").read_text() == "6\n"
    assert rundir.read_json(tmp_path / "run" / "job.json")["job"] == "5"
    with pytest.raises(UserError, match="refused"):
        freezes(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_ctrl_c_while_a_job_is_submitted(commands, plain, tmp_path):
    """It waits for the answer, then takes the job out of the queue; nothing is left."""
    folder = commands(sbatch=f"kill -INT {os.getpid()}; echo 7", scancel="")
    with pytest.raises(KeyboardInterrupt):
        freezes(tmp_path / "run")
    assert (folder / "scancel.said").read_text() == "7\n" and not (tmp_path / "run").exists()


def test_an_array_that_was_taken_without_an_answer(commands, tmp_path):
    """Its tasks find their members, and the sweep its job."""
    commands(sbatch=AWAY, squeue=AWAY)
    (tmp_path / "01").mkdir()
    with pytest.raises(slurm.Away):
        array._submitted(tmp_path, CLUSTER, "member", 1, ["01"])
    commands(squeue=f"echo '9|{tmp_path}/arrays/0.sbatch'")
    assert [told["job"] for told in array._arrays(tmp_path)] == ["9"]
    assert rundir.read_json(tmp_path / "01" / "job.json")["job"] == "9_0"
    commands(sbatch="echo 'sbatch: error: no' >&2; exit 1")
    with pytest.raises(UserError, match="refused"):
        array._submitted(tmp_path, CLUSTER, "member", 1, ["01"])
    assert [file.name for file in (tmp_path / "arrays").glob("*.json")] == ["0.json"]


def test_two_that_submit_a_run_at_once(commands, tmp_path, monkeypatch):
    """One job; while sbatch is asked, the lease is free for the job."""
    commands(squeue="", sbatch="echo 7")
    (tmp_path / "config.yaml").touch()
    monkeypatch.setattr(submit.resume, "changed", lambda *_, **__: None)
    monkeypatch.setattr(submit, "followed", lambda *_: 0)
    config = {"cluster": CLUSTER | {"check": False}, "eval": {"samples": 0}}
    submitted, refused = slurm.submit, []

    def meanwhile(script, *words):
        with lease.held(tmp_path):
            pass
        with pytest.raises(UserError, match="another ftdist submits it now"):
            refused.append(submit.again(tmp_path, config))
        return submitted(script, *words)

    monkeypatch.setattr(slurm, "submit", meanwhile)
    assert submit.again(tmp_path, config) == 0 and not refused
    commands(squeue="echo '7|7|RUNNING|1:00|node1|None'")
    with pytest.raises(UserError, match="its job 7 is running"):
        submit.again(tmp_path, config)


# --- one process -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "nodes"), [(1, 1), (2, 1), (1, 2)])
def test_what_a_rank_is_told(count, nodes, tmp_path, monkeypatch):
    """One process sees one GPU, or transformers would spread it over all; several find each other."""
    told = []
    monkeypatch.setattr(node_module.subprocess, "Popen", lambda *_, env, **__: told.append(env))
    monkeypatch.setattr(node_module, "wait", lambda *_: 0)
    monkeypatch.setattr(node_module.signal, "signal", lambda *_: None)
    monkeypatch.setattr(launcher, "devices", lambda: (2, "GPU"))
    given = {
        "SLURM_NODEID": "0",
        "SLURM_STEP_NUM_NODES": str(nodes),
        "CUDA_VISIBLE_DEVICES": "2,3",
        "FTDIST_GRACE": "1",
    }
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    for deepspeed in (False, True):
        told.clear()
        (tmp_path / "deepspeed.json").touch() if deepspeed else None
        assert node_module.main([str(tmp_path), "head", "20000", str(count), "ftdist.worker"]) == 0
        assert [one["CUDA_VISIBLE_DEVICES"] for one in told] == ["2" if count * nodes == 1 else "2,3"] * count
        alone = count * nodes == 1 and not deepspeed
        world = {one.get("WORLD_SIZE") for one in told}
        assert world == ({None} if alone else {str(count * nodes)})


def test_a_network_of_one_process(in_a_job, monkeypatch, capsys):
    """There is none to be checked."""
    started = []
    in_a_job.cluster["network_check"] = 5
    rundir.write_json(in_a_job.run_dir / "outcome.json", {"status": 0})
    monkeypatch.setattr(in_a_job, "follow", lambda command, **_: started.append(command[-1]) or 0)
    in_a_job.attempt()
    assert started == ["ftdist.worker"] and "left out" in capsys.readouterr().out
    in_a_job.cluster["processes"] = 2
    in_a_job.attempt()
    assert started[1:] == ["ftdist.preflight", "ftdist.worker"]


# --- what is known while SLURM, or a part of it, is away ----------------------------------------------


@pytest.fixture
def submitted(tmp_path):
    (tmp_path / "config.yaml").touch()
    rundir.write_json(tmp_path / "job.json", {"job": "7", "prepare": None, "submitted": time.time()})
    return tmp_path


def test_an_accounting_that_is_away(commands, submitted):
    """It knows of ended jobs, and of nothing that is queued now."""
    commands(squeue="", sacct="echo 'sacct: error: connect to here:6819: Connection refused' >&2; exit 1")
    assert follow.status([submitted])[0]["state"] == "killed"
    commands(squeue=AWAY)
    with pytest.raises(slurm.Away):
        follow.jobs_of([submitted])


def test_a_run_while_the_controller_is_away(commands, submitted, capsys):
    """Files tell whether it runs, and ask it to stop; of one that may wait nothing is claimed."""
    commands(squeue=AWAY)
    assert follow.status([submitted])[0]["state"] == "unknown"
    assert "connect failure" in capsys.readouterr().err
    with pytest.raises(slurm.Away, match="one that waits has to be stopped again"):
        follow.stop(submitted)
    with lease.held(submitted):
        (submitted / stops.RUNNING).touch()
        assert follow.status([submitted])[0]["state"] == "running"
        assert follow.stop(submitted).startswith("asked to stop") and stops.requested(submitted) == follow.STOP
    rundir.write_json(submitted / "outcome.json", {"outcome": "failed", "reason": "a bug", "status": 1})
    assert follow.status([submitted])[0]["state"] == "failed"


def test_the_log_of_an_earlier_launcher(in_a_job):
    """A run that has begun on one machine, where a rank was killed, and fails in SLURM: what fails now is said."""
    logs = in_a_job.run_dir / "logs"
    logs.mkdir(exist_ok=True)
    (logs / "launcher.log").write_text("the rank died with <Signals.SIGKILL: 9>\n")
    says(in_a_job, "a bug")
    rundir.write_json(in_a_job.run_dir / "job.json", {"job": "7", "prepare": None, "submitted": time.time()})
    with pytest.raises(Failed, match="a bug"):
        launcher.judge(in_a_job.run_dir, 1, in_a_job.token)
    with pytest.raises(Failed, match="killed by signal 9"):
        launcher.judge(in_a_job.run_dir, 1)
    lease.release(in_a_job.run_dir, in_a_job.token)
    (in_a_job.run_dir / "config.yaml").touch()
    assert words(in_a_job.run_dir, {}) == ("failed", "a bug")
    (logs / "rank-0.error.json").unlink()
    with pytest.raises(Failed, match=r"without a word .*\(log: .*/logs\)"):
        launcher.judge(in_a_job.run_dir, 1, in_a_job.token)


# --- slurm/train.sbatch ----------------------------------------------------------------------------

H100 = "NVIDIA H100 80GB HBM3", 80 << 30, 9.0
GIVEN = "JobId=7 JobState=RUNNING Partition=gpu Account=me QOS=(null) TimeLimit={} Features=(null) Reservation=mon"


@pytest.mark.parametrize(
    ("gres", "limit", "facts", "asked"),
    [
        ("gpu:h100:8(S:0-1)", "1-00:00:00", H100, {"gpu_type": "h100", "time": "1-00:00:00"}),
        ("gpu:8", "UNLIMITED", H100, {"gpu_type": None, "time": None}),
        ("gpu:mi300x:8", "UNLIMITED", None, {"gpu_type": "mi300x", "time": None}),
    ],
)
def test_a_job_of_train_sbatch_is_asked_for_again(gres, limit, facts, asked, commands, tmp_path, monkeypatch):
    """With what sbatch was told; GPUs are called what SLURM calls them, and planned as what they are."""
    commands(
        scontrol=f'case "$*" in *node*) echo "NodeName=node1 Gres={gres}";; *) echo "{GIVEN.format(limit)}";; esac'
    )
    given = {"JOB_ID": "7", "JOB_NUM_NODES": "1", "GPUS_ON_NODE": "2", "MEM_PER_NODE": "4096", "CPUS_PER_TASK": "8"}
    for name, value in given.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("SLURMD_NODENAME", "node1")
    monkeypatch.setattr(launcher, "gpu_facts", lambda: facts)
    monkeypatch.setattr(job_module, "decide", lambda config: None)
    monkeypatch.setattr(job_module, "plan", lambda config: {})
    monkeypatch.setattr(forecast, "refuse_what_cannot_fit", lambda *_: None)
    monkeypatch.setattr(
        job_module, "freeze", lambda config, run_dir: rundir.write_yaml(run_dir / "config.yaml", config)
    )
    batch.from_words([f"run_dir={tmp_path}/run", "model.path=model", "data.path=chat.jsonl", "strategy=full"])
    config = rundir.read_config(tmp_path / "run")
    same = {"partition": "gpu", "account": "me", "qos": None, "reservation": "mon", "memory": "4096M", "cpus": 8}
    assert {key: config["cluster"][key] for key in asked | same} == asked | same
    assert config["hardware"]["name"] == ("h100" if facts else "auto")
    device = f"{asked['gpu_type']}:2" if asked["gpu_type"] else "2"
    assert f"#SBATCH --gpus-per-node={device}\n" in submit.text(tmp_path / "run", config["cluster"])


# --- memory and time from the plan -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gibibytes", "seconds", "longest", "asks"),
    [
        (10, 3600.0, None, {"memory": "15G", "time": "2:00:00"}),  # 1.25 · 10 + 2; 1.5 h and half an hour
        (0, 1.0, 86400, {"memory": "2G", "time": "0:45:00"}),  # whole GiB and quarters of an hour, upwards
        (10, 3600.0, 5400, {"memory": "15G", "time": "1:30:00"}),
        (100, 360000.0, None, {"memory": "127G", "time": "150:30:00"}),
        (1.7, None, 5400, {"memory": "5G"}),
    ],
)
def test_what_a_plan_wants_of_slurm(gibibytes, seconds, longest, asks):
    assert slurm.wanted(int(gibibytes * 2**30), seconds, longest) == asks
    job_module.check_cluster(CLUSTER | asks)
    assert all(f"={value}\n" in script(**asks) for value in asks.values())


@pytest.mark.parametrize(
    ("partition", "rows", "seconds"),
    [
        (None, "gpu*|12:00:00\ncpu|2-00:00:00\n", 43200),
        ("gpu,cpu", "gpu*|12:00:00\ncpu|2-00:00:00\n", 172800),
        ("gpu", "gpu*|infinite\n", None),
        ("gpu,cpu", "gpu*|12:00:00\ncpu|infinite\n", None),
        ("gone", "", None),
    ],
)
def test_the_longest_time_of_a_partition(partition, rows, seconds, sinfo):
    sinfo(rows)
    assert slurm.longest(partition) == seconds


def test_the_longest_time_that_nobody_tells(commands, tmp_path, monkeypatch):
    folder = commands(sinfo=AWAY)
    assert slurm.longest("gpu") is None
    monkeypatch.setenv("PATH", str(folder))
    (folder / "sinfo").unlink()
    assert slurm.longest("gpu") is None


def test_the_most_that_plans_want():
    """Of all of an array's members; what a user says stays, and so does what is left to the site."""
    plans = [{"asks": {"memory": "9G", "time": "10:00:00"}}, {"asks": {"memory": "10G", "time": "9:45:00"}}]
    none = {"memory": None, "time": None}
    assert slurm.filled(none, plans) == {"memory": "10G", "time": "10:00:00"}
    assert slurm.filled(none | {"time": "1:00:00"}, plans) == {"memory": "10G", "time": "1:00:00"}
    assert slurm.filled({"memory": "0", "time": slurm.SITE}, plans) == {"memory": "0", "time": "site"}
    assert slurm.filled(none, [*plans, {"asks": {"memory": "1G"}}]) == {"memory": "10G", "time": None}
    assert slurm.filled(none, [{"asks": {}}]) == none
    assert "--mem=10G\n" in script(**slurm.filled(none, plans)) and "--time=10:00:00\n" in script(
        **slurm.filled(none, plans)
    )
    left = script(memory=slurm.SITE, time=slurm.SITE)
    assert "--mem" not in left and "--time" not in left


def test_a_search_s_worker_has_no_time_of_a_plan():
    """It runs as many trials as it comes to."""
    configs = [{"cluster": {"memory": None, "time": None}} for _ in range(2)]
    sweep._fill(configs, [{"asks": {"memory": "9G", "time": "1:00:00"}}], searching=True)
    assert configs[1]["cluster"] == {"memory": "9G", "time": None}
    sweep._fill(configs, [{"asks": {"memory": "8G", "time": "1:00:00"}}], searching=False)
    assert configs[0]["cluster"] == {"memory": "9G", "time": "1:00:00"}


def test_a_resume_asks_for_what_its_own_plan_wants(commands, submitted, monkeypatch):
    """One with another engine, or of a run of this machine, whose plan wanted nothing of SLURM."""
    folder = commands(squeue="", sbatch="grep -e --mem -e --time $2 >> $0.script; echo 7")
    monkeypatch.setattr(submit, "followed", lambda *_: 0)
    plan = {"asks": {"memory": "20G", "time": "3:00:00"}}
    monkeypatch.setattr(
        submit.resume, "changed", lambda run_dir, *_, **__: rundir.write_json(run_dir / "plan.json", plan)
    )
    rundir.write_json(submitted / "plan.json", {"total_steps": 3})
    submit.again(submitted, {"cluster": CLUSTER | {"check": False, "time": "site"}, "eval": {"samples": 0}})
    assert (folder / "sbatch.script").read_text() == "#SBATCH --mem=20G\n"


def test_a_resume_plans_its_evaluations(tmp_path, monkeypatch):
    """Their time is a part of what the job asks for."""
    config = {key: {} for key in (*resume.CHANGEABLE, "stopping", "data")} | {
        "train": {"per_device_train_batch_size": 1}
    }
    config |= {"cluster": {"nodes": 1}, "eval": {"retention": None}}
    rundir.write_yaml(tmp_path / "config.yaml", config)
    before = {"sequences_per_step": 4, "prepared": str(tmp_path), "fisher_data": None, "retention": {}}
    rundir.write_json(tmp_path / "plan.json", before)
    rundir.write_json(tmp_path / "data_report.json", {"validation_tokens": 70})
    for name in ("check", "write_engine"):
        monkeypatch.setattr(job_module, name, lambda *_: None)
    monkeypatch.setattr(job_module, "per_node", lambda *_, **__: 1)
    monkeypatch.setattr(resume.evaluate, "tokens_while_training", lambda *_: 7)
    monkeypatch.setattr(job_module, "plan", lambda config, **keys: {"read": keys.get("held_out_tokens")})
    resume.changed(tmp_path, config, here=False)
    assert rundir.read_json(tmp_path / "plan.json")["read"] == 77
