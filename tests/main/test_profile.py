"""train.profile=true: seconds by phase add up, steps are counted once over a resume, the page shows them."""

import gzip
import json

import pytest

from ftdist.profiling import Clock
from ftdist.report import gather, page, phases, plots


def test_a_phase_owns_what_is_not_in_an_inner_one():
    now = iter(range(100))
    clock = Clock(now=lambda: next(now))  # each look at it takes a second
    with clock.phase("forward"):
        with clock.phase("loss"):
            pass
        with pytest.raises(ZeroDivisionError), clock.phase("communication"):
            raise ZeroDivisionError
    with clock.phase("evaluation"), clock.phase("forward"):  # told as one
        pass
    assert {k: v for k, v in clock.seconds.items() if v} == {
        "other": 2, "forward": 3, "loss": 1, "communication": 1, "evaluation": 1,
    }  # fmt: skip
    assert sum(clock.seconds.values()) == clock.since


def test_the_slowest_rank_is_the_one_the_others_wait_for(tmp_path):
    assert phases.gathered(tmp_path) == {}
    folder = tmp_path / phases.FOLDER
    folder.mkdir()
    for rank, own in enumerate((4.0, 6.0)):  # both last ten seconds; rank 0 waits for the other
        seconds = dict.fromkeys(phases.PHASES, 0.0) | {"forward": own, "communication": 10 - own}
        part = {"rank": rank, "first_step": 1, "seconds": seconds, "step_seconds": [5.0, 5.0]}
        (folder / f"from-1-rank-{rank}.json").write_text(json.dumps(part))
    found = phases.gathered(tmp_path)
    assert found["slowest"] == {"rank": 1, "share": 0.5} and found["steps"] == [5.0, 5.0]


def test_a_profiled_run_that_goes_on(forks, small, tmp_path):
    words = (
        *small, "engine=ddp", "strategy=lora", "cluster.processes=2", "cluster.oversubscribe=true", "eval.samples=0",
        "train.profile=true", "train.max_steps=6", "train.per_device_train_batch_size=2", 'train_until="step 4"',
    )  # fmt: skip
    run_dir = forks.freeze(tmp_path / "run", *words)
    assert forks.start(run_dir) == [75, 75]
    assert forks.change(run_dir, "train_until=null") == 0
    assert forks.start(run_dir) == [0, 0]

    names = sorted(file.name for file in (run_dir / phases.FOLDER).iterdir())
    assert names == [f"from-{s}-rank-{r}{e}" for s in (1, 5) for r in (0, 1) for e in (".json", ".trace.json.gz")]
    for file in (run_dir / phases.FOLDER).glob("*-rank-?.json"):
        part = json.loads(file.read_text())
        assert sum(part["seconds"].values()) == pytest.approx(part["wall_seconds"], rel=1e-3)
        for name in ("data", "forward", "loss", "backward", "communication", "optimizer", "logging"):
            assert part["seconds"][name] > 0, name
        assert part["trace"]["steps"] == (2 if part["first_step"] == 1 else 1)  # a resumed one of two has one left
    with gzip.open(run_dir / phases.FOLDER / "from-1-rank-1.trace.json.gz", "rt") as file:
        events = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"ftdist: forward", "ftdist: loss", "ftdist: backward", "ftdist: optimizer"} <= events

    run = gather.run(run_dir, "run")
    assert len(run.profile["steps"]) == 6 and set(run.profile["ranks"]) == {0, 1}
    text = page.of_run(run, {name: plot.title for name, plot in plots.of_run(run).items()})
    assert "Where the time went" in text and "Slowest: rank" in text and "length of steps" in text
