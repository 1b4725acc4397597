"""Clusters of SLURM for a test session, and the runs that are compared."""

import json

import pytest
from nodes import Cluster, missing


@pytest.fixture(scope="session")
def clusters():
    """`clusters(NODES=3, TRACK="cgroup")`: such a SLURM, started once."""
    if lacking := missing():
        pytest.skip(f"no SLURM here ({', '.join(lacking)} missing); `make slurm-up` as root installs it")
    started = {}

    def clusters(**settings):
        key = json.dumps(settings, sort_keys=True)
        if key not in started:
            started[key] = Cluster(**settings)
        return started[key]

    yield clusters
    for cluster in started.values():
        cluster.close()


@pytest.fixture(scope="session")
def cluster(clusters):
    return clusters()


@pytest.fixture(scope="session")
def on_slurm(run):
    """`on_slurm(cluster, "train", …)`: the console script where that SLURM is to be had."""

    def on_slurm(cluster, *words, **kwargs):
        return run(*words, env=cluster.environment, **kwargs)

    return on_slurm


@pytest.fixture(scope="session")
def words(small):
    """Overrides of a short run of two processes: 30 steps over more than an epoch, a checkpoint every third."""
    return (
        *small,
        "train.learning_rate=1e-2",
        "train.max_steps=30",
        "train.num_train_epochs=9",
        "train.per_device_train_batch_size=2",
        "checkpoint.every_minutes=null",
        "checkpoint.every_steps=3",
        "eval.samples=0",
    )


@pytest.fixture(scope="session")
def local(forks, words, tmp_path_factory):
    """`local("full", "zero2")`: the same run of two processes on this machine. Made once."""
    made = {}

    def local(strategy, engine):
        if (strategy, engine) not in made:
            here = ("cluster.processes=2", "cluster.oversubscribe=true")
            run_dir = tmp_path_factory.mktemp("local") / "run"
            forks.freeze(run_dir, *words, f"strategy={strategy}", f"engine={engine}", *here)
            assert forks.start(run_dir) == [0, 0]
            made[strategy, engine] = run_dir
        return made[strategy, engine]

    return local
