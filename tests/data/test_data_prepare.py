"""From files to the prepared data set: what is planted is found, nothing is lost, the cache is exact."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from data_help import DEFAULTS, WORDS, pair, read_jsonl, read_report, sentence, write_jsonl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ftdist.errors import UserError


def accounted(report: dict[str, Any], dropped_near: bool = True) -> int:
    keys = ["rejected", "filtered", "duplicates_exact", "contaminated", "overlong_dropped", "train", "validation"]
    return sum(report[k] for k in keys + ["duplicates_near"] * dropped_near)


def texts(prepared: Path, tokenizer_path: Path, part: str = "train") -> list[str]:
    """The sequences of a prepared part, decoded."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_path / "tokenizer.json"))
    result = []
    for row in datasets.load_from_disk(str(prepared / part)):
        at = 0
        for length in row["lengths"]:
            result.append(tokenizer.decode(row["input_ids"][at : at + length], skip_special_tokens=False))
            at += length
    return result


def test_planted_faults_are_found_and_counted(tmp_path: Path, run_prepare: Any, tokenizer_path: Path) -> None:
    rows: list[Any] = [pair(i, 40) for i in range(200)]
    twenty = [dict(rows[i]) for i in range(20)]  # exact, but for white space
    for row in twenty:
        row["answer"] = row["answer"].replace(" ", "  ", 3)
    near = []
    for i in range(20, 50):  # one word of eighty is another
        words = rows[i]["answer"].split()
        words[-1] = "different"
        near.append({**rows[i], "answer": " ".join(words)})
    held_out = [pair(i, 40) for i in range(1000, 1030)]
    leaks = [  # thirteen words and more of a held-out answer inside other words
        {
            "question": sentence(5000 + i, 30),
            "answer": sentence(6000 + i, 30) + " " + " ".join(r["answer"].split()[:15]),
        }
        for i, r in enumerate(held_out[:10])
    ]
    lines = [json.dumps(r) for r in rows + twenty + near + leaks]
    broken = ["{cut", '{"question": null, "answer": "x"}', '{"question": "q", "answer": ""}', "[1, 2]"]
    (tmp_path / "train.jsonl").write_text("\n".join(lines + broken) + "\n")
    write_jsonl(tmp_path / "held.jsonl", held_out)
    prepared = run_prepare(tmp_path / "train.jsonl", validation=str(tmp_path / "held.jsonl"), max_rejects=0.05)
    report = read_report(prepared)
    assert report["rows_in"] == 264 + 30 and accounted(report) == 294
    assert report["rejected"] == 4
    assert report["rejects"] == {"not valid JSON": 1, "null value": 1, "empty text": 1, "not an object": 1}
    assert (report["duplicates_exact"], report["duplicates_near"], report["contaminated"]) == (20, 30, 10)
    assert (report["train"], report["validation"]) == (200, 30)
    rejects = read_jsonl(prepared / "rejects.jsonl")
    assert [(r["line"], r["row"]) for r in rejects][0] == (261, "{cut") and rejects[3]["row"] == [1, 2]
    dropped = read_jsonl(prepared / "dropped.jsonl")
    assert [d["line"] for d in dropped] == list(range(201, 261))
    assert dropped[0] == {
        "file": str(tmp_path / "train.jsonl"),
        "line": 201,
        "reason": "duplicate",
        "like": {"file": str(tmp_path / "train.jsonl"), "line": 1},
        "overlap": 1.0,
    }
    example = report["examples"]["contaminated"][0]
    assert example["like"]["where"].endswith("held.jsonl:1")
    assert len(read_jsonl(prepared / "validation_rows.jsonl")) == 30
    assert sorted(texts(prepared, tokenizer_path))[0].count("<|im_end|>") == 2


