"""What a cluster does to jobs: on a real SLURM, minutes long. `make slurm-drill`."""

import contextlib
import json
import os
import signal
import sys
from pathlib import Path

import pytest
from nodes import IPV6_ALONE, NODES, events, held, ranks, rows, same, steps_done, until, variables, wandb_has

from ftdist import rundir

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("slurm")]
TRACKERS = ("linuxproc", "cgroup")
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(params=TRACKERS)
def tracked(request, clusters):
    """Two nodes, under each way that SLURM has to know a job's processes."""
    if request.param == "cgroup" and not os.access("/sys/fs/cgroup/freezer", os.W_OK):
        pytest.skip("no version-1 freezer that may be written to")
    return clusters(TRACK=request.param)


def submit(on_slurm, cluster, run_dir, *words):
    """Submit; the job's number, once it has trained for some steps."""
    done = on_slurm(cluster, "train", *words, f"run_dir={run_dir}")
    assert done.status == 0, done
    return json.loads((run_dir / "job.json").read_text())["job"]


def trains(cluster, run_dir, steps=5):
    until(lambda: steps_done(run_dir) >= steps, say=lambda: cluster.log(run_dir))


def finished(on_slurm, cluster, run_dir):
    followed = on_slurm(cluster, "logs", run_dir, "--follow")
    assert followed.status == 0, followed
    return followed.stdout


def test_time_limit(on_slurm, tracked, words, local, tmp_path):
    """Saved before the limit, and back into the queue; under both trackers the signal kills nobody."""
    run_dir = tmp_path / "run"
    keys = ("engine=zero2", *NODES, "cluster.time=0:03:00", "cluster.signal_seconds=30", "tracking=wandb")
    submit(on_slurm, tracked, run_dir, *words, *keys)
    with held(run_dir, tracked):
        until(lambda: (run_dir / "stop.json").exists(), say=lambda: tracked.log(run_dir))
    said = finished(on_slurm, tracked, run_dir)
    assert "time limit: back into the queue" in said
    assert [event["reason"] for event in events(run_dir, "requeue")] == ["time limit"]
    same(run_dir, local("full", "zero2"))
    wandb_has(run_dir)


@pytest.mark.parametrize("trains", [False, True])
def test_pre_emption_that_warns_the_tasks_alone(on_slurm, clusters, words, local, tmp_path, trains):
    """As SLURM does by itself: the batch process hears nothing, before there is anything to save, and later."""
    cluster = clusters(WARN="tasks")
    run_dir = tmp_path / "run"
    job = submit(on_slurm, cluster, run_dir, *words, "engine=zero2", *NODES, "cluster.partition=low")
    with contextlib.ExitStack() as stack:
        if trains:
            stack.enter_context(held(run_dir, cluster))
        else:
            until(lambda: len(ranks(run_dir)) == 2, say=lambda: cluster.log(run_dir), pause=0.001)
            for pid in ranks(run_dir):  # they cannot have begun when the signal comes
                os.kill(pid, signal.SIGSTOP)
                stack.callback(os.kill, pid, signal.SIGCONT)
        urgent = ("--partition=main", "--nodes=2", "--exclusive", "--time=1", "--output=/dev/null", "--wrap=true")
        cluster.ask("sbatch", *urgent)
        until(lambda: "PreemptTime=2" in cluster.ask("scontrol", "show", "job", job))
    until(lambda: events(run_dir, "requeue"), say=lambda: cluster.log(run_dir))
    finished(on_slurm, cluster, run_dir)
    (again,) = events(run_dir, "requeue")
    assert again["reason"] == "pre-empted" and (again["step"] is not None) == trains
    same(run_dir, local("full", "zero2"))


