"""The parts of a sweep without training: spaces, names, ranking, members as processes, a search that goes on."""

import json
import os
import signal
import sys
import textwrap

import pytest

from ftdist import compose, lease, stops
from ftdist.errors import Failed, UserError
from ftdist.sweep import directory, keys, local, objective, rank
from ftdist.sweep.directory import Member

# --- what a space may say -------------------------------------------------------------------------

WRONG = {  # value of a space's key → what the one line must say
    "log 1e-5": ("train.x: log 1e-5", "log LOW HIGH"),
    "log 0 1": ("log 0 1", "above 0"),
    "uniform 2 1": ("uniform 2 1", "below HIGH"),
    "int 1 2.5": ("int 1 2.5", "whole numbers"),
    "gauss 0 1": ("gauss 0 1", "uniform LOW HIGH"),
    "int log 0 8": ("int log 0 8", "above 0"),
}


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_dimension_is_named(text):
    with pytest.raises(UserError) as caught:
        keys.space({"train.x": text})
    assert "\n" not in str(caught.value)
    for part in WRONG[text]:
        assert part in str(caught.value)


def test_wrong_lists_and_keys_are_named():
    for given, part in (
        ({"seed": [1]}, "two or more values"),
        ({"seed": [1, 1]}, "no two alike"),
        ({"run_dir": ["a", "b"]}, "cannot be searched"),
        ({"sweep.trials": "int 1 9"}, "cannot be searched"),
        ({}, "nothing to search"),
    ):
        with pytest.raises(UserError, match=part):
            keys.space(given)


def test_what_dimensions_mean():
    space = keys.space({"a": "log 1e-5 1e-3", "b": "uniform 0 0.1", "c": "int log 4 64", "d": ["x", None, [1, 2]]})
    assert space["a"] == keys.Range(1e-5, 1e-3, log=True, whole=False)
    assert space["b"].ends == [0.0, 0.1] and space["c"].ends == [4, 64]
    assert space["d"].ends == ["x", None, [1, 2]]


def test_every_value_survives_hydra(tmp_path):
    """Written as an override and read again: the same value."""
    values = ["all-linear", ["q_proj", "v_proj"], "a, b=c", 'say "x"', True]
    for value in values:
        (config,) = compose.compose("plan", ["strategy=lora", keys.word("strategy.targets", value)])
        assert config["strategy"]["targets"] == value
    (config,) = compose.compose("plan", [keys.word("train.learning_rate", 1.2345678901234e-05)])
    assert config["train"]["learning_rate"] == 1.2345678901234e-05


def test_names_of_members():
    words = [["train.lr=0.000123456789", "strategy=lora"], ["train.lr=1e-05", "strategy=[a,b]"], ["x=/some/where"]]
    assert directory.names(words) == ["00-0.0001235-lora", "01-1e-05-a_b", "02-some_where"]
    assert directory.names([["x=1"]], first=123) == ["123-1"]
    assert len(directory.names([["x=" + "y" * 200]])[0]) <= directory.LONGEST


# --- the objective --------------------------------------------------------------------------------


def config_of(*words):
    return compose.compose("plan", list(words))[0]


def test_an_objective_that_nothing_records_is_refused():
    plain = config_of()
    objective.check("eval_loss", plain)
    for name, words, part in (
        ("eval_los", (), "did you mean eval_loss"),
        ("eval_loss", ("train.eval_strategy=no",), "evaluates nothing"),
        ("tuned.exact_match", (), "eval.samples"),
        ("tuned.exact", ("eval.samples=5",), "did you mean tuned.exact_match"),
        ("eval_exact_match", (), "no run records it"),
    ):
        with pytest.raises(UserError, match=part):
            objective.check(name, config_of(*words) if words else plain)
    objective.check("tuned.rougeL", config_of("eval.samples=5"))
    objective.check("eval_exact_match", config_of("eval.during=5"))


