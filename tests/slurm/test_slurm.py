"""Jobs on a real SLURM of two nodes, through the real command line."""

import json

import pytest
from nodes import NODES, events, held, same, steps_done, until, wandb_has

pytestmark = pytest.mark.xdist_group("slurm")


ODD = """it's a "path" with $x, 100% `odd`"""
COMMENT = 'a "b" $HOME `id` #x'


def job_of(run_dir):
    return json.loads((run_dir / "job.json").read_text())["job"]


def state(on_slurm, cluster, run_dir):
    done = on_slurm(cluster, "status", run_dir, "--json")
    assert done.status == 0, done
    return json.loads(done.stdout)[0]


def test_pre_empted_on_two_nodes(on_slurm, cluster, words, local, tmp_path):
    """A more important job takes the nodes: it saves, waits, goes on, and ends as two processes on one machine do."""
    run_dir = tmp_path / "run"
    keys = ("engine=zero2", *NODES, "cluster.partition=low", "tracking=wandb")
    train = ("train", *words, *keys, f"run_dir={run_dir}")
    submitted = on_slurm(cluster, *train)
    assert submitted.status == 0 and submitted.run_dir == run_dir, submitted
    job = job_of(run_dir)
    assert f"job {job} is in the queue: 2 nodes" in submitted.stdout
    with held(run_dir, cluster):
        running = state(on_slurm, cluster, run_dir)
        assert (running["state"], running["job"], running["steps"]) == ("running", job, 30)
        on_slurm(cluster, *train).refused(f"its job {job} is running")
        urgent = ("--partition=main", "--nodes=2", "--exclusive", "--time=1", "--output=/dev/null", "--wrap=true")
        cluster.ask("sbatch", *urgent)
        until(lambda: (run_dir / "stop.json").exists(), say=lambda: cluster.log(run_dir))
    until(lambda: events(run_dir, "requeue"), say=lambda: cluster.log(run_dir))
    until(lambda: (run_dir / "final").exists(), say=lambda: cluster.log(run_dir))
    followed = on_slurm(cluster, "logs", run_dir, "--follow")
    assert followed.status == 0
    assert "pre-empted: back into the queue, goes on from the checkpoint of step" in followed.stdout
    again = events(run_dir, "requeue")[0]
    assert again["reason"] == "pre-empted" and again["step"] >= 5
    assert [start["restart"] for start in events(run_dir, "job")][:2] == [0, 1]
    assert events(run_dir, "resume")[0]["step"] == again["step"]
    assert state(on_slurm, cluster, run_dir)["state"] == "done"
    same(run_dir, local("full", "zero2"))
    wandb_has(run_dir)


def test_stopped_by_its_user(on_slurm, cluster, words, tmp_path):
    """`ftdist stop` saves and leaves the job ended; one that waits is taken out of the queue."""
    odd = tmp_path / ODD
    odd.mkdir()
    run_dir, waiting = odd / "run", odd / "waiting"
    one = ("cluster=slurm", "cluster.processes=1", "cluster.memory=2G", "engine=single", "train.max_steps=5000")
    begun = on_slurm(cluster, "train", *words, *one, "run_dir=run", cwd=odd)
    assert begun.status == 0 and begun.run_dir == run_dir, begun
    later = on_slurm(cluster, "train", *words, *one, "run_dir=waiting", "cluster.sbatch.begin=now+1hour",
                     f"cluster.sbatch.comment='{COMMENT}'", cwd=odd)  # fmt: skip
    assert f"Comment={COMMENT} " in cluster.ask("scontrol", "show", "job", "--oneliner", job_of(waiting))
    assert state(on_slurm, cluster, waiting)["state"] == "queued", later
    assert "out of the queue" in on_slurm(cluster, "stop", waiting).stdout
    assert state(on_slurm, cluster, waiting)["state"] == "stopped"
    until(lambda: steps_done(run_dir) >= 2, say=lambda: cluster.log(run_dir))
    assert "asked to stop" in on_slurm(cluster, "stop", run_dir).stdout
    assert on_slurm(cluster, "logs", run_dir, "--follow").status == 75
    stopped = state(on_slurm, cluster, run_dir)
    assert (stopped["state"], stopped["detail"]) == ("stopped", "ftdist stop")
    assert (run_dir / "checkpoints" / f"step-{stopped['step']:08d}" / "manifest.json").exists()
    assert not events(run_dir, "requeue")
    on_slurm(cluster, "stop", run_dir).refused("not active (stopped)")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("cluster.nodes=3",), ("sbatch refused", "node")),
        (("cluster.partition=gold",), ("cluster.partition=gold", "main")),
        (("cluster.time=90",), ("cluster.time=90", "H:MM:SS")),
        (("cluster.qos='a\nb'",), ("qos", "line breaks")),
        (("cluster.gpus=9", "hardware=h100"), ("sbatch refused",)),
        (("cluster.acount=x",), ("did you mean cluster.account?",)),
        (("cluster.processes=2", "cluster.gpus=1", "hardware=h100"), ("cluster.processes=2", "oversubscribe")),
    ],
    ids=lambda words: "",
)
def test_refused_before_it_waits(on_slurm, cluster, words, tmp_path, more, said):
    run_dir = tmp_path / "run"
    on_slurm(cluster, "train", *words, "cluster=slurm", "engine=ddp", f"run_dir={run_dir}", *more).refused(*said)
    assert not run_dir.exists()


def test_only_asked(on_slurm, cluster, words, tmp_path):
    """cluster.test_only=true leaves nothing behind."""
    run_dir = tmp_path / "run"
    asked = on_slurm(cluster, "train", *words, *NODES, "engine=ddp", f"run_dir={run_dir}", "cluster.test_only=true")
    assert asked.status == 0 and "to start at" in asked.stdout, asked
    assert not run_dir.exists()