def test_rows_in_arrow_are_what_was_given(tmp_path: Path, run_prepare: Any, tokenizer_path: Path) -> None:
    rows = [pair(i) for i in range(60)]
    prepared = run_prepare(write_jsonl(tmp_path / "a.jsonl", rows))
    report = read_report(prepared)
    want = {
        f"<|im_start|>user\n{r['question']}<|im_end|>\n<|im_start|>assistant\n{r['answer']}<|im_end|>\n" for r in rows
    }
    train, validation = texts(prepared, tokenizer_path), texts(prepared, tokenizer_path, "validation")
    assert len(train) == report["train"] and len(validation) == report["validation"]
    assert set(train) | set(validation) == want and len(train) + len(validation) == 60
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_path / "tokenizer.json"))
    answers = {r["answer"] + "<|im_end|>" for r in rows}
    tokens = supervised = 0
    for row in datasets.load_from_disk(str(prepared / "train")):
        ids, labels = np.array(row["input_ids"]), np.array(row["labels"])
        assert len(ids) == len(labels) == sum(row["lengths"]) <= 128 and len(row["sources"]) == len(row["lengths"])
        assert ((labels == ids) | (labels == -100)).all()
        ends = np.cumsum(row["lengths"])
        for start, stop in zip([0, *ends[:-1]], ends, strict=True):
            assert labels[start] == -100
            trained = ids[start:stop][labels[start:stop] != -100]
            assert tokenizer.decode(trained.tolist(), skip_special_tokens=False) in answers
        tokens += len(ids)
        supervised += int((labels != -100).sum())
    assert (report["tokens"], report["supervised_tokens"]) == (tokens, supervised)
    assert report["fill"] == pytest.approx(tokens / (report["train_rows"] * 128), abs=1e-3)
    held = read_jsonl(prepared / "validation_rows.jsonl")
    for row in held:
        question, answer = (m["content"] for m in row["messages"])
        assert row["prompt"] == f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        assert row["reference"] == answer and row["id"].startswith("a.jsonl:")


def test_split_does_not_move_when_rows_are_added(tmp_path: Path, run_prepare: Any, tokenizer_path: Path) -> None:
    rows = [pair(i) for i in range(300)]
    off = {"near_duplicates": "off", "decontaminate": False}
    before = run_prepare(write_jsonl(tmp_path / "a.jsonl", rows), **off)
    after = run_prepare(write_jsonl(tmp_path / "b.jsonl", [pair(i) for i in range(900, 950)] + rows[::-1]), **off)
    other = run_prepare(tmp_path / "a.jsonl", seed=1, **off)
    held = {p: set(texts(p, tokenizer_path, "validation")) for p in (before, after, other)}
    assert held[before] < held[after] and held[before] != held[other]
    assert 40 <= len(held[before]) <= 80  # 60 expected, 6.9 standard deviation
    assert not held[after] & set(texts(before, tokenizer_path))


@pytest.mark.parametrize("seed", range(3))
def test_a_single_row_is_trained_on(tmp_path: Path, run_prepare: Any, seed: int) -> None:
    """Whatever the draw says: a validation set of everything is no help."""
    report = read_report(
        run_prepare(write_jsonl(tmp_path / "a.jsonl", [pair(1)] * 9), seed=seed, validation_share=0.99)
    )
    assert (report["train"], report["validation"], report["duplicates_exact"]) == (1, 0, 8)
    assert any("none is held out" in note for note in report["notes"])


def test_near_duplicates_that_stay_are_on_one_side(tmp_path: Path, run_prepare: Any, tokenizer_path: Path) -> None:
    rows = []
    for i in range(60):
        words = sentence(i, 60).split()
        rows += [{"question": f"{WORDS[i % 7]} {k}", "answer": " ".join(words[k:])} for k in range(3)]
    prepared = run_prepare(
        write_jsonl(tmp_path / "a.jsonl", rows),
        near_duplicates="keep",
        decontaminate=False,
        validation_share=0.5,
    )
    report = read_report(prepared)
    assert report["train"] + report["validation"] == 180 and report["duplicates_near"] > 0
    key = lambda t: t.split("<|im_start|>assistant\n")[1].split()[10:30]  # noqa: E731  the words that all three share
    held = [" ".join(key(t)[5:15]) for t in texts(prepared, tokenizer_path, "validation")]
    train = " # ".join(texts(prepared, tokenizer_path))
    assert held and not any(h in train for h in held)