def test_an_objective_of_lines_that_were_cut(tmp_path):
    """A run that was killed while it wrote: the rest is read."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "eval_loss": 2.5}\n{"step": 3, "eval_lo\n7\n')
    (tmp_path / "events.jsonl").write_text('{"event": "best-restored", "step": 1}\n{"event": "best-restored", "st')
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "metrics.json").write_text('{"tuned": {"loss"')
    assert objective.seen(tmp_path) == ["eval_loss"]
    assert objective.value(tmp_path, "eval_loss") == 2.5 and objective.value(tmp_path, "tuned.loss") is None


def test_the_objective_is_the_last_finite_value(tmp_path):
    rows = [{"step": 1, "loss": 3.0}, {"step": 1, "eval_loss": 2.5}, {"step": 2, "eval_loss": None}]
    lines = [json.dumps(row) for row in [*rows, {"step": 3, "eval_loss": 2.0}, {"step": 4, "eval_loss": None}]]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 5, "eval_l')  # torn
    assert objective.series(tmp_path, "eval_loss") == [(1, 2.5), (3, 2.0)]
    assert objective.value(tmp_path, "eval_loss") == 2.0 and objective.value(tmp_path, "loss") == 3.0
    assert objective.value(tmp_path, "tuned.loss") is None
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "metrics.json").write_text('{"base": {"loss": 9}, "tuned": {"loss": 1.5}}')
    assert objective.value(tmp_path, "tuned.loss") == 1.5
    (tmp_path / "events.jsonl").write_text('{"time": 1, "event": "best-restored", "step": 1}\n')
    assert objective.value(tmp_path, "eval_loss") == 2.5
    values = {"a": 2.0, "b": None, "c": 1.0, "d": 3.0}
    assert objective.order(values, "minimize") == ["c", "a", "d", "b"]
    assert objective.order(values, "maximize") == ["d", "a", "c", "b"]


def test_what_a_member_took(tmp_path):
    """Pre-empted after 100 s, in the queue for 900, then 50 s: of the first start only the run's own events know."""
    from types import SimpleNamespace

    from ftdist.report import compare

    told = [("job", 0), ("start", 20), ("requeue", 100), ("job", 1000), ("resume", 1010), ("finished", 1050)]
    events = [{"event": event, "time": float(time), "step": None} for event, time in told]
    config = {"hardware": {"price_per_hour": 36.0}}
    run = SimpleNamespace(plan={"processes": 4, "nodes": 2}, steps=[], events=events, config=config)
    assert compare.took(run, 60.0)["seconds"] == 150.0 and compare.took(run, 60.0)["cost"] == 8 * 36 * 150 / 3600
    run.events = [event for event in events if event["event"] != "job"]  # on one machine
    assert compare.took(run, None)["seconds"] == 80 + 40
    assert compare.took(run, 130.0)["seconds"] == 130.0  # with start-up and evaluation


# --- members as processes -------------------------------------------------------------------------

SWEEP = {"name": "grid", "objective": "eval_loss", "direction": "minimize", "parallel": 1, "retries": 0}
HEAD = """
    import json, os, signal, sys, time
    from pathlib import Path
    from ftdist.sweep import directory
    sweep, name = Path(sys.argv[1]), sys.argv[2]
    signal.alarm(60)  # no test waits for ever
    attempts = directory.state(sweep, name).attempts
    (sweep / name).mkdir(exist_ok=True)
    def end(state, status, reason=None):
        directory.mark(sweep, name, state=state, status=status, reason=reason)
        raise SystemExit(status)
"""


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """`sweep(script, names)`: a sweep whose members are processes of that script; `sweep.run()` runs them."""

    class Sweep:
        dir = tmp_path

        def __call__(self, script, names=("00", "01", "02"), **changes):
            head = {"name": "s", "words": [], "sweep": SWEEP | changes, "seed": 1, "directory": str(tmp_path)}
            directory.write(tmp_path, head, [Member(n, [f"x={n}"]) for n in names], [{} for _ in names])
            text = textwrap.dedent(HEAD) + textwrap.dedent(script)
            monkeypatch.setattr(local, "command", lambda folder, n: [sys.executable, "-c", text, str(folder), n])
            self.ended = []
            return self

        def run(self, places=1, retries=0, until=None):
            from ftdist.sweep.start import Grid

            grid = Grid(tmp_path)
            return local.run(
                tmp_path,
                grid.take,
                grid.look,
                lambda name, state: self.ended.append((name, state.state)),
                [local.Share()] * places,
                retries,
                stops.Limit(until),
            )

        def states(self):
            return {m.name: directory.state(tmp_path, m.name).state for m in directory.members(tmp_path)}

    return Sweep()