def test_signal_to_every_process(on_slurm, tracked, words, local, tmp_path):
    """`scancel --full --signal=USR1`: batch process, srun, launchers and ranks all get it."""
    run_dir = tmp_path / "run"
    job = submit(on_slurm, tracked, run_dir, *words, "engine=zero2", *NODES)
    with held(run_dir, tracked):
        tracked.ask("scancel", "--full", "--signal=USR1", job)
        until(lambda: (run_dir / "stop.json").exists(), say=lambda: tracked.log(run_dir))
    finished(on_slurm, tracked, run_dir)
    (again,) = events(run_dir, "requeue")
    assert again["step"] >= 5
    same(run_dir, local("full", "zero2"))


def test_cancelled(on_slurm, tracked, words, tmp_path):
    """scancel: saved within KillWait, and not started again."""
    run_dir = tmp_path / "run"
    job = submit(on_slurm, tracked, run_dir, *words, "engine=zero2", *NODES, "train.max_steps=5000")
    trains(tracked, run_dir)
    tracked.ask("scancel", job)
    until(lambda: tracked.state(job) == "CANCELLED")
    outcome = rundir.read_json(run_dir / "outcome.json")
    assert outcome["outcome"] == "stopped", tracked.log(run_dir)
    assert (run_dir / "checkpoints" / f"step-{outcome['step']:08d}" / "manifest.json").exists()
    assert not events(run_dir, "requeue")
    (now,) = json.loads(on_slurm(tracked, "status", run_dir, "--json").stdout)
    assert now["state"] == "stopped"


def test_zero3_requeued_by_the_controller(on_slurm, tracked, words, local, tmp_path):
    """`scontrol requeue`, without a warning: on two nodes what ZeRO-3 on one machine is; one W&B run."""
    run_dir = tmp_path / "run"
    keys = (*words, "engine=zero3", *NODES, "tracking=wandb")
    job = submit(on_slurm, tracked, run_dir, *keys)
    with held(run_dir, tracked):
        tracked.ask("scontrol", "requeue", job)
        until(lambda: tracked.state(job) in ("PENDING", "COMPLETING"))
    finished(on_slurm, tracked, run_dir)
    assert [start["restart"] for start in events(run_dir, "job")] == [0, 1]
    same(run_dir, local("full", "zero3"))
    wandb_has(run_dir, over=True)


def test_a_killed_rank(on_slurm, tracked, words, tmp_path):
    """The job ends with that rank's words, not with those of the others that lose it."""
    run_dir = tmp_path / "run"
    job = submit(on_slurm, tracked, run_dir, *words, "engine=zero2", *NODES, "train.max_steps=5000")
    trains(tracked, run_dir)
    os.kill(next(pid for pid, node in ranks(run_dir).items() if node == tracked.nodes[1]), signal.SIGKILL)
    until(lambda: tracked.state(job) == "FAILED", say=lambda: tracked.log(run_dir))
    last = tracked.log(run_dir).splitlines()[-1]
    assert f"rank 1 on {tracked.nodes[1]}: killed by signal 9" in last
    assert not events(run_dir, "requeue")
    (now,) = json.loads(on_slurm(tracked, "status", run_dir, "--json").stdout)
    assert now["state"] == "failed" and "killed by signal 9" in now["detail"]


def test_a_killed_node(on_slurm, clusters, words, local, tmp_path):
    """A node without the batch process loses its power: another takes its place."""
    three = clusters(NODES=3)
    run_dir = tmp_path / "run"
    job = submit(on_slurm, three, run_dir, *words, "engine=zero2", *NODES)
    with held(run_dir, three) as places:
        other = next(node for node in places.values() if node != three.first(job))
        three.script("kill", other)
    finished(on_slurm, three, run_dir)
    three.script("start", other)
    assert len(events(run_dir, "job")) == 2
    same(run_dir, local("full", "zero2"))
    until(lambda: three.ask("sinfo", "-h", "-p", "main", "-t", "idle", "-o", "%D").strip() == "3")


