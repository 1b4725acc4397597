"""What a tracked run tells Weights & Biases, read back from its offline file; and that nobody else is told anything."""

import json
import socket
import textwrap
import threading
from types import SimpleNamespace

import pytest
from matrix import overrides
from offline import history, records

from ftdist import tracking

SECRETS = {"HF_TOKEN": "hf_5ecret", "OPENAI_API_KEY": "sk-5ecret", "SOME_PASSWORD": "pa55word"}
TALKER = '''
    """Imported by every Python process at its start: notes who opens a connection to another machine."""
    import os, socket

    plain = socket.socket.connect

    def connect(self, address):
        network = self.family in (socket.AF_INET, socket.AF_INET6)
        if network and not str(address[0]).startswith(("127.", "::1", "localhost")):
            with open(os.environ["TALK"], "a") as file:
                file.write(f"{address}\\n")
        return plain(self, address)

    socket.socket.connect = connect
'''


@pytest.fixture
def listener():
    """A proxy that serves nothing and counts who comes; its URL and the list of visitors."""
    server, visitors = socket.create_server(("127.0.0.1", 0)), []

    def listen():
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            visitors.append(connection.recv(200))
            connection.close()

    threading.Thread(target=listen, daemon=True).start()
    yield f"http://127.0.0.1:{server.getsockname()[1]}", visitors
    server.close()


def test_a_tracked_run(run, small, listener, tmp_path):
    """With W&B switched on, nobody logged in, and every connection noted."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(textwrap.dedent(TALKER))
    url, visitors = listener
    watched = {
        "PYTHONPATH": str(tmp_path / "site"),
        "TALK": str(tmp_path / "talk"),
        "HOME": str(tmp_path),
        "WANDB_MODE": None,
        **dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy"), url),
    }
    words = (
        "tracking=wandb",
        "tracking.project=kitchen",
        "tracking.group=soups",
        "tracking.tags=[first,small]",
        "train.learning_rate=0.004",
        f"run_dir={tmp_path / 'runs' / 'tomato.1'}",
    )
    finished = run("train", *small, *overrides("full", "ddp"), *words, env=SECRETS | watched)
    assert finished.status == 0, finished
    the_offline_run_has_it_all(finished.run_dir)
    for file in finished.run_dir.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            assert not [name for name, secret in SECRETS.items() if secret.encode() in content], file
    assert visitors == []
    assert not (tmp_path / "talk").exists()


def the_offline_run_has_it_all(run_dir):
    (file,) = run_dir.glob("wandb/offline-run-*/*.wandb")  # one run, however many ranks
    everything = list(records(file))
    (header,) = (record.run for record in everything if record.HasField("run"))
    assert (header.project, header.run_group, header.job_type) == ("kitchen", "soups", "sft")
    assert list(header.tags) == ["first", "small"]
    assert header.run_id == json.loads((run_dir / "plan.json").read_text())["id"]  # two runs of one name stay two
    assert header.display_name == "tomato.1"
    config = {item.key: json.loads(item.value_json) for item in header.config.update}
    assert config["train"]["learning_rate"] == 0.004 and config["strategy"]["name"] == "full"
    logged = history(file)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]
    assert [row["loss"] for row in logged if "loss" in row] == [row["loss"] for row in rows if "loss" in row]
    assert [row["_step"] for row in logged if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert any("eval_loss" in row for row in logged)


def test_untracked_runs_leave_no_trace(cell):
    assert not list(cell("full", "single").run_dir.rglob("*wandb*"))


def test_steps_that_a_killed_client_has_kept_in_memory(tmp_path, monkeypatch):
    """The next start logs them again; not those of a start that ended in order, nor those that the server has."""
    (tmp_path / "plan.json").write_text('{"id": "one"}')
    told, online = [], SimpleNamespace(starting_step=0, finish=lambda: None)
    online.log = lambda metrics, step: told.append((step, metrics["loss"]))
    monkeypatch.setattr(tracking, "_opened", lambda *_: online)
    keys = {"name": "wandb", "project": "p", "entity": None, "group": None, "job_type": None, "tags": []}

    def starts(steps, ends):
        told.clear()
        log, finish = tracking.wandb_run(tmp_path, {}, **keys)
        for step in steps:
            with (tmp_path / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"step": step, "loss": step / 10, "grad_norm": None}) + "\n")
            log({"loss": step / 10}, step)
        if ends:
            finish()
        return [step for step, loss in told if loss == step / 10]

    assert starts([1, 2], ends=False) == [1, 2]
    assert starts([3, 4], ends=True) == [1, 2, 3, 4]
    assert starts([5], ends=False) == [5]
    assert starts([6], ends=True) == [5, 6]
    assert starts([7], ends=False) == [7]
    online.starting_step = 8  # the server has them all
    assert starts([8], ends=True) == [8]