def test_a_member_that_fails_leaves_the_others_alone(sweep):
    sweep("""
        if name == "00": end("failed", 1, "out of memory")
        if name == "01": os.kill(os.getpid(), signal.SIGKILL)
        (sweep / name / "metrics.jsonl").write_text('{"step": 1, "eval_loss": 2.0}')
        end("finished", 0)
    """)
    assert sweep.run() is None
    assert sweep.states() == {"00": "failed", "01": "failed", "02": "finished"}
    rows = rank.results(sweep.dir)
    assert [row["name"] for row in rows] == ["02", "00", "01"]
    assert rows[2]["reason"] == "killed by signal 9" and rows[0]["objective"] == 2.0
    assert json.loads((sweep.dir / "results.json").read_text())["members"] == rows
    text = rank.table(rows, "eval_loss")
    assert "00: out of memory" in text and text.splitlines()[1].split()[:2] == ["1", "02"]


def test_retries_are_for_failures_and_have_an_end(sweep):
    sweep("""
        if name == "00": end("finished" if attempts == 2 else "failed", 0 if attempts == 2 else 1, "once")
        if name == "01": end("failed", 1, "always")
        end("failed", 93, "do not start me again")
    """)
    sweep.run(retries=2)
    assert {n: directory.state(sweep.dir, n).attempts for n in ("00", "01", "02")} == {"00": 2, "01": 3, "02": 1}
    assert sorted(sweep.ended) == [("00", "finished"), ("01", "failed"), ("02", "failed")]


def test_going_on_leaves_what_is_finished_alone(sweep):
    script = """
        with (sweep / name / "starts").open("a") as file: file.write("x")
        end("finished", 0) if name == "00" or attempts == 2 else end("stopped" if name == "01" else "failed", 75)
    """
    sweep(script).run()
    assert sweep.states() == {"00": "finished", "01": "stopped", "02": "failed"}
    left = directory.unfinished(sweep.dir)
    directory.reopen(sweep.dir, left)
    sweep.run()
    assert set(sweep.states().values()) == {"finished"}
    assert [(sweep.dir / n / "starts").read_text() for n in ("00", "01", "02")] == ["x", "xx", "xx"]


def test_members_run_beside_one_another(sweep):
    """Each waits for a sign of the other: one after another they would never end."""
    sweep(
        """
        (sweep / f"{name}.here").touch()
        until = time.monotonic() + 60
        while len(list(sweep.glob("*.here"))) < 2 and time.monotonic() < until: time.sleep(0.01)
        end("finished", 0) if len(list(sweep.glob("*.here"))) == 2 else end("failed", 1)
        """,
        names=("00", "01"),
    ).run(places=2)
    assert set(sweep.states().values()) == {"finished"}
    assert (sweep.dir / "logs" / "00.log").is_file()


def test_a_signal_lets_the_running_members_save(sweep):
    """The first member asks for the end of the sweep, as Ctrl-C does; both running ones are told, no other starts."""
    sweep(
        """
        signal.signal(signal.SIGINT, lambda *_: end("stopped", 130, "saved"))
        (sweep / f"{name}.here").touch()
        if name == "00":
            while not (sweep / "01.here").exists(): time.sleep(0.01)
            os.kill(os.getppid(), signal.SIGINT)
        signal.pause()
        """
    )
    assert sweep.run(places=2) == "Ctrl-C"
    assert sweep.states() == {"00": "stopped", "01": "stopped", "02": "waiting"}


def test_a_file_stops_a_sweep_too(sweep):
    sweep("""
        signal.signal(signal.SIGTERM, lambda *_: end("stopped", 75, "saved"))
        from ftdist import stops
        stops.request(sweep, "ftdist stop")
        signal.pause()
    """)
    assert sweep.run() == "ftdist stop"
    assert sweep.states() == {"00": "stopped", "01": "waiting", "02": "waiting"}


