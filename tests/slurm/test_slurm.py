"""Jobs on a real SLURM of two nodes, through the real command line."""

import json

import pytest
from nodes import NODES, events, held, same, steps_done, until, wandb_has

from ftdist import compose, job, submit
from ftdist import scheduler as slurm
from ftdist.errors import UserError

pytestmark = pytest.mark.xdist_group("slurm")


ODD = """it's a "path" with $x, 100% `odd`"""
COMMENT = 'a "b" $HOME `id` #x'


def job_of(run_dir):
    return json.loads((run_dir / "job.json").read_text())["job"]


def state(on_slurm, cluster, run_dir):
    done = on_slurm(cluster, "status", run_dir, "--json")
    assert done.status == 0, done
    return json.loads(done.stdout)[0]


def test_pre_empted_on_two_nodes(on_slurm, cluster, words, local, tmp_path, monkeypatch):
    """A more important job takes the nodes: it saves, waits, goes on, and ends as two processes on one machine do."""
    run_dir = tmp_path / "run"
    keys = ("engine=zero2", *NODES, "cluster.partition=low", "tracking=wandb")
    submitted = on_slurm(cluster, "train", *words, *keys, f"run_dir={run_dir}")
    assert submitted.status == 0 and submitted.run_dir == run_dir, submitted
    number = job_of(run_dir)
    assert f"job {number} is in the queue: 2 nodes" in submitted.stdout
    with held(run_dir, cluster):
        running = state(on_slurm, cluster, run_dir)
        assert (running["state"], running["job"], running["steps"]) == ("running", number, 30)
        monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
        monkeypatch.setenv("PATH", cluster.environment["PATH"])
        with pytest.raises(UserError, match=f"its job {number} is running"):
            submit.refuse_active(run_dir)
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


def test_refused_before_it_waits(on_slurm, cluster, words, tmp_path, monkeypatch):
    """What SLURM itself would never start, by the command; then what it is asked for one key and another."""
    run_dir = tmp_path / "run"
    asked = ("cluster=slurm", "engine=ddp", f"run_dir={run_dir}")
    on_slurm(cluster, "train", *words, *asked, "cluster.nodes=3").refused("sbatch refused", "node")
    assert not run_dir.exists()
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    slurm.partition_gpus.cache_clear()
    for more, said in ((("cluster.partition=gold",), "cluster.partition=gold: .*main"),
                       (("cluster.gpus=9", "hardware=h100"), "sbatch refused")):  # fmt: skip
        with pytest.raises(UserError, match=said):
            (config,) = compose.compose("train", [*words, *asked, *more])
            job.decide(config)
            submit.would_start(config["cluster"], run_dir)
    slurm.partition_gpus.cache_clear()


def test_only_asked(on_slurm, cluster, words, tmp_path):
    """cluster.test_only=true leaves nothing behind."""
    run_dir = tmp_path / "run"
    asked = on_slurm(cluster, "train", *words, *NODES, "engine=ddp", f"run_dir={run_dir}", "cluster.test_only=true")
    assert asked.status == 0 and "to start at" in asked.stdout, asked
    assert not run_dir.exists()