def test_explicit_validation_wins_and_is_left_whole(tmp_path: Path, run_prepare: Any) -> None:
    rows = [pair(i) for i in range(40)]
    write_jsonl(tmp_path / "v.jsonl", [*rows[:5], rows[0]])
    prepared = run_prepare(write_jsonl(tmp_path / "a.jsonl", rows), validation=str(tmp_path / "v.jsonl"))
    report = read_report(prepared)
    assert (report["validation"], report["train"], report["duplicates_exact"]) == (6, 35, 5)


def test_rows_of_a_test_file_are_taken_out(tmp_path: Path, run_prepare: Any) -> None:
    rows = [pair(i, 30) for i in range(60)]
    write_jsonl(tmp_path / "t.jsonl", rows[:7])
    report = read_report(run_prepare(write_jsonl(tmp_path / "a.jsonl", rows), against=str(tmp_path / "t.jsonl")))
    assert report["contaminated"] == 7 and report["rows_in"] == 60 and report["train"] + report["validation"] == 53


def test_boilerplate_contaminates_nothing(tmp_path: Path, run_prepare: Any) -> None:
    task = "please read the following words with great care and then give the right answer to it now"
    rows = [{"question": f"{task} {sentence(i, 12)}", "answer": sentence(i + 500, 12)} for i in range(60)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    assert read_report(run_prepare(path))["contaminated"] == 0
    with pytest.raises(UserError, match="shares text with the validation rows"):
        run_prepare(path, boilerplate_rows=100)


def test_sources_are_mixed_with_weights(tmp_path: Path, run_prepare: Any, tokenizer_path: Path) -> None:
    a = write_jsonl(tmp_path / "a.jsonl", [pair(i) for i in range(100)])
    b = write_jsonl(tmp_path / "b.jsonl", [{"ask": sentence(i, 9), "reply": "yes"} for i in range(3000, 3100)])
    parts = [
        {"path": str(a), "weight": 0.5, "name": "first"},
        {"path": str(b), "weight": 2, "columns": {"question": "ask", "answer": "reply"}},
    ]
    prepared = run_prepare(parts, stratify=True)
    report = read_report(prepared)
    assert [(s["train"], s["validation"]) for s in report["sources"]] == [(80, 20), (80, 20)]
    sources = [s for row in datasets.load_from_disk(str(prepared / "train")) for s in row["sources"]]
    assert 25 <= sources.count(0) <= 55 and sources.count(1) == 160
    held = read_jsonl(prepared / "validation_rows.jsonl")
    assert {row["source"] for row in held} == {"first", str(b)}


def test_overlong_rows(tmp_path: Path, run_prepare: Any) -> None:
    rows = [pair(i, 10) for i in range(30)] + [{"question": "x", "answer": sentence(i, 150)} for i in range(3)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    base = {"max_length": 64, "validation_share": 0.0}
    cut = read_report(run_prepare(path, **base))
    assert cut["overlong"] == {"truncated": 3, "cut_answers": 3} and cut["train"] == 33
    dropped = read_report(run_prepare(path, overlong="drop", **base))
    assert dropped["overlong_dropped"] == 3 and dropped["train"] == 30 and accounted(dropped) == 33
    split = run_prepare(path, overlong="split", **base)
    report = read_report(split)
    assert report["overlong"]["split"] == 3 and report["train"] == 33 and report["train_sequences"] > 36
    assert report["tokens"] > cut["tokens"] > dropped["tokens"]
    assert max(datasets.load_from_disk(str(split / "train"))["lengths"][0]) <= 64


def test_filters_count_what_they_drop(tmp_path: Path, run_prepare: Any) -> None:
    rows = [pair(i, 12) for i in range(20)]
    rows += [{"question": "a b c", "answer": "ok"}, {"question": "again", "answer": "spam and eggs now " * 40}]
    tags = "".join(f"<h{i}><{word}>" for i, word in enumerate(WORDS))
    rows += [{"question": "page", "answer": tags + "x"}, {"question": "вопрос", "answer": "ответ на вопрос"}]
    changes = {"min_answer": 5, "max_answer": 2000, "max_repetition": 0.5, "max_markup": 0.5, "scripts": ["Latin"]}
    report = read_report(run_prepare(write_jsonl(tmp_path / "a.jsonl", rows), **changes))
    want = {"too_short": 1, "too_long": 0, "repetition": 1, "markup": 1, "script": 1}
    assert report["filters"] == want and report["filtered"] == 4 and report["train"] + report["validation"] == 20


def test_preference_rows(tmp_path: Path, run_prepare: Any) -> None:
    rows = [
        {"prompt": sentence(i, 9), "chosen": sentence(i + 100, 12), "rejected": sentence(i + 200, 6)} for i in range(40)
    ]
    rows += [rows[0], {"prompt": "q", "chosen": "same", "rejected": "same"}]
    rows += [{"prompt": sentence(900, 90), "chosen": sentence(901, 40), "rejected": sentence(902, 5)}]
    prepared = run_prepare(write_jsonl(tmp_path / "a.jsonl", rows), task="dpo", max_rejects=0.1, max_length=96)
    report = read_report(prepared)
    assert report["rejects"] == {"identical chosen and rejected": 1} and report["duplicates_exact"] == 1
    assert report["train"] + report["validation"] == 41 and accounted(report) == 43
    assert report["preference"]["chosen_longer_share"] > 0.9
    train = datasets.load_from_disk(str(prepared / "train"))
    assert train.column_names == ["prompt_ids", "chosen_ids", "rejected_ids"] and len(train) == report["train"]
    for row in train:
        assert len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) <= 96
        assert row["chosen_ids"][-1] == row["rejected_ids"][-1]  # the end of the turn, or both are cut


def test_the_verb_prepares_preferences_and_supervised_training_takes_none(tmp_path: Path, run: Any) -> None:
    rows = [{"prompt": sentence(i, 9), "chosen": sentence(i + 100, 12), "rejected": "no"} for i in range(30)]
    file = write_jsonl(tmp_path / "a.jsonl", [*rows, rows[0]])
    words = (f"data.path={file}", "data.format=preference", "tracking=none")
    answer = run("data", *words)
    assert answer.status == 0, answer
    report = read_report(Path(answer.stdout.splitlines()[-1].removeprefix("data: ")))
    assert report["duplicates_exact"] == 1 and report["preference"]["chosen_longer_share"] == 1
    assert report["train"] + report["validation"] == 30
    for verb in ("plan", "train"):
        run(verb, *words).refused("data.format=preference", "task=dpo")


# --- mistakes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows, changes, said",
    [
        ([], {}, "data set is empty"),
        ([{"ask": "q", "reply": "a"}], {}, "found: ask, reply; expected: messages"),
        ([{"question": "q", "answer": "a"}] * 3, {"format": "messages"}, "expected: messages"),
        ([{"prompt": "q", "chosen": "a", "rejected": "b"}], {}, "see data.format=preference"),
        ([{"question": "q", "answer": "a"}], {"task": "dpo"}, "need chosen and rejected"),
        ([{"text": "x"}], {"mask": "assistant"}, "no supervised token"),
        ([{"question": "long " * 90, "answer": "a"}], {}, "the answer begins after 128 tokens"),
        ([{"question": "q", "answer": "a"}], {"columns": {"frage": "x"}}, "data.columns.frage"),
        ([{"question": "q", "answer": "a"}], {"scripts": ["Klingon"]}, "data.scripts=Klingon"),
        ([{"question": "q", "answer": "a"}], {"min_answer": 9}, "no training row is left"),
        ([{"question": "q", "answer": "a"}], {"chat_template": "nope"}, "data.chat_template=nope"),
        ([{"question": "q", "answer": "a"}], {"tokenizer_path": "/nowhere"}, "no tokenizer"),
        ([{"question": "q", "answer": "a"}], {"validation": "/nowhere.jsonl"}, "data.validation=/nowhere.jsonl"),
        ([{"question": "q", "answer": "a"}], {"validation": []}, "data.validation=[]"),
        ([{"question": "q", "answer": "a"}], {"validation": " "}, "data.validation=' '"),
        ([{"question": "q", "answer": "a"}], {"columns": {"answer": "rply"}}, "data.columns.answer=rply: no row has"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, run_prepare: Any, rows: Any, changes: Any, said: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(UserError) as caught:
        run_prepare(path, **changes)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    left = [p.name for p in (tmp_path / "cache").glob("*") if p.name != "file_hashes.json"]
    assert all(name.startswith("rejects-") for name in left)


def test_a_held_out_file_without_rows_is_no_validation(tmp_path: Path, run_prepare: Any) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [pair(i) for i in range(5)])
    nothing = write_jsonl(tmp_path / "nothing.jsonl", [])
    with pytest.raises(UserError, match=f"data.validation={nothing}: holds no row"):
        run_prepare(path, validation=str(nothing))


def test_unreadable_file_is_one_line(tmp_path: Path, run_prepare: Any) -> None:
    with pytest.raises(UserError, match="no such file"):
        run_prepare(tmp_path / "missing.jsonl")
    with pytest.raises(UserError, match="data.path='': names no data"):  # and not everything in this folder
        run_prepare("")


# --- any input ---------------------------------------------------------------------------------------------------

_text = st.text(max_size=40)
_row = st.one_of(
    st.fixed_dictionaries({"question": _text, "answer": _text | st.none() | st.integers()}),
    st.fixed_dictionaries({"text": _text}),
    st.fixed_dictionaries(
        {
            "messages": st.lists(
                st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": _text}),
                max_size=4,
            )
        }
    ),
    st.lists(st.integers(), max_size=2),
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(_row, min_size=1, max_size=12), share=st.sampled_from([0.0, 0.2, 0.9]), packing=st.booleans())
def test_no_row_is_lost_or_invented(tmp_path: Path, run_prepare: Any, rows: Any, share: float, packing: bool) -> None:
    path = write_jsonl(tmp_path / "any.jsonl", [])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    try:
        prepared = run_prepare(path, validation_share=share, max_rejects=1.0, packing=packing)
    except UserError as error:
        assert "\n" not in str(error) and ("is left" in str(error) or "no supervised token" in str(error))
        return
    report = read_report(prepared)
    assert report["rows_in"] == len(rows) == accounted(report)
    assert report["rejected"] == len(read_jsonl(prepared / "rejects.jsonl")) == sum(report["rejects"].values())
    assert report["validation"] == len(read_jsonl(prepared / "validation_rows.jsonl"))
    train = datasets.load_from_disk(str(prepared / "train"))
    assert sum(len(n) for n in train["lengths"]) == report["train"] and len(train) == report["train_rows"]
    datasets.load_from_disk(str(prepared / "validation"))


# --- the cache ---------------------------------------------------------------------------------------------------


def test_same_content_is_prepared_once(tmp_path: Path, run_prepare: Any) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [pair(i) for i in range(20)])
    first = run_prepare(path)
    stamp = (first / "data_report.json").stat().st_mtime_ns
    moved = path.rename(tmp_path / "sub.jsonl")
    again = run_prepare(moved.rename(path), workers=3)
    assert again == first and (first / "data_report.json").stat().st_mtime_ns == stamp
    changed = [run_prepare(path, **c) for c in ({"mask": "all"}, {"max_length": 64}, {"packing": False}, {"seed": 1})]
    path.write_text(path.read_text().replace("alpha", "omega", 1))
    changed.append(run_prepare(path))
    assert len({first, *changed}) == 6


def test_cached_call_imports_nothing_heavy(tmp_path: Path, run_prepare: Any, tokenizer_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [pair(i) for i in range(20)])
    first = run_prepare(path)
    call = {**DEFAULTS, "path": str(path), "tokenizer_path": str(tokenizer_path), "revision": None, "seed": 42}
    call |= {"trust_remote_code": False, "max_length": 128, "packing": True, "task": "sft"}
    code = (
        "import sys, json, pathlib; from ftdist.data.prepare import prepare; call = json.loads(sys.argv[1]);"
        "print(prepare(**call, cache_dir=pathlib.Path(sys.argv[2])));"
        "print([m for m in ('torch', 'transformers', 'datasets', 'datasketch', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(call), str(tmp_path / "cache")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == [str(first), "[]"]


def test_processes_change_nothing(tmp_path: Path, run_prepare: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from ftdist.data import prepare as module
    from ftdist.data import reading

    rows = [pair(i) for i in range(150)] + [pair(3), {"bad": 1}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    alone = run_prepare(path, cache_dir=tmp_path / "alone", max_rejects=0.5)
    monkeypatch.setattr(module, "_SMALL", 0)
    monkeypatch.setattr(reading, "BLOCK_BYTES", 4096)
    together = run_prepare(path, cache_dir=tmp_path / "together", max_rejects=0.5, workers=2)
    assert alone.name == together.name
    for file in sorted(p.relative_to(alone) for p in alone.rglob("*") if p.is_file()):
        assert (alone / file).read_bytes() == (together / file).read_bytes(), file


def _prepare_in_process(arguments: dict[str, Any]) -> str:
    from ftdist.data.prepare import prepare

    return str(prepare(**arguments))


def _arguments(tmp_path: Path, tokenizer_path: Path, path: Path) -> dict[str, Any]:
    return {
        **DEFAULTS,
        "path": str(path),
        "tokenizer_path": str(tokenizer_path),
        "revision": None,
        "trust_remote_code": False,
        "max_length": 128,
        "packing": True,
        "task": "sft",
        "seed": 42,
        "cache_dir": tmp_path / "cache",
    }


def test_two_at_once_give_one_whole_result(tmp_path: Path, tokenizer_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [pair(i) for i in range(100)])
    with multiprocessing.get_context("fork").Pool(2) as pool:
        results = pool.map(_prepare_in_process, [_arguments(tmp_path, tokenizer_path, path)] * 2)
    assert results[0] == results[1] and read_report(Path(results[0]))["rows_in"] == 100
    assert not list((tmp_path / "cache").glob(".making*"))


def test_a_killed_preparation_leaves_nothing_that_counts(tmp_path: Path, tokenizer_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [pair(i) for i in range(3000)])
    arguments = _arguments(tmp_path, tokenizer_path, path)
    process = multiprocessing.get_context("fork").Process(target=_prepare_in_process, args=(arguments,))
    process.start()
    deadline = time.monotonic() + 60
    while not list((tmp_path / "cache").glob(".making*/rejects.jsonl")) and time.monotonic() < deadline:
        os.sched_yield()
    assert process.pid
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    left = list((tmp_path / "cache").glob(".making*"))
    assert len(left) == 1 and not list((tmp_path / "cache").glob("*/data_report.json"))
    prepared = Path(_prepare_in_process(arguments))
    assert read_report(prepared)["rows_in"] == 3000 and not left[0].exists()


def test_demo_data_set(run_prepare: Any) -> None:
    report = read_report(run_prepare("demo"))
    assert report["rejected"] == 0 and report["train"] > 1000


def test_shown_rows(tmp_path: Path, run_prepare: Any, tokenizer_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from ftdist.data.show import report, show

    rows = [{"question": "alpha?", "answer": "bravo charlie"}, {"question": "delta", "answer": "echo"}]
    prepared = run_prepare(write_jsonl(tmp_path / "a.jsonl", rows), validation_share=0.0, packing=False)
    show(prepared, str(tokenizer_path), 1)
    plain = capsys.readouterr().out
    assert "<|im_start|>user↵" in plain and "[<|im_end|>]" in plain and "[ charlie]" in plain and "\x1b" not in plain
    show(prepared, str(tokenizer_path), 5, colour=True)
    assert capsys.readouterr().out.count("\x1b[30;42m") >= 4
    assert "rows in" in report(prepared) and "the tokenizer's own" in report(prepared)