def test_the_end_of_the_time_starts_no_other_member(sweep, monkeypatch):
    monkeypatch.setenv(stops.STARTED, "0")
    assert sweep("end('finished', 0)").run(until="1s") == "train_until=1s"
    assert set(sweep.states().values()) == {"waiting"}


PLAYED = """
    from ftdist.sweep import local
    asked, file, shot = [], sweep / name / "metrics.jsonl", sweep / "shot"
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: asked.append(1))
    with local.present(sweep):
        for step in range(len(file.read_text().splitlines()) if file.exists() else 0, 8):
            if asked: end("stopped", 75, "saved")
            if name == "02" and step == 4 and not shot.exists():
                shot.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            with file.open("a") as out: print(json.dumps({"step": step, "eval_loss": 20 - step - int(name)}), file=out)
            time.sleep(0.02)  # the work of a step
        directory.ended(sweep, name, 0, None, 1.0)
"""


def test_a_sweep_that_is_killed_again_and_again(sweep):
    """The sweep's own process by SIGKILL and Ctrl-C, each as soon as so many steps are done, and once a member.

    Each resume comes at once. Every step of every member is done once, and the order is that of an untouched sweep.
    """
    from ftdist.sweep import start

    names = ("00", "01", "02", "03")
    sweep(PLAYED, names=names, parallel=2)
    config = {"cluster": {"name": "local", "nodes": 1, "processes": 1, "oversubscribe": True}, "train_until": None}
    for name in names:
        directory.configure(sweep.dir, name, config)

    def begin():
        child = os.fork()
        if child:
            return child
        status = 99
        try:
            start.go_on(sweep.dir, [])
            status = 0
        except Failed as failure:
            status = failure.status
        finally:
            os._exit(status)

    def steps():
        return sum(file.read_text().count("\n") for file in sweep.dir.glob("*/metrics.jsonl"))

    for until, number, expected in ((2, signal.SIGKILL, -9), (8, signal.SIGINT, 130), (14, signal.SIGKILL, -9),
                                    (22, signal.SIGKILL, -9)):  # fmt: skip
        child = begin()
        while steps() < until:
            assert os.waitpid(child, os.WNOHANG) == (0, 0), sweep.states()
        os.kill(child, number)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == expected, sweep.states()
    last = [os.waitstatus_to_exitcode(os.waitpid(begin(), 0)[1]) for _ in range(2)]
    assert last[1] == 0 and (sweep.dir / "shot").exists()
    rows = rank.results(sweep.dir)
    assert [(row["name"], row["state"], row["objective"]) for row in rows] == [
        (name, "finished", 20.0 - 7 - int(name)) for name in reversed(names)
    ]
    for name in names:
        done = [json.loads(line)["step"] for line in (sweep.dir / name / "metrics.jsonl").open()]
        assert done == list(range(8)), name


