"""Sweeps on a real SLURM: a grid as one array, a search as workers that share a storage."""

import json

import pytest
from nodes import events, held, rows, steps_done, until

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("slurm")]


def results(sweep_dir):
    return json.loads((sweep_dir / "results.json").read_text())["members"]


def test_an_array_of_eight_members(on_slurm, cluster, small, tmp_path):
    """One of them breaks its numbers; the others are finished and ranked; going on submits the failed one alone."""
    sweep_dir = tmp_path / "eight"
    rates = [f"{rate}e-3" for rate in range(1, 8)]
    words = [*small, "engine=single", "cluster=slurm", "cluster.processes=1", "cluster.wait=true", "train.max_steps=4"]
    words += ["cluster.array_throttle=2", f"train.learning_rate={','.join([*rates, '1e30'])}"]
    finished = on_slurm(cluster, "train", "-m", *words, f"sweep_dir={sweep_dir}", timeout=900)
    assert finished.status == 1 and "1 of 8 members failed" in finished.stderr, finished
    rows = results(sweep_dir)
    assert [row["state"] for row in rows] == ["finished"] * 7 + ["failed"]
    values = [row["objective"] for row in rows[:7]]
    assert values == sorted(values) and len(set(values)) == 7
    jobs = {json.loads((sweep_dir / row["name"] / "job.json").read_text())["job"] for row in rows}
    assert len(jobs) == 8 and len({job.partition("_")[0] for job in jobs}) == 1  # one array
    assert "#SBATCH --array=0-7%2" in (sweep_dir / "arrays" / "0.sbatch").read_text()
    again = on_slurm(cluster, "resume", sweep_dir, timeout=300)
    assert again.status == 1 and "array job" in again.stdout and "1 member" in again.stdout, again
    assert [row["attempts"] for row in results(sweep_dir)] == [1] * 7 + [2]
    assert on_slurm(cluster, "status", sweep_dir).stdout.count(" done ") == 7


def test_a_search_by_two_workers(on_slurm, cluster, small, tmp_path):
    sweep_dir = tmp_path / "search"
    words = [*small, "engine=single", "cluster=slurm", "cluster.processes=1", "cluster.wait=true", "train.max_steps=4"]
    space = 'sweep.space={train.learning_rate: "log 1e-4 1e-1"}'
    search = ["sweep=search", space, "sweep.trials=5", "sweep.random_trials=2", "sweep.parallel=2"]
    finished = on_slurm(cluster, "train", *words, *search, f"sweep_dir={sweep_dir}", timeout=600)
    assert finished.status == 0, finished
    rows = results(sweep_dir)
    assert len(rows) == 5 and {row["state"] for row in rows} <= {"finished", "pruned"}
    owners = [json.loads((sweep_dir / "members" / f"{row['name']}.json").read_text())["owner"] for row in rows]
    assert len(set(owners)) == 2
    assert on_slurm(cluster, "resume", sweep_dir, "sweep.trials=6", timeout=300).status == 0
    assert len(results(sweep_dir)) == 6


def test_a_member_that_is_requeued_goes_on(on_slurm, cluster, words, tmp_path):
    """SLURM takes one of two members back into the queue while it trains: no step is lost, and none is there twice."""
    sweep_dir = tmp_path / "two"
    words = [*words, "engine=single", "cluster=slurm", "cluster.processes=1", "train.learning_rate=1e-3,1e-2"]
    words.remove("train.learning_rate=1e-2")
    finished = on_slurm(cluster, "train", "-m", *words, f"sweep_dir={sweep_dir}")
    assert finished.status == 0 and finished.stdout.splitlines()[-1] == f"sweep: {sweep_dir}", finished
    first, second = sweep_dir / "00-0.001", sweep_dir / "01-0.01"
    job = json.loads((first / "job.json").read_text())["job"]
    with held(first, cluster, steps=7, count=1):
        cluster.ask("scontrol", "requeue", job)
    states = {run: sweep_dir / "members" / f"{run.name}.json" for run in (first, second)}

    def over(run):
        return json.loads(states[run].read_text())["state"] == "finished"

    until(lambda: over(first) and over(second), say=lambda: cluster.log(first))
    assert len(events(first, "job")) == 2 and len(events(second, "job")) == 1
    assert [row["step"] for row in rows(first) if "loss" in row] == list(range(1, 31))
    again = on_slurm(cluster, "resume", sweep_dir)
    assert again.status == 0 and "0 members unfinished" in again.stdout, again
    assert {row["name"]: row["attempts"] for row in results(sweep_dir)} == {first.name: 2, second.name: 1}


@pytest.mark.parametrize("rates", ["1e-3,1e-2", "1e-3"])
def test_a_member_of_an_array_that_requeues_itself(on_slurm, cluster, words, tmp_path, rates):
    """The one that has the array's number takes no other with it, and finds itself again."""
    sweep_dir = tmp_path / "signalled"
    words = [*words, "engine=single", "cluster=slurm", "cluster.processes=1", "cluster.time=0:20:00"]
    words.remove("train.learning_rate=1e-2")
    finished = on_slurm(cluster, "train", "-m", *words, f"train.learning_rate={rates}", f"sweep_dir={sweep_dir}")
    assert finished.status == 0, finished
    runs = sorted(file.parent for file in sweep_dir.glob("*/config.yaml"))
    states = [sweep_dir / "members" / f"{run.name}.json" for run in runs]
    assert len(runs) == rates.count(",") + 1
    array = json.loads((runs[0] / "job.json").read_text())["job"].partition("_")[0]
    until(lambda: all(steps_done(run) for run in runs), say=lambda: cluster.log(runs[0]))
    (own,) = (run for run in runs if (run / "logs" / f"job-{array}.log").exists())
    with held(own, cluster, count=1):
        cluster.ask("scancel", "--batch", "--signal=USR1", json.loads((own / "job.json").read_text())["job"])
        until(lambda: (own / "stop.json").exists(), say=lambda: cluster.log(own))
    until(
        lambda: all(json.loads(file.read_text())["state"] == "finished" for file in states),
        say=lambda: cluster.log(own),
    )
    assert [event["reason"] for event in events(own, "requeue")] == ["SIGUSR1"]
    for run in runs:
        assert len(events(run, "job")) == (2 if run == own else 1)
        assert [row["step"] for row in rows(run) if "loss" in row] == list(range(1, 31))
