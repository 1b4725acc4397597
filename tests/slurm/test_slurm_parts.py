"""What surrounds a job, without a SLURM: times, names of GPUs, checks of nodes, words for states."""

import json
import time

import pytest

from ftdist import batch, follow, preflight, rundir
from ftdist import scheduler as slurm
from ftdist.errors import Failed, UserError
from ftdist.plan import hardware

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
    assert "#SBATCH --requeue\n" in text and text.endswith("exec python 'x y'\n")
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
    def start(step, job="7"):
        rundir.record(tmp_path, None, "job", step, job=job)

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
    assert words(tmp_path, job("OUT_OF_MEMORY"))[0] == "failed"
    assert words(tmp_path, job("CANCELLED"))[0] == "cancelled"
    rundir.write_json(tmp_path / "outcome.json", {"outcome": "stopped", "reason": "ftdist stop", "status": 75})
    assert words(tmp_path, job("FAILED")) == ("stopped", "ftdist stop")
    (tmp_path / "final").mkdir()
    assert words(tmp_path, job("COMPLETED"))[0] == "done"
    assert words(tmp_path, job("FAILED"))[0] == "stopped"  # trained, and its evaluation was not


@pytest.mark.parametrize("key", ["nodes", "gpus_per_node", "time", "output", "array"])
def test_options_that_the_plan_would_not_know_of(key):
    with pytest.raises(UserError, match=rf"cluster\.sbatch\.{key}=2: .*use the key of `cluster`"):
        slurm.refuse_own({"nice": 100, key: 2})
    slurm.refuse_own({"nice": 100})
