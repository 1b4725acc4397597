"""One real sweep from the command line, killed while it trains and gone on with at once: a member that fails, the rank,
W&B, the page that compares."""

import json
import os
import re
import signal
import time

import browser
import pytest
import yaml
from matrix import overrides
from offline import records

pytestmark = pytest.mark.xdist_group("sweep")  # its sweep is made once

RATES = ("0.001", "0.01", "1e+30")  # the last one breaks the numbers
BEST = "01-0.01"
STEPS = 16


@pytest.fixture(scope="module")
def words(small):
    words = [word for word in (*small, *overrides("full", "single")) if not word.startswith(("tracking", "train.lea"))]
    words += ["checkpoint.every_minutes=null", "checkpoint.every_steps=2", "checkpoint.keep_last=9"]
    return [f"train.max_steps={STEPS}" if word.startswith("train.max_steps") else word for word in words]


@pytest.fixture(scope="module")
def swept(start, run, words, tmp_path_factory):
    """(what the sweep said until it was killed, the finished `ftdist resume`, the sweep's directory)

    SIGKILL comes as soon as the best member has done a step; the resume comes while its ranks still save.
    """
    sweep_dir = tmp_path_factory.mktemp("sweeps") / "rates"
    rates = f"train.learning_rate={','.join(RATES)}"
    process = start("ftdist", "train", "-m", *words, rates, "sweep.parallel=2", f"sweep_dir={sweep_dir}",
                    cwd=sweep_dir.parent)  # fmt: skip
    file, end = sweep_dir / BEST / "metrics.jsonl", time.monotonic() + 200
    while not (file.exists() and b"loss" in file.read_bytes()):
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    said = process.communicate()[0]
    return said, run("resume", sweep_dir), sweep_dir


def results(sweep_dir):
    return json.loads((sweep_dir / "results.json").read_text())["members"]


def test_one_fails_the_others_are_ranked(swept):
    _, finished, sweep_dir = swept
    assert finished.status == 1, finished
    lines = finished.stdout.splitlines()
    assert lines[-1] == f"sweep: {sweep_dir}"
    assert "1 of 3 members failed" in finished.stderr and f"ftdist resume {sweep_dir}" in finished.stderr
    table = [line.split()[:2] for line in lines if re.match(r"[12] ", line)]
    assert table == [["1", BEST], ["2", "00-0.001"]]
    assert any(line.startswith("02-1e+30: failed: rank 0: step 2: the gradients are not finite") for line in lines)
    rows = results(sweep_dir)
    assert [row["state"] for row in rows] == ["finished", "finished", "failed"]
    assert rows[0]["words"] == ["train.learning_rate=0.01"] and rows[0]["objective"] < rows[1]["objective"]
    last = [json.loads(line) for line in (sweep_dir / BEST / "metrics.jsonl").open()]
    assert rows[0]["objective"] == [row["eval_loss"] for row in last if "eval_loss" in row][-1]


def test_one_plan_and_one_preparation(swept):
    said, finished, sweep_dir = swept
    assert len(re.findall(r"^plan of ", said + finished.stdout, re.M)) == 1
    prepared = {
        json.loads((sweep_dir / row["name"] / "plan.json").read_text())["prepared"] for row in results(sweep_dir)
    }
    assert len(prepared) == 1


def test_each_member_can_be_made_again(swept):
    _, _, sweep_dir = swept
    asked = yaml.safe_load((sweep_dir / "sweep.yaml").read_text())
    assert [entry["words"] for entry in asked["members"]] == [[f"train.learning_rate={rate}"] for rate in RATES]
    command = json.loads((sweep_dir / BEST / "env.json").read_text())["command"]
    assert command == ["ftdist", "train", *asked["words"], "train.learning_rate=0.01"]
    assert not any(word.startswith(("sweep", "-m")) for word in command)


def test_wandb_groups_the_members(swept):
    _, _, sweep_dir = swept
    names = set()
    for file in sweep_dir.glob("*/wandb/offline-run-*/*.wandb"):
        for header in (record.run for record in records(file) if record.HasField("run")):
            assert header.run_group == "rates"
            names.add(header.display_name)
    assert names >= {"00-0.001", BEST}  # the third has died before its first record was on the disk


def test_the_page_compares(run, swept, tmp_path):
    _, _, sweep_dir = swept
    finished = run("report", sweep_dir)
    assert finished.stdout == f"report: {sweep_dir}/report.html\n", finished
    text = (sweep_dir / "report.html").read_text()
    for part in ("Lowest held-out loss of 2 runs: 01-0.01", "2 finished, 1 failed", ">learning_rate<", "not finite",
                 "peak memory", "parallel coordinates of 2 runs", "The best again", "learning_rate=0.01"):  # fmt: skip
        assert part in text, part
    assert text.index(">1. 01-0.01<") < text.index(">2. 00-0.001<") < text.index(">02-1e+30<")
    assert text.count("<svg") == 5 and "<script" not in text
    assert (sweep_dir / "plots" / "coordinates.png").is_file()
    if browser.executable():
        shown = browser.Browser()
        try:
            for width in (1280, 360):
                assert shown.open(sweep_dir / "report.html", width, 800) == ([], [])
                assert shown.value("document.documentElement.scrollWidth <= innerWidth")
        finally:
            shown.close()


def test_it_went_on_as_if_it_had_not_been_killed(run, swept, forks, words, tmp_path):
    """Every step is done once, and the numbers and the weights are those of the same run alone."""
    said, finished, sweep_dir = swept
    assert "3 members unfinished" in finished.stdout
    alone = forks.freeze(tmp_path / "alone", *words, "train.learning_rate=0.01", "tracking=none")
    assert forks.start(alone, world=1) == [0]
    for name in ("00-0.001", BEST):
        rows = [json.loads(line) for line in (sweep_dir / name / "metrics.jsonl").open()]
        assert [row["step"] for row in rows if "loss" in row] == list(range(1, STEPS + 1))
        if name == BEST:
            events = [json.loads(line) for line in (sweep_dir / name / "events.jsonl").open()]
            assert [event["step"] > 0 for event in events if event["event"] == "resume"] == [True]
            for key in ("loss", "eval_loss"):
                other = [json.loads(line) for line in (alone / "metrics.jsonl").open()]
                assert [row[key] for row in rows if key in row] == [row[key] for row in other if key in row]
            for file in (alone / "final").glob("*.safetensors"):
                assert file.read_bytes() == (sweep_dir / name / "final" / file.name).read_bytes()
    run("resume", sweep_dir, "train.learning_rate=1").refused("train.learning_rate=1", "sweep.parallel")