def test_a_killed_first_node(on_slurm, clusters, words, local, tmp_path):
    """The node of the batch process loses its power: SLURM starts the job on others."""
    three = clusters(NODES=3)
    run_dir = tmp_path / "run"
    job = submit(on_slurm, three, run_dir, *words, "engine=zero2", *NODES)
    with held(run_dir, three):
        first = three.first(job)
        three.script("kill", first)
    finished(on_slurm, three, run_dir)
    three.script("start", first)
    assert [start["restart"] for start in events(run_dir, "job")] == [0, 1]
    same(run_dir, local("full", "zero2"))
    until(lambda: three.ask("sinfo", "-h", "-p", "main", "-t", "idle", "-o", "%D").strip() == "3")


def test_a_killed_daemon(on_slurm, clusters, words, local, tmp_path):
    """SLURM gives up on a node whose ranks live on: they find that the run is not theirs, and write nothing."""
    four = clusters(NODES=4)
    run_dir = tmp_path / "run"
    submit(on_slurm, four, run_dir, *words, "engine=zero2", *NODES)
    with held(run_dir, four) as old:  # the new ranks are others
        for node in old.values():
            four.script("lose", node)
        until(lambda: ranks(run_dir).keys() - old.keys(), say=lambda: four.log(run_dir))
    finished(on_slurm, four, run_dir)
    same(run_dir, local("full", "zero2"))
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in old))
    for node in old.values():
        four.script("start", node)


@pytest.mark.parametrize("which", ["first", "other"])
def test_a_cut_network(on_slurm, clusters, words, local, tmp_path, which):
    """A node that nobody hears of, but that still has the run's directory: the job goes on elsewhere, to its end.

    What lives on there writes nothing: the first node's ranks and batch process, or the other one's ranks.
    """
    three = clusters(NODES=3, SEPARATE="net")
    run_dir = tmp_path / "run"
    job = submit(on_slurm, three, run_dir, *words, "engine=zero2", *NODES, "cluster.interface=eth0")
    with held(run_dir, three) as old:
        lost = next(node for node in old.values() if (node == three.first(job)) == (which == "first"))
        alone = [pid for pid, node in old.items() if node == lost]
        three.script("cut", lost)
        until(lambda: ranks(run_dir).keys() - old.keys(), say=lambda: three.log(run_dir))
        assert all(Path(f"/proc/{pid}").exists() for pid in alone)
    finished(on_slurm, three, run_dir)
    same(run_dir, local("full", "zero2"))
    three.script("heal", lost)
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in old))
    same(run_dir, local("full", "zero2"))
    assert [start["restart"] for start in events(run_dir, "job")] == [0, 1]
    until(lambda: three.ask("sinfo", "-h", "-p", "main", "-t", "idle", "-o", "%D").strip() == "3")


def test_a_node_that_does_not_see_the_run(on_slurm, clusters, words, tmp_path):
    blind = clusters(NODES=2, CPUS=4)
    blind.script("hide", blind.nodes[1], str(tmp_path))
    waited = on_slurm(blind, "train", *words, "engine=zero2", *NODES, "cluster.wait=true", f"run_dir={tmp_path}/run")
    assert waited.status == 1, waited
    last = waited.stdout.splitlines()[-1]
    assert f"preflight: node {blind.nodes[1]}: run directory" in last, waited


def test_expected_devices(on_slurm, clusters, words, tmp_path):
    """GPUs that SLURM gives and torch does not see."""
    fake = clusters(NODES=1, GPUS=2)
    keys = ("cluster=slurm", "hardware=h100", "engine=zero2", "cluster.memory=8G", "cluster.wait=true")
    waited = on_slurm(fake, "train", *words, *keys, f"run_dir={tmp_path}/run")
    assert waited.status == 1, waited
    assert f"preflight: node {fake.nodes[0]}: devices: torch sees 0 of 2 GPUs" in waited.stdout


