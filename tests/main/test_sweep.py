"""One real sweep from the command line: a member that fails, the rank, going on, W&B, the page that compares."""

import json
import re
import shutil

import browser
import pytest
import yaml
from matrix import overrides
from offline import records

RATES = ("0.001", "0.01", "1e+30")  # the last one breaks the numbers
BEST = "01-0.01"


@pytest.fixture(scope="module")
def swept(run, small, tmp_path_factory):
    """(the finished process, the sweep's directory)"""
    sweep_dir = tmp_path_factory.mktemp("sweeps") / "rates"
    words = [word for word in (*small, *overrides("full", "single")) if not word.startswith(("tracking", "train.lea"))]
    words += ["checkpoint.every_minutes=null", "checkpoint.every_steps=2", "checkpoint.keep_last=9"]
    rates = f"train.learning_rate={','.join(RATES)}"
    finished = run("train", "-m", *words, rates, "sweep.parallel=2", f"sweep_dir={sweep_dir}")
    return finished, sweep_dir


def results(sweep_dir):
    return json.loads((sweep_dir / "results.json").read_text())["members"]


def test_one_fails_the_others_are_ranked(swept):
    finished, sweep_dir = swept
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
    finished, sweep_dir = swept
    assert len(re.findall(r"^plan of ", finished.stdout, re.M)) == 1
    prepared = {
        json.loads((sweep_dir / row["name"] / "plan.json").read_text())["prepared"] for row in results(sweep_dir)
    }
    assert len(prepared) == 1


def test_each_member_can_be_made_again(swept):
    _, sweep_dir = swept
    asked = yaml.safe_load((sweep_dir / "sweep.yaml").read_text())
    assert [entry["words"] for entry in asked["members"]] == [[f"train.learning_rate={rate}"] for rate in RATES]
    command = json.loads((sweep_dir / BEST / "env.json").read_text())["command"]
    assert command == ["ftdist", "train", *asked["words"], "train.learning_rate=0.01"]
    assert not any(word.startswith(("sweep", "-m")) for word in command)


def test_wandb_groups_the_members(swept):
    _, sweep_dir = swept
    names = set()
    for file in sweep_dir.glob("*/wandb/offline-run-*/*.wandb"):
        for header in (record.run for record in records(file) if record.HasField("run")):
            assert header.run_group == "rates"
            names.add(header.display_name)
    assert names >= {"00-0.001", BEST}  # the third has died before its first record was on the disk


def test_the_page_compares(run, swept, tmp_path):
    _, sweep_dir = swept
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


def test_going_on(run, swept, tmp_path):
    """The finished one is left alone, one that was stopped ends with the same bits, the failed one is tried again."""
    _, first = swept
    sweep_dir = tmp_path / "rates"
    shutil.copytree(first, sweep_dir)
    before = results(sweep_dir)
    shutil.rmtree(sweep_dir / BEST / "final")  # as it was when it had been stopped after step 4
    shutil.rmtree(sweep_dir / BEST / "checkpoints" / "step-00000006")
    state = sweep_dir / "members" / f"{BEST}.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"state": "stopped", "status": 75}))
    left_alone = (sweep_dir / "00-0.001" / "events.jsonl").read_text()
    finished = run("resume", sweep_dir, "sweep.parallel=2")
    assert finished.status == 1 and "2 members unfinished" in finished.stdout, finished
    after = results(sweep_dir)
    assert [row["objective"] for row in after] == [row["objective"] for row in before]
    assert [row["attempts"] for row in after] == [2, 1, 2]
    assert (sweep_dir / "00-0.001" / "events.jsonl").read_text() == left_alone
    events = [json.loads(line) for line in (sweep_dir / BEST / "events.jsonl").open()]
    assert [event["step"] for event in events if event["event"] == "resume"] == [4]
    run("resume", sweep_dir, "train.learning_rate=1").refused("train.learning_rate=1", "sweep.parallel")
