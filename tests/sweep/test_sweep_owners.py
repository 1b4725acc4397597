"""Who has a member and what may still be begun: workers that are told to end, takeovers, what a resume may change."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections import namedtuple
from pathlib import Path

import pytest

from ftdist import batch, cli, compose, job, lease, rundir, stops
from ftdist import scheduler as slurm
from ftdist.errors import Failed, UserError
from ftdist.sweep import array, checks, directory, search, start
from ftdist.sweep.directory import Member

SWEEP = {"name": "grid", "objective": "eval_loss", "direction": "minimize", "parallel": 1, "retries": 3}
IN_SLURM = ["cluster=slurm", "cluster.processes=1", "cluster.gpus=0"]


@pytest.fixture(scope="module")
def config():
    return compose.compose("train", IN_SLURM)[0]


@pytest.fixture
def sweep_dir(tmp_path, config):
    """A sweep of three members, each with a run directory."""
    head = {"name": "s", "words": IN_SLURM, "sweep": SWEEP, "seed": 1, "directory": str(tmp_path)}
    names = ["00", "01", "02"]
    directory.write(tmp_path, head, [Member(name, [f"seed={name}"]) for name in names], [config] * 3)
    for name in names:
        (tmp_path / name).mkdir()
    return tmp_path


@pytest.fixture
def in_job(monkeypatch):
    """As in a task of an array; `batch.run` is `in_job(run_dir)`, what it prints goes where it went."""
    monkeypatch.setattr(os, "dup2", lambda *_: None)
    monkeypatch.chdir(Path.cwd())  # a worker changes to the sweep's own
    for name, value in (("ARRAY_JOB_ID", "7"), ("ARRAY_TASK_ID", "0"), ("JOB_ID", "8")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setattr(batch, "_signals", [])
    return lambda run: monkeypatch.setattr(batch, "run", run)


# --- before anything is made ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "indices"),
    [
        (["-m", "train.learning_rate=1,2,3"], "0-2%2"),
        (["sweep=search", "sweep.space={seed: [1, 2]}", "sweep.trials=9", "sweep.parallel=4"], "0-3%2"),
    ],
)
def test_slurm_is_asked_before_the_data_are_prepared(monkeypatch, tmp_path, words, indices):
    monkeypatch.chdir(tmp_path)
    asked = []

    def test_only(script):
        asked.append(script.read_text())
        raise UserError("no such partition")

    def planned(configs):
        disk = {"disk_bytes": dict.fromkeys(("final", "fisher", "checkpoints"), 1), "checkpoint_bytes": 1}
        return [{**disk, "asks": {"memory": f"{size}G"}} for size in (9, 10)]

    monkeypatch.setattr(slurm, "test_only", test_only)
    monkeypatch.setattr(checks, "planned", planned)
    monkeypatch.setattr(checks, "say_plans", lambda *_: None)
    monkeypatch.setattr(checks, "prepared", lambda *_: pytest.fail("too early"))
    words = [*words, *IN_SLURM, "cluster.array_throttle=2"]
    with pytest.raises(UserError, match="no such partition"):
        start.start(compose.several("train", words), words)
    assert f"#SBATCH --array={indices}\n" in asked[0] and len(asked) == 1
    assert "#SBATCH --mem=10G\n" in asked[0]
    assert list(tmp_path.iterdir()) == []


def test_a_shape_is_planned_once_and_one_that_cannot_fit_is_refused(monkeypatch, tmp_path, model, chat):
    """In SLURM before anything is submitted, prepared or left; members that differ in the rate alone share a plan."""
    monkeypatch.chdir(tmp_path)
    planned, plan = [], job.plan
    monkeypatch.setattr(job, "plan", lambda config, **keys: planned.append(config) or plan(config, **keys))
    for name in ("submit", "test_only"):
        monkeypatch.setattr(slurm, name, lambda *_: pytest.fail("too early"))
    words = ["-m", f"model.path={model}", f"data.path={chat}", *IN_SLURM, "strategy=lora,full", "tracking=none",
             "train.learning_rate=1e-4,2e-4", "hardware=cpu"]  # fmt: skip
    configs = compose.several("train", [*words, "must_fit=false"]).configs
    checks.planned(configs)
    assert [config["strategy"]["name"] for config in planned] == ["lora", "full"]
    words += ["train.per_device_train_batch_size=64", "cluster.memory=600M"]
    with pytest.raises(UserError, match="the run does not fit"):
        start.start(compose.several("train", words), words)
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_is_not_begun_over_another(sweep_dir, monkeypatch):
    monkeypatch.setattr(checks, "planned", lambda _: pytest.fail("too late"))
    words = ["-m", "seed=1,2", f"sweep_dir={sweep_dir}"]
    with pytest.raises(UserError, match=f"sweep_dir={sweep_dir}: holds a sweep.*ftdist resume"):
        start.start(compose.several("train", words), words)


def test_the_disk_is_for_all_members(monkeypatch, tmp_path, capsys):
    plan = {"disk_bytes": {"final": 10**9, "fisher": 0, "checkpoints": 10**9}, "checkpoint_bytes": 10**9}
    small = {"disk_bytes": dict.fromkeys(("final", "fisher", "checkpoints"), 0), "checkpoint_bytes": 0}
    usage = namedtuple("usage", "free")  # noqa: PYI024  # a stand-in for what shutil gives
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(5 * 10**9))
    checks.fit_on_disk([plan], None, tmp_path / "s", True)
    assert capsys.readouterr().out == ""
    checks.fit_on_disk([plan, plan], None, tmp_path / "s", True)
    assert "warning" in capsys.readouterr().out
    with pytest.raises(UserError, match="3 members.*fewer members"):
        checks.fit_on_disk([plan] * 3, None, tmp_path / "s", True)
    checks.fit_on_disk([plan] * 3, None, tmp_path / "s", False)
    checks.fit_on_disk([plan, small, small], None, tmp_path / "s", True)
    with pytest.raises(UserError, match="4 members"):  # of a search, each trial may be the largest
        checks.fit_on_disk([plan, small, small], 4, tmp_path / "s", True)


# --- told to end ----------------------------------------------------------------------------------


class Trials:
    """A search with three trials."""

    def __init__(self, *_, **__):
        self.left, self.told = ["00", "01", "02"], []

    def take(self):
        return self.left.pop(0)

    def look(self, name):
        pass

    def ended(self, name, state):
        self.told.append((name, state.state))


@pytest.mark.parametrize("way", ["signal", "stop"])
def test_a_worker_that_is_told_to_end_takes_no_other_trial(sweep_dir, in_job, monkeypatch, way):
    trials, started = Trials(), []
    for name in trials.left:
        (sweep_dir / name / "config.yaml").touch()
    monkeypatch.setattr(search, "Search", lambda *_, **__: trials)

    def run(run_dir):
        started.append(run_dir.name)
        batch._signals.append("SIGTERM") if way == "signal" else stops.request(sweep_dir, "ftdist stop")
        raise Failed("rank 0: killed by signal 15", 1)  # a failure that would be tried again, at another time

    in_job(run)
    assert array.worker(sweep_dir, "0") == 1
    assert started == ["00"] and len(trials.left) == 2
    assert trials.told == [("00", "failed")]


def test_what_another_has_taken_over_is_left_to_it(sweep_dir, in_job):
    """SLURM has given this job up and started it elsewhere: the member's state is the other's by now."""

    def run(run_dir):
        stranger = lease.Lease(2, "elsewhere", 1, "", "", 0.0, "8", 1)
        lease._write(run_dir, stranger)
        directory.mark(sweep_dir, "00", state="finished")
        raise Failed("taken over by process 1 on elsewhere", 93)

    (sweep_dir / "arrays").mkdir()
    rundir.write_json(sweep_dir / "arrays" / "0.json", {"count": 3, "members": ["00", "01", "02"], "job": "7"})
    in_job(run)
    assert array.member(sweep_dir, "0") == 93
    assert directory.state(sweep_dir, "00").state == "finished"


def test_retries_are_not_requeues(sweep_dir):
    """Three starts, of which one came from SLURM and two from sweep.retries: one without a new checkpoint."""
    run_dir = sweep_dir / "00"
    for restart in (0, 0, 0, 1):
        rundir.record(run_dir, None, "job", None, job="8", restart=restart, nodes=["a"])
    assert batch.fruitless(run_dir, "8") == 1


# --- who has what ---------------------------------------------------------------------------------


def test_nothing_that_is_written_at_once_is_lost(sweep_dir):
    def work(times):
        for _ in range(times):
            directory.again(sweep_dir, "00")

    threads = [threading.Thread(target=work, args=(20,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert directory.state(sweep_dir, "00").retries == 60


def test_a_trial_is_taken_over_when_its_processes_are_gone(tmp_path, monkeypatch):
    """Its owner is not in the queue any more, but its lease still lives: wait, rather than fail on it."""
    (tmp_path / "members").mkdir()
    sweep = SWEEP | {"name": "search", "space": {"seed": [1, 2, 3]}, "trials": 1, "random_trials": 1, "pruner": "none"}
    head = {"name": "s", "words": [], "sweep": sweep, "seed": 7, "directory": "."}
    directory.write(tmp_path, head, [], [])
    monkeypatch.setattr(search.Search, "_configured", lambda *_: True)
    name = search.Search(tmp_path, owner="7_0").take()
    run_dir = tmp_path / name
    run_dir.mkdir()
    token, waited = lease.take(run_dir).token, []

    def sleep(seconds):
        assert not waited
        waited.append(seconds)
        lease.release(run_dir, token)

    monkeypatch.setattr(search.time, "sleep", sleep)
    assert search.Search(tmp_path, owner="7_1", alive=lambda _: True).take() is None and not waited
    assert search.Search(tmp_path, owner="7_1", alive=lambda _: False).take() == name and waited
    assert directory.state(tmp_path, name).owner == "7_1"


def test_an_array_whose_submission_was_killed_is_found(sweep_dir, monkeypatch):
    """sbatch had done its work, nobody had written down the number: the members are not submitted twice."""
    folder = sweep_dir / "arrays"
    folder.mkdir()
    rundir.write_json(folder / "0.json", {"count": 3, "members": ["00", "01", "02"]})

    def command(name, *words):
        if "--format=%F|%o" in words:
            out = f"6|/other/arrays/0.sbatch\n7|{folder}/0.sbatch\n"
        else:
            assert "--jobs=7_0,7_1,7_2" in words
            out = "7_0|8|RUNNING|1:00|a|None\n7_1|9|PENDING|1:00||Priority\n"
        return subprocess.CompletedProcess([name], 0, out, "")

    monkeypatch.setattr(slurm, "command", command)
    monkeypatch.setattr(slurm.shutil, "which", lambda _: None)
    assert set(array.active(sweep_dir)) == {"7_0", "7_1"}
    assert array.owners(sweep_dir) == {"00": "7_0", "01": "7_1", "02": "7_2"}
    assert json.loads((sweep_dir / "01" / "job.json").read_text())["job"] == "7_1"


# --- going on -------------------------------------------------------------------------------------


@pytest.fixture
def resumed(sweep_dir, monkeypatch):
    """`resumed(*words)`: the members that would be submitted, by `ftdist resume SWEEP words`."""
    monkeypatch.chdir(Path.cwd())  # go_on changes to the sweep's own
    monkeypatch.setattr(array, "freeze", lambda *_: None)
    monkeypatch.setattr(array, "would_start", lambda *_: [])
    ran = []
    monkeypatch.setattr(start, "_run", lambda folder, configs: ran.append(directory.unfinished(folder)))

    def resumed(*words):
        start.go_on(sweep_dir, list(words))
        return ran[-1]

    return resumed


def test_more_time_and_memory_at_a_resume(sweep_dir, resumed):
    directory.ended(sweep_dir, "00", 0, None, 1.0)
    (sweep_dir / "00" / "metrics.jsonl").write_text('{"step": 1, "eval_loss": 1.0}\n')
    directory.ended(sweep_dir, "01", 1, "time limit", 1.0)
    before = directory.config(sweep_dir, "00")
    assert resumed("cluster.time=2:00:00", "cluster.memory=8G") == ["01", "02"]
    assert directory.config(sweep_dir, "00") == before
    for name in ("01", "02"):
        cluster = directory.config(sweep_dir, name)["cluster"]
        assert (cluster["time"], cluster["memory"]) == ("2:00:00", "8G")
        assert "#SBATCH --time=2:00:00\n" in array.text(sweep_dir, cluster, "member", 2, "0")
    resumed("cluster.time=3:00:00", "sweep.retries=1")
    asked = directory.read(sweep_dir)
    assert asked["later"] == ["cluster.memory=8G", "cluster.time=3:00:00"] and asked["sweep"]["retries"] == 1
    assert directory.config(sweep_dir, "02")["cluster"]["time"] == "3:00:00"
    for word in ("train.learning_rate=1", "cluster.processes=2", "cluster=local", "cluster.tim=1:00:00", "seed=2"):
        with pytest.raises(UserError, match=word.partition("=")[0]):
            resumed(word)


def test_a_resume_leaves_alone_what_has_a_job(sweep_dir, resumed, monkeypatch):
    """Also one that ends while the resume looks: nothing that is finished is opened again."""
    (sweep_dir / "arrays").mkdir()
    rundir.write_json(sweep_dir / "arrays" / "0.json", {"count": 3, "members": ["00", "01", "02"], "job": "7"})
    for name in ("00", "01", "02"):
        directory.begins(sweep_dir, name)

    def jobs(numbers):
        found = {"7_1": slurm.Job("7_1", "RUNNING", "", None, "a")}
        directory.ended(sweep_dir, "00", 0, None, 1.0)
        (sweep_dir / "00" / "metrics.jsonl").write_text('{"step": 1, "eval_loss": 1.0}\n')
        return found

    monkeypatch.setattr(slurm, "jobs", jobs)
    resumed()
    assert [directory.state(sweep_dir, name).state for name in ("00", "01", "02")] == ["finished", "running", "waiting"]


def test_a_resume_waits_for_members_that_still_save(sweep_dir, resumed, capfd):
    """Of a start that was killed; were they marked as waiting before they had said their last word, it would win."""
    script = (
        "import sys; from pathlib import Path; from ftdist.sweep import directory, local\n"
        "with local.present(Path(sys.argv[1])):\n"
        "    print('here', flush=True); sys.stdin.readline()\n"
        "    directory.ended(Path(sys.argv[1]), '00', 75, 'stopped', 1.0)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", script, str(sweep_dir)], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, text=True)  # fmt: skip
    assert child.stdout.readline() == "here\n"
    waiting = threading.Thread(target=resumed)
    waiting.start()
    said = ""
    while "still save" not in said and waiting.is_alive():
        said += capfd.readouterr().out
    waiting.join(0.3)  # time to do it wrong
    with contextlib.closing(child.stdin), contextlib.closing(child.stdout):
        child.stdin.write("\n")
    child.wait()
    waiting.join()
    assert directory.state(sweep_dir, "00").state == "waiting"


def test_status_tells_of_members_that_have_not_begun(sweep_dir, capsys):
    (sweep_dir / "01").rmdir()
    directory.mark(sweep_dir, "01", state="refused", reason="strategy.r=4: not with this")
    assert cli.main(["status", str(sweep_dir)]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "refused" in line)
    assert "/01 " in line and line.endswith("strategy.r=4: not with this")
    assert cli.main(["logs", str(sweep_dir)]) == 2
    assert "ftdist logs RUN" in capsys.readouterr().err
