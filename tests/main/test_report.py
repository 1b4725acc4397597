"""The report page, looked at in a headless browser."""

import json
import re
import shutil

import browser
import pytest
from offline import records

NASTY = '<script>alert("x")</script> & "quotes" سلام می‌روم'
EVENTS = [
    {"time": 1.7e9, "event": "start", "step": 0},
    {"time": 1.7e9 + 60, "event": "checkpoint", "step": 2, "bytes": 1000},
    {"time": 1.7e9 + 70, "event": "health-spike", "step": 3, "text": "loss jumped"},
    {"time": 1.7e9 + 90, "event": "restart", "step": None, "reason": "rank 1: killed by signal 9"},
    {"time": 1.7e9 + 99, "event": "resume", "step": 2, "checkpoint": "step-2"},
    {"time": 1.7e9 + 200, "event": "finished", "step": 6},
]


@pytest.fixture(scope="module")
def rich(cell, tmp_path_factory):
    """A run directory with everything that a page can show."""
    directory = tmp_path_factory.mktemp("report") / "run"
    shutil.copytree(cell("spectrum", "zero3").run_dir, directory)
    lines = [json.dumps(event) for event in EVENTS]
    (directory / "events.jsonl").write_text("\n".join(lines) + '\n{"time": 17')  # torn
    (directory / "eval").mkdir(exist_ok=True)
    values = {"loss": 2.0, "perplexity": 7.4, "exact_match": 0.2, "retention_loss": 3.0, "rows": 2, "empty": 1}
    metrics = {
        "base": values,
        "tuned": values | {"loss": 1.0, "perplexity": 2.7, "exact_match": 0.9, "retention_loss": 3.2},
        "difference": {
            "exact_match": {"difference": 0.7, "low": 0.5, "high": 0.8, "wins": 7, "ties": 2, "losses": 1},
            "loss": {"difference": -1.0, "low": -1.2, "high": -0.7, "wins": 9, "ties": 0, "losses": 1},
        },
        "signatures": {}, "settings": {"data": None}, "overlap": {"rows": [1], "of": 2}, "held_out": 31,
    }  # fmt: skip
    (directory / "eval" / "metrics.json").write_text(json.dumps(metrics))
    sample = {"prompt": "p", "reference": "yes", "base": "the old answer", "tuned": "the new answer",
              "messages": [{"role": "user", "content": NASTY}]}  # fmt: skip
    long = sample | {"tuned": "x" * 5000, "base": "", "in_training": True}
    (directory / "eval" / "samples.jsonl").write_text(json.dumps(sample) + "\n" + json.dumps(long) + "\n")
    plan = json.loads((directory / "plan.json").read_text())
    plan |= {"device_peak_bytes": 3 << 30, "measured": {"device_peak_bytes": 2 << 30}}
    (directory / "plan.json").write_text(json.dumps(plan))
    return directory


@pytest.fixture(scope="module")
def page(verb, rich):
    finished = verb("report", rich)
    assert finished.status == 0, finished
    assert finished.stdout == f"report: {rich}/report.html\n"
    return rich / "report.html"


def test_the_page_tells_what_the_run_knows(page):
    text = page.read_text()
    for part in ("Finished: 6 steps", "20.0% → 90.0%", "2 / 1</td>", "WARNING: 1 of 2 evaluation rows", "health-spike",
                 "restart at step 3, resume at step 2", "killed by signal 9", "loss over 31 held-out rows",
                 "train.learning_rate", "3.00 GiB", "2.00 GiB", "Again", "ftdist train", "in the training data",
                 "<del>old</del>", "<ins>new</ins>", "data:image/png;base64", "&lt;script&gt;"):  # fmt: skip
        assert part in text, part
    assert "<script" not in text and not re.search(r"(?:src|href)=\"(?!data:|#)", text)
    assert text.count("<svg") == 8  # five curves, differences, trade-off, time line
    pictures = {file.stem for file in (page.parent / "plots").glob("*.png")}
    assert pictures >= {"loss", "learning_rate", "gradient_norm", "throughput", "differences", "time_line", "memory"}
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert len(text) < 1_000_000


@pytest.mark.skipif(browser.executable() is None, reason="no Chromium here; apt-get install chromium")
def test_in_a_real_browser(page, tmp_path):
    shown = browser.Browser()
    try:
        for name, width, dark in (("desk", 1280, False), ("dark", 1280, True), ("phone", 360, False)):
            errors, asked = shown.open(page, width, 800, dark)
            assert errors == [] and asked == []
            assert shown.value("document.documentElement.scrollWidth <= innerWidth"), name
            # nothing pokes out of its card, and no plot is empty
            assert shown.value(
                "[...document.querySelectorAll('svg')].every(s => s.getBoundingClientRect().height > 60)"
            )
            over = "filter(e => e.getBoundingClientRect().right > innerWidth + 1).length"
            assert shown.value(f"[...document.querySelectorAll('body > *')].{over}") == 0, name
            paper = shown.value("getComputedStyle(document.body).backgroundColor")
            lines = shown.value("getComputedStyle(document.querySelector('svg text')).fill")
            assert (paper == "rgb(13, 17, 23)") == dark and lines not in ("", "none", paper), (paper, lines)
            shown.screenshot(tmp_path / f"{name}.png")
            assert (tmp_path / f"{name}.png").stat().st_size > 50_000
        assert shown.pdf().startswith(b"%PDF")
    finally:
        shown.close()


