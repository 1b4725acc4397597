"""Who starts every rank with accelerate or torchrun gets the run that `ftdist train` makes, in one directory."""

import json
import sys
from pathlib import Path

import pytest
from matrix import overrides

REPOSITORY = Path(__file__).parents[2]
TWO = ("--num_processes", "2", "--main_process_port", "0")


def of_two_ranks(strategy, engine):
    """A cell's words without what the launcher itself says."""
    return [word for word in overrides(strategy, engine) if not word.startswith(("engine=", "cluster."))]


@pytest.mark.parametrize(
    ("engine", "command"),
    [
        (
            "zero3",
            ("accelerate", "launch", *TWO, "--config_file", "launch/zero3.yaml", "-m", "ftdist.train", "engine=zero3"),
        ),
        ("ddp", ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "ftdist.train")),
    ],
)
def test_the_same_run(execute, forks, small, cell, tmp_path, engine, command):
    """torchrun and its ranks are forked here; tests/durable/test_commands.py starts its script."""
    if command[0] == "-m":
        command = (forks.python, *command)
    words = (*small, *of_two_ranks("full", engine), f"run_dir={tmp_path / 'runs' / 'one'}")
    finished = execute(*command, *words, cwd=REPOSITORY)
    assert finished.status == 0, finished
    (run_dir,) = (tmp_path / "runs").iterdir()  # one for all ranks
    assert finished.stdout.count("run: ") == 1 and finished.run_dir == run_dir
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]
    ours = cell("full", engine)
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in rows if key in row] == pytest.approx([row[key] for row in ours.steps], rel=1e-5)
    plan = json.loads((run_dir / "plan.json").read_text())
    assert (plan["engine"], plan["processes"], plan["nodes"]) == (engine, 2, 1)
    assert sorted(file.name for file in (run_dir / "final").iterdir()) == sorted(
        file.name for file in (ours.run_dir / "final").iterdir()
    )
    assert {file.name for file in (run_dir / "logs").iterdir()} >= {"rank-0.log", "rank-1.log"}
    again = "accelerate launch --config_file accelerate.yaml -m ftdist.train"
    assert again in (run_dir / "README.md").read_text()  # not `ftdist strategy=full …`, which is no command


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("engine=zero2",), "engine=zero2"),  # the launcher was started for zero3
        (("train.learing_rate=1",), "train.learning_rate"),
        (("-m", "seed=1,2"), "one configuration"),
        (("cluster.processes=4",), "cluster.processes=4"),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, tuple) else "",
)
def test_refused_by_one_rank_for_all(execute, forks, small, tmp_path, words, said):
    """Launcher and ranks are real ones, forked but for the first words."""
    by_fork = (forks.python, "-m", "accelerate.commands.launch")
    launch = ("accelerate", "launch") if words == ("engine=zero2",) else by_fork
    given = (*small, f"run_dir={tmp_path / 'run'}", *words)
    finished = execute(
        *launch, *TWO, "--config_file", "launch/zero3.yaml", "-m", "ftdist.train", *given, cwd=REPOSITORY
    )
    assert finished.status != 0
    (line,) = (line for line in finished.stderr.splitlines() if line.startswith("ftdist:"))
    assert said in line
    assert not (tmp_path / "run").exists()


def test_without_a_launcher_it_is_ftdist_train(execute, tmp_path):
    execute(sys.executable, "-m", "ftdist.train", "engine=zero5", cwd=tmp_path).refused("engine=zero5", "zero")