def test_two_jobs_on_a_node(on_slurm, clusters, words, local, tmp_path):
    """At the same time, each with its own port; data prepared by jobs of their own, the network checked before."""
    one = clusters(NODES=1)
    keys = (*words, "engine=zero2", "cluster=slurm", "cluster.processes=2", "cluster.memory=3G", "cluster.cpus=2")
    runs = [tmp_path / "a", tmp_path / "b"]
    more = ("cluster.prepare=job", "cluster.prepare_cpus=1", "cluster.prepare_memory=1G", "cluster.network_check=1")
    for run_dir in runs:
        submit(on_slurm, one, run_dir, *keys, *more)
    with held(runs[0], one) as first, held(runs[1], one) as second:  # both are in the middle of training
        assert {*first.values(), *second.values()} == set(one.nodes)
        ports = [{variables(pid)["MASTER_PORT"] for pid in found} for found in (first, second)]
        assert [len(found) for found in ports] == [1, 1] and ports[0] != ports[1]
    for run_dir in runs:
        said = finished(on_slurm, one, run_dir)
        assert "network check: passed" in said
        same(run_dir, local("full", "zero2"))


def test_no_progress(on_slurm, cluster, words, tmp_path):
    """A job that is ended again and again before it saves is not requeued for ever."""
    run_dir = tmp_path / "run"
    keys = ("engine=single", "cluster=slurm", "cluster.memory=2G", "cluster.max_requeues=1", "train.max_steps=5000")
    job = submit(on_slurm, cluster, run_dir, *words, *keys)
    for number in (1, 2):
        until(lambda n=number: len(events(run_dir, "job")) == n and cluster.state(job) == "RUNNING")
        cluster.ask("scancel", "--batch", "--signal=USR1", job)
        until(lambda n=number: len(events(run_dir, "requeue")) == n or (run_dir / "outcome.json").exists())
    followed = on_slurm(cluster, "logs", run_dir, "--follow")
    assert followed.status == 93 and "starts in a row without a new checkpoint" in followed.stdout, followed


def test_by_sbatch_itself(execute, cluster, words, local, tmp_path):
    """sbatch slurm/train.sbatch: the same run, requeued at its time limit."""
    odd = tmp_path / """a "path"'s $x"""
    odd.mkdir()
    given = [word for word in words if not word.startswith("cluster")]
    options = ("--parsable", "--nodes=2", "--mem=3G", "--time=3", f"--output={tmp_path}/log", "--signal=B:USR1@30")
    done = execute("sbatch", *options, REPOSITORY / "slurm" / "train.sbatch", *given, "engine=zero2",
                   cwd=odd, env=cluster.environment)  # fmt: skip
    assert done.status == 0, done
    until(lambda: any((odd / "runs").glob("job-*")), say=lambda: (tmp_path / "log").read_text())
    (run_dir,) = (odd / "runs").iterdir()
    with held(run_dir, cluster):
        until(lambda: (run_dir / "stop.json").exists(), say=lambda: (tmp_path / "log").read_text())
    until(lambda: "\nrun: " in (tmp_path / "log").read_text(), say=lambda: (tmp_path / "log").read_text())
    assert [event["reason"] for event in events(run_dir, "requeue")] == ["time limit"] and len(rows(run_dir)) > 30
    same(run_dir, local("full", "zero2"))


def test_training_over_ipv6_alone(forks, execute, words, local, tmp_path):
    """What srun starts on a node, told an IPv6 address of the first one: the same run."""
    here = ("engine=zero2", "strategy=full", "cluster.processes=2", "cluster.oversubscribe=true")
    run_dir = forks.freeze(tmp_path / "run", *words, *here)
    place = {"SLURM_NODEID": "0", "SLURM_STEP_NUM_NODES": "1", "FTDIST_GRACE": "20", "GLOO_SOCKET_IFNAME": "lo"}
    node = (sys.executable, "-m", "ftdist.node", run_dir, "::1", "20002", "2", "ftdist.worker")
    done = execute(*IPV6_ALONE, *node, env=place)
    assert done.status == 0, done
    same(run_dir, local("full", "zero2"))