def test_wandb_gets_the_same_tables_and_plots(page, monkeypatch):
    import wandb

    from ftdist import tracking

    monkeypatch.setenv("WANDB_MODE", "offline")
    keys = {"project": "kitchen", "entity": None, "group": None, "job_type": None, "tags": []}
    config = {"tracking": {"name": "wandb", **keys}, "task": {"name": "sft"}}
    tracking.results(page.parent, config, page.parent / "plots")
    wandb.teardown()  # its process writes the file; the end of ours would wait for it too
    (file,) = page.parent.glob("wandb/offline-run-*/*.wandb")
    logged = {
        item.key or ".".join(item.nested_key): json.loads(item.value_json)
        for record in records(file)
        if record.HasField("history")
        for item in record.history.item
    }
    assert logged["eval/tuned/exact_match"] == 0.9 and logged["eval/samples.nrows"] == 2
    assert logged["_step"] == 6  # the last one: W&B drops earlier steps
    assert {"plots/loss.path", "plots/differences.path", "eval/table.path"} <= logged.keys()


def test_several_runs_are_compared(run, verb, cell, tmp_path):
    sweep = tmp_path / "sweep"
    for name, strategy in (("0", "full"), ("1", "lora")):
        shutil.copytree(cell(strategy, "ddp").run_dir, sweep / name)
    finished = run("report", sweep)
    assert finished.stdout == f"report: {sweep}/report.html\n", finished
    text = (sweep / "report.html").read_text()
    for part in ("2 runs", "Lowest held-out loss", "strategy.name", "What differs", "held-out loss"):
        assert part in text
    named = tmp_path / "elsewhere" / "two.html"
    assert verb("report", sweep / "0", sweep / "1", "--output", named).status == 0
    assert named.is_file() and (named.parent / "two-plots" / "loss.png").is_file()


def test_an_unfinished_run_and_bad_input(verb, cell, tmp_path):
    begun = tmp_path / "begun"
    shutil.copytree(cell("full", "ddp").run_dir, begun)
    shutil.rmtree(begun / "final")
    (begun / "logs" / "rank-1.error.json").write_text('{"rank": 1, "message": "out of memory"}')
    (begun / "metrics.jsonl").unlink()
    assert verb("report", begun).status == 0
    assert "Not finished; so far 0 steps. Rank 1 failed: out of memory." in (begun / "report.html").read_text()
    verb("report").refused("report: which run?")
    verb("report", "/no/run").refused("/no/run", "no such directory")
    verb("report", begun, begun).refused("named twice")
    for name in ("plan.json", "env.json", "data_report.json", "base.json"):
        (begun / name).unlink()
    assert verb("report", begun).status == 0
    assert "env.json is not there" in (begun / "report.html").read_text()
    (begun / "plan.json").write_text("{")
    verb("report", begun).refused("plan.json", "cannot be read")
    empty = tmp_path / "empty"
    empty.mkdir()
    verb("report", empty).refused(str(empty), "no run directory")
    (empty / "config.yaml").write_text("a: [")
    verb("report", empty).refused("config.yaml", "cannot be read")


def test_members_of_two_sweeps_keep_their_names_apart(cell, tmp_path):
    from ftdist.report import write

    for sweep in ("a", "b"):
        shutil.copytree(cell("full", "ddp").run_dir, tmp_path / sweep / "0")
    text = write([tmp_path / "a", tmp_path / "b"], tmp_path / "both.html").read_text()
    assert "<b>a/0</b>" in text and "<b>b/0</b>" in text
    assert "a/0 from" in text and "b/0 from" in text  # two curves


def test_a_difference_without_a_value_is_no_verdict(page, monkeypatch):
    """Base and tuned were judged on other rows: nothing can be compared."""
    import dataclasses

    from ftdist.report import gather
    from ftdist.report import page as pages

    found = gather.run(page.parent, "run")
    none = {"difference": None, "low": None, "high": None, "wins": 0, "ties": 0, "losses": 0}
    metrics = found.metrics | {"difference": dict.fromkeys(found.metrics["difference"], none)}
    text = pages.of_run(dataclasses.replace(found, metrics=metrics), {})
    assert "the tuned model is" not in text and "20.0%" in text