def test_devices_are_shared_out(monkeypatch):
    from ftdist import launcher

    monkeypatch.setattr(launcher, "devices", lambda: (4, "GPU"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,GPU-a,7")
    assert [share.gpus for share in local.shares(2, 2, False)] == [("4", "5"), ("GPU-a", "7")]
    with pytest.raises(UserError, match="sweep.parallel=2.*want 6 GPUs.*has 4.*sweep.parallel=1"):
        local.shares(2, 3, False)
    assert local.shares(2, 3, True) == [local.Share()] * 2
    monkeypatch.setattr(launcher, "devices", lambda: (2, "CPU core"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5})
    assert [share.cores for share in local.shares(2, 1, False)] == [(3,), (5,)]


# --- a search -------------------------------------------------------------------------------------

SPACE = {"train.learning_rate": "log 1e-5 1e-1", "strategy": ["lora", "full"]}
SEARCH = SWEEP | {"name": "search", "space": SPACE, "trials": 12, "random_trials": 4, "pruner": "median",
                  "prune_from": 3, "prune_after": 0, "keep_pruned": False}  # fmt: skip


@pytest.fixture
def search(tmp_path, monkeypatch):
    """`search(folder, count)`: plays so many trials, whose loss is least at 1e-3, without a run behind them."""
    import math

    from ftdist import job
    from ftdist.sweep import checks
    from ftdist.sweep.search import Search

    monkeypatch.setattr(compose, "compose", lambda verb, words: [{"words": words}])
    monkeypatch.setattr(checks, "completed", lambda *_: None)
    monkeypatch.setattr(job, "ready", lambda *_: None)

    def play(folder, count, **changes):
        sweep_dir = tmp_path / folder
        if not sweep_dir.exists():
            sweep_dir.mkdir()
            head = {"name": "s", "words": ["seed=7"], "sweep": SEARCH | changes, "seed": 7, "directory": "."}
            directory.write(sweep_dir, head, [], [])
        source = Search(sweep_dir)
        with lease.locked(sweep_dir):
            source.catch_up()
        directory.reopen(sweep_dir, directory.unfinished(sweep_dir))
        for _ in range(count):
            name = source.take()
            if name is None:
                return sweep_dir
            (own,) = (m.words for m in directory.members(sweep_dir) if m.name == name)
            words = dict(word.split("=") for word in own)
            final = 1 + abs(math.log10(float(words["train.learning_rate"])) + 3) + (words["strategy"] == "lora")
            run_dir = sweep_dir / name
            (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
            for step in (1, 2):
                with (run_dir / "metrics.jsonl").open("a") as file:
                    file.write(json.dumps({"step": step, "eval_loss": final + 2 - step}) + "\n")
                source.look(name)
                if asked := stops.requested(run_dir):
                    break
            reason = f"stopped ({asked}) after step {step}" if asked else None
            state = directory.mark(sweep_dir, name, state="stopped" if asked else "finished", reason=reason)
            source.ended(name, state)
        return sweep_dir

    return play


def test_a_search_finds_the_best_prunes_and_keeps_to_its_number(search):
    done = search("a", 99)
    rows = rank.results(done)
    assert len(rows) == SEARCH["trials"]
    states = [row["state"] for row in rows]
    assert states.count("pruned") >= 2 and states.count("finished") >= 4
    assert rows[0]["objective"] < 1.5 and "strategy=full" in rows[0]["words"]
    for row in rows:  # keep_pruned=false
        assert (done / row["name"] / "checkpoints").exists() == (row["state"] == "finished")
    assert search("a", 99) == done and len(rank.results(done)) == SEARCH["trials"]


def test_a_search_that_was_stopped_goes_on_as_if_it_had_not_been(search):
    whole = directory.members(search("whole", 99))
    search("parts", 3)
    search("parts", 4)
    assert directory.members(search("parts", 99)) == whole
    other = directory.members(search("other", 5, direction="maximize"))
    assert other[:4] == whole[:4]  # by chance, from the same seed


class Killed(BaseException):
    """What no code of ours answers to."""


def test_a_search_that_is_killed_at_any_write_ends_as_one_that_was_not(search, monkeypatch):
    """Before and after everything that it puts on the disk: no trial is lost, none is there twice, the order is the
    same."""
    from optuna.storages.journal import JournalFileBackend

    from ftdist import rundir

    keys = {"trials": 5, "random_trials": 2, "prune_from": 1}
    whole, count, last = search("whole", 99, **keys), 0, None
    expected = rank.results(whole)
    assert {row["state"] for row in expected} == {"finished", "pruned"}
    with monkeypatch.context() as patched:

        def counted(write):
            def wrapped(*values):
                nonlocal count
                count += 1
                if count == last:
                    raise Killed
                done = write(*values)
                count += 1
                if count == last:
                    raise Killed
                return done

            return wrapped

        for owner, name in ((rundir, "write_json"), (rundir, "write_yaml"), (JournalFileBackend, "append_logs"),
                            (stops, "request")):  # fmt: skip
            patched.setattr(owner, name, counted(getattr(owner, name)))
        search("counted", 99, **keys)
        for last in range(count - 7, 6, -7):  # the folder is there with the sixth
            count = 0
            with pytest.raises(Killed):
                search(f"killed{last}", 99, **keys)
            reached, count = count, -(10**6)
            assert reached == last
            sweep_dir = search(f"killed{last}", 0)
            rows = rank.results(search(f"killed{last}", 99))
            assert [(row["name"], row["state"], row["objective"]) for row in rows] == [
                (row["name"], row["state"], row["objective"]) for row in expected
            ], last
            assert directory.unfinished(sweep_dir) == []


def test_a_trial_that_failed_stays_open_and_is_tried_again(search, tmp_path):
    from ftdist.sweep.search import Search

    done = search("a", 2)
    source = Search(done)
    name = source.take()
    source.ended(name, directory.mark(done, name, state="failed", status=1, reason="no memory"))
    assert directory.unfinished(done) == [name]
    directory.reopen(done, [name])
    assert Search(done).take() == name
    source.ended(name, directory.mark(done, name, state="finished", reason=None))  # of which nothing was recorded
    assert "sweep.objective=eval_loss: not among what it recorded: nothing" in directory.state(done, name).reason


def test_a_combination_that_cannot_be_is_left_out(search, monkeypatch):
    from ftdist import job

    done, asked = search("a", 1), []

    def ready(config):
        asked.append(config)
        if len(asked) == 1:
            raise UserError("strategy.r=4: not with this strategy")

    monkeypatch.setattr(job, "ready", ready)
    search("a", 1)
    (refused,) = [row for row in rank.results(done) if row["state"] == "refused"]
    assert "strategy.r=4" in refused["reason"] and "strategy.r=4" in rank.table(rank.results(done), "eval_loss")
    assert directory.unfinished(done) == [] and len(directory.members(done)) == 3


def test_workers_share_the_trials(search, tmp_path):
    """Each trial has one owner; one whose owner is gone is taken over, one whose owner waits in the queue is not."""
    from ftdist.sweep.search import Search

    done = search("a", 0)
    one, other = (Search(done, owner=name, alive=lambda owner: owner[0] == "7") for name in ("7_0", "7_1"))
    first, second = one.take(), other.take()
    assert first != second and len(directory.members(done)) == 2
    assert Search(done, owner="7_0", alive=lambda _: True).take() == first  # requeued: its own first
    third = Search(done, owner="7_2", alive=lambda owner: owner in ("7_0", "7_1")).take()
    assert third not in (first, second)
    assert Search(done, owner="8_0", alive=lambda owner: owner == "7_1").take() == first


def test_a_search_is_refused_before_its_first_trial(model, chat, tmp_path, monkeypatch):
    from ftdist.sweep import start

    monkeypatch.chdir(tmp_path)
    base = [f"model.path={model}", f"data.path={chat}", "tracking=none", "sweep=search", "engine=single"]
    for words, parts in (
        (["sweep.space={train.learnin_rate: 'log 1e-5 1e-3'}"], ["train.learnin_rate", "train.learning_rate"]),
        (["sweep.space={train.learning_rate: 'log 1e-5 1e-3'}", "train.learning_rate=1"], ["leave one of the two"]),
        (["sweep.space={train.max_length: [64, 100000]}"], ["train.max_length=100000", "2048"]),
        (["sweep.space={seed: [1, 2]}", "sweep.objective=tuned.loss", "eval.samples=1"], ["sweep.pruner=median"]),
        (["sweep.space={seed: [1, 2]}", "-m", "train.max_steps=1,2"], ["-m makes a grid"]),
        (["sweep.space={seed: [1, 2]}", "run_dir=x"], ["sweep_dir=DIR"]),
        (["sweep.space={seed: [1, 2]}", "sweep.trials=0"], ["sweep.trials=0"]),
        (["sweep.space={seed: [1, 2]}", "sweep.parallel=200", "sweep.trials=300"], ["sweep.parallel=200"]),
    ):
        with pytest.raises(UserError) as caught:
            start.start(compose.several("train", [*base, *words]), [*base, *words])
        assert "\n" not in str(caught.value)
        for part in parts:
            assert part in str(caught.value), str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_the_state_of_a_member_is_that_of_its_run(tmp_path, monkeypatch):
    """The process of a member writes down how its run has ended."""
    from ftdist import cli
    from ftdist.sweep import member

    monkeypatch.setattr(cli, "private_and_stoppable", lambda: None)
    monkeypatch.setattr(sys, "argv", [])
    head = {"name": "s", "words": ["strategy=lora"], "sweep": SWEEP, "seed": 1, "directory": "."}
    directory.write(tmp_path, head, [Member("00", ["seed=1"])], [{}])
    for failure, state, status in (
        (None, "finished", 0),
        (UserError("a key"), "failed", 2),
        (Failed("stopped (SIGTERM)", 75), "stopped", 75),
        (Failed("rank 1: dead", 1), "failed", 1),
        (KeyboardInterrupt(), "stopped", 130),
        (ValueError("ours"), "failed", 1),
    ):

        def go(config, run_dir, failure=failure):
            assert sys.argv == ["ftdist", "train", "strategy=lora", "seed=1"]
            if failure is not None:
                raise failure

        monkeypatch.setattr(member, "go", go)
        assert member.main(tmp_path, "00") == status
        found = directory.state(tmp_path, "00")
        assert (found.state, found.status) == (state, status)


def test_another_sweep_in_the_folder_is_refused(tmp_path):
    from ftdist.sweep.start import _refuse_other

    asked = {"name": "s", "words": ["strategy=lora"], "sweep": SWEEP, "seed": 1, "directory": "."}
    directory.write(tmp_path, asked, [Member("00", ["seed=1"])], [{}])
    _refuse_other(tmp_path, {**asked, "sweep": SWEEP | {"parallel": 2}}, [["seed=1"]])
    for other, words in (({**asked, "words": []}, [["seed=1"]]), (asked, [["seed=2"]]),
                         ({**asked, "sweep": SWEEP | {"direction": "maximize"}}, [["seed=1"]])):  # fmt: skip
        with pytest.raises(UserError, match="holds another sweep"):
            _refuse_other(tmp_path, other, words)


def test_keys_of_a_sweep_need_a_sweep():
    with pytest.raises(UserError, match="add -m"):
        compose.compose("train", ["sweep.parallel=2"])
    with pytest.raises(UserError, match="one run is wanted here"):  # as under accelerate launch
        compose.compose("train", ["sweep=search", "sweep.space={seed: [1, 2]}"])
    with pytest.raises(UserError, match="sweep_dir=DIR"):
        compose.compose("train", ["-m", "seed=1,2", "run_dir=x"])
    with pytest.raises(UserError, match="no list"):
        compose.compose("train", ["-m", "sweep.parallel=1,2"])


def test_a_member_whose_job_died_without_a_word_has_failed(tmp_path, monkeypatch):
    """Those that still run, or have spoken, are left alone; a controller that is away for a moment ends nothing."""
    from ftdist import scheduler as slurm
    from ftdist.sweep import array

    names = ["0-dead", "1-running", "2-finished"]
    directory.write(tmp_path, {"words": [], "sweep": {}}, [Member(name, []) for name in names], [{}] * 3)
    for number, name in enumerate(names):
        directory.mark(tmp_path, name, owner=f"7_{number}")
    directory.ended(tmp_path, "2-finished", 0, None, 1.0)
    states = {"7_0": "DEADLINE", "7_1": "RUNNING", "7_2": "FAILED"}
    answers = iter([UserError("squeue does not answer"), {}])

    def jobs(ids):
        if len(ids) == 2:  # from mark_dead: what is not ended
            return {number: slurm.Job(number, states[number], "", None, "") for number in ids}
        raise AssertionError(ids)

    def active(sweep_dir):
        answer = next(answers)
        if isinstance(answer, UserError):
            raise answer
        return answer

    monkeypatch.setattr(slurm, "jobs", jobs)
    monkeypatch.setattr(array, "active", active)
    monkeypatch.setattr(array, "POLL", 0.0)
    assert array.wait(tmp_path, lambda name, state: None) is None
    found = [directory.state(tmp_path, name) for name in names]
    assert [one.state for one in found] == [directory.FAILED, directory.WAITING, directory.FINISHED]
    assert found[0].reason == "job 7_0: DEADLINE" and found[0].status == 1


def test_a_search_whose_trials_never_began_has_failed(tmp_path, monkeypatch, capsys):
    from ftdist.sweep import start

    directory.write(tmp_path, {}, [], [])
    monkeypatch.setattr(rank, "results", lambda sweep_dir: [])
    with pytest.raises(Failed, match="3 of 3 trials were never begun") as failure:
        start._conclude(tmp_path, {"name": "search", "trials": 3, "objective": "eval_loss"}, None)
    assert failure.value.status == 1
