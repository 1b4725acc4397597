"""Rows in any format become our form or a reject; files of any kind are read line by line."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftdist.data.formats import PAIRS, Reject, clean, convert, detect, ignored
from ftdist.data.reading import BadRow, blocks, parse
from ftdist.data.sources import Source, find
from ftdist.errors import UserError

U, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
S, T = {"role": "system", "content": "s"}, {"role": "tool", "content": "t"}
HUMAN, GPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}


def of(raw: Any, format: str = "auto", columns: dict[str, str] | None = None) -> dict[str, Any]:
    return convert(raw, format=format, columns=columns or {})


@pytest.mark.parametrize(
    "raw, messages",
    [
        ({"messages": [U, A]}, [U, A]),
        ({"messages": [S, U, A, U, A]}, [S, U, A, U, A]),
        ({"messages": [{"role": "human", "content": "q"}, {"role": "model", "content": "a"}]}, [U, A]),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, A]}, [U, A]),
        ({"messages": json.dumps([U, A])}, [U, A]),
        ({"conversations": [HUMAN, GPT]}, [U, A]),
        ({"conversations": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}]}, [U, A]),
        ({"conversations": [HUMAN, GPT], "system": "s"}, [S, U, A]),
        ({"conversations": [{"from": "system", "value": "s"}, HUMAN, GPT]}, [S, U, A]),
        ({"conversations": [U, A]}, [U, A]),
        ({"instruction": "q", "input": "", "output": "a"}, [U, A]),
        ({"instruction": "q", "input": "x", "output": "a"}, [{"role": "user", "content": "q\nx"}, A]),
        ({"instruction": "", "input": "q", "output": "a"}, [U, A]),
        ({"instruction": "q", "context": "x", "response": "a"}, [{"role": "user", "content": "q\nx"}, A]),
        ({"instruction": "q", "output": "a", "history": [["q", "a"]], "system": "s"}, [S, U, A, U, A]),
        ({"prompt": "q", "completion": "a"}, [U, A]),
        ({"prompt": [U], "completion": [A]}, [U, A]),
        ({"prompt": "q", "response": "a"}, [U, A]),
        ({"question": "q", "answer": "a"}, [U, A]),
        ({"question": "q", "answer": 42}, [U, {"role": "assistant", "content": "42"}]),
        ({"question": "q", "answer": True}, [U, {"role": "assistant", "content": "true"}]),
    ],
)
def test_formats(raw: dict[str, Any], messages: list[dict[str, Any]]) -> None:
    row = of(raw)
    assert row["messages"] == messages and row["start"] == len(messages) - 1


def test_tool_turns_of_sharegpt() -> None:
    call = {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'}
    row = of({"conversations": [HUMAN, call, {"from": "observation", "value": "t"}, GPT], "tools": '[{"name": "f"}]'})
    called = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    assert row["messages"] == [U, {"role": "assistant", "content": "", "tool_calls": [called]}, T, A]
    assert row["tools"] == [{"name": "f"}] and row["start"] == 1


CHOSEN, REJECTED = {"role": "assistant", "content": "good"}, {"role": "assistant", "content": "bad"}


@pytest.mark.parametrize(
    "raw",
    [
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
        {"prompt": [U], "chosen": [CHOSEN], "rejected": [REJECTED]},
        {"chosen": [U, CHOSEN], "rejected": [U, REJECTED]},
        {"prompt": "q", "chosen": [U, CHOSEN], "rejected": [U, REJECTED]},
        {
            "conversations": [HUMAN],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
        {"question": "q", "chosen": "good", "rejected": "bad"},
        {"instruction": "q", "input": "", "chosen": "good", "rejected": "bad"},
    ],
)
def test_preferences(raw: dict[str, Any]) -> None:
    row = of(raw)
    assert (row["prompt"], row["chosen"], row["rejected"]) == ([U], [CHOSEN], [REJECTED])


@pytest.mark.parametrize(
    "raw, reason",
    [
        (3, "not an object"),
        ({"ask": "q", "reply": "a"}, "missing columns"),
        ({"question": None, "answer": "a"}, "null value"),
        ({"question": "q", "answer": float("nan")}, "null value"),
        ({"question": "q", "answer": " \n"}, "empty text"),
        ({"question": {"x": 1}, "answer": "a"}, "wrong type"),
        ({"question": "q", "answer": "\ud800"}, "wrong encoding"),
        ({"messages": []}, "empty text"),
        ({"messages": "hello"}, "wrong type"),
        ({"messages": [A, U]}, "roles out of order"),
        ({"messages": [U, U, A]}, "roles out of order"),
        ({"messages": [U, S, A]}, "roles out of order"),
        ({"messages": [T, A]}, "roles out of order"),
        ({"messages": [U, A, U]}, "no answer at the end"),
        ({"messages": [{"role": "robot", "content": "x"}, A]}, "unknown role"),
        ({"messages": [{"content": "x"}, A]}, "unknown role"),
        ({"messages": [U, {"role": "assistant", "content": None}]}, "null value"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, A]}, "wrong type"),
        ({"instruction": "", "input": "", "output": "a"}, "empty prompt"),
        ({"instruction": "q", "output": "a", "history": "x"}, "wrong type"),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "identical chosen and rejected"),
        ({"chosen": [U, A], "rejected": [U, A]}, "identical chosen and rejected"),
        ({"chosen": "good", "rejected": "bad"}, "empty prompt"),
    ],
)
def test_rejects(raw: Any, reason: str) -> None:
    with pytest.raises(Reject) as caught:
        of(raw)
    assert caught.value.reason == reason


def test_missing_columns_tells_found_and_expected() -> None:
    with pytest.raises(Reject) as caught:
        of({"ask": "q", "reply": "a"})
    assert "found: ask, reply" in caught.value.detail and "question + answer" in caught.value.detail


def test_columns_by_name_and_what_is_not_read() -> None:
    raw = {"ask": "q", "reply": "a", "topic": "x"}
    columns = {"question": "ask", "answer": "reply"}
    assert of(raw, columns=columns)["messages"] == [U, A]
    assert ignored({"question": "q", "answer": "a", "context": "c"}, format="auto", columns={}) == ["context"]


def test_cleaning_keeps_scripts_and_code() -> None:
    persian, flag = "می\u200cخواهم \u200fبروم\u200e", "👩\u200d👩\u200d👧 🏳️\u200d🌈"
    code = "def f(x):\n\treturn x  # ﬁne²"
    for text in (persian, flag, code, "漢字かなカナ", "שלום", "豈\uf900"):
        assert clean(text) == text
    assert clean("e\u0301\r\nx\r\x00\x07\ufeff") == "\u00e9\nx\n"


# --- any input ---------------------------------------------------------------------------------------------------

KEYS = ["messages", "conversations", "role", "from", "content", "value", "prompt", "chosen", "rejected", "text", "type"]
KEYS += ["question", "answer", "instruction", "input", "output", "history", "system", "tools", "id", "tool_calls", "x"]
_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)
_role = st.sampled_from(
    ["system", "user", "assistant", "tool", "human", "gpt", "function_call", "robot", "observation"]
)
_message = st.fixed_dictionaries({"role": _role, "content": st.text(max_size=8) | st.none()})


@settings(max_examples=300, deadline=None)
@given(_json | st.fixed_dictionaries({"messages": st.lists(_message, max_size=5)}))
def test_any_row_is_converted_or_rejected(raw: Any) -> None:
    try:
        row = of(raw)
    except Reject as reject:
        assert reject.reason
        return
    if "text" in row:
        assert row["text"].strip()
        return
    for key in ("chosen", "rejected") if "chosen" in row else ("messages",):
        messages = (row["prompt"] if key != "messages" else []) + row[key]
        assert messages[-1]["role"] == "assistant" and {m["role"] for m in messages} <= {
            "system",
            "user",
            "assistant",
            "tool",
        }
        for m in messages:
            m["content"].encode()
            assert clean(m["content"]) == m["content"] and "\0" not in m["content"]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.text(min_size=1), st.text(min_size=1)), min_size=1, max_size=4))
def test_pairs_keep_their_text(turns: list[tuple[str, str]]) -> None:
    messages = [{"role": r, "content": c} for pair in turns for r, c in zip(("user", "assistant"), pair, strict=True)]
    try:
        row = of({"messages": messages})
    except Reject as reject:
        assert reject.reason in ("empty text", "wrong encoding")
        return
    assert [m["content"] for m in row["messages"]] == [clean(m["content"]) for m in messages]
    assert row == of({"messages": row["messages"]})  # converting again changes nothing


# --- files -------------------------------------------------------------------------------------------------------

ROWS = [{"question": f"q {i} é漢", "answer": f"a\n{i}"} for i in range(30)]


def read(path: Path) -> list[tuple[int, Any]]:
    source = Source("x", "train", (path,), 1.0, "auto", {})
    return [pair for block in blocks([source]) for pair in parse(block)]


def jsonl(rows: list[Any]) -> bytes:
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows).encode()


def test_same_rows_from_every_kind_of_file(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq
    import zstandard

    made = {
        "a.jsonl": jsonl(ROWS),
        "a.ndjson": jsonl(ROWS).rstrip(),
        "b.json": json.dumps(ROWS, indent=1).encode(),
        "c.json": jsonl(ROWS),
        "d.json": json.dumps({"version": 1, "data": ROWS}).encode(),
        "e.jsonl.gz": gzip.compress(jsonl(ROWS)),
        "f.jsonl.zst": zstandard.compress(jsonl(ROWS)),
        "g.jsonl": b"\xef\xbb\xbf" + jsonl(ROWS),
        "h.jsonl": jsonl(ROWS).decode().encode("utf-16"),
        "i.jsonl": jsonl(ROWS).decode().encode("utf-32"),
        "j.jsonl": jsonl(ROWS).replace(b"\n", b"\r\n"),
    }
    for name, data in made.items():
        (tmp_path / name).write_bytes(data)
    for name, delimiter in (("k.csv", ","), ("l.csv", ";"), ("m.tsv", "\t")):
        with (tmp_path / name).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["question", "answer"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(ROWS)
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "n.parquet")
    for path in sorted(tmp_path.iterdir()):
        assert [row for _, row in read(path)] == ROWS, path.name
    assert [line for line, _ in read(tmp_path / "a.jsonl")] == list(range(1, 31))
    assert [line for line, _ in read(tmp_path / "b.json")] == [2 + 4 * i for i in range(30)]


def test_broken_lines_are_found_and_the_rest_is_read(tmp_path: Path) -> None:
    lines = [json.dumps(r).encode() for r in ROWS]
    lines[3] = lines[3][:-5]
    lines[7] = b'{"question": "caf\xe9", "answer": "latin-1"}'
    lines[29] = lines[29][:10]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    found = read(tmp_path / "a.jsonl")
    bad = {line: row.reason for line, row in found if isinstance(row, BadRow)}
    assert bad == {4: "not valid JSON", 8: "wrong encoding", 30: "not valid JSON"} and len(found) == 30


def test_broken_element_of_an_array(tmp_path: Path) -> None:
    text = json.dumps(ROWS, indent=1)
    text = text.replace('"question": "q 5 ', '"question": q 5 ').replace('"answer": "a\\n9"', '"answer": "a\\n9')
    (tmp_path / "a.json").write_text(text[:-3])  # … and the last one is cut
    found = read(tmp_path / "a.json")
    good = [row for _, row in found if not isinstance(row, BadRow)]
    assert 26 <= len(good) <= 27 and all(row in ROWS for row in good)
    assert 2 <= sum(isinstance(row, BadRow) for _, row in found) <= 4


def test_long_lines_and_arrays_that_pass_block_borders(tmp_path: Path) -> None:
    rows = [{"question": "q", "answer": "x" * size} for size in (10, 10_000_000, 3, 5_000_000, 4)]
    (tmp_path / "a.jsonl").write_bytes(jsonl(rows))
    (tmp_path / "b.json").write_text(json.dumps(rows, indent=1))
    assert [row for _, row in read(tmp_path / "a.jsonl")] == rows
    assert [row for _, row in read(tmp_path / "b.json")] == rows


def test_csv_with_other_cells_than_columns(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'question,answer\nq,"a, b"\nonly\nq,\ncaf\xe9,x\n')
    found = read(tmp_path / "a.csv")
    assert found[0][1] == {"question": "q", "answer": "a, b"}
    assert isinstance(found[1][1], BadRow) and found[2][1]["answer"] is None
    with pytest.raises(Reject, match="wrong encoding"):
        of(found[3][1])


def test_text_files_are_paragraphs(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n\n\n  three\n")
    assert read(tmp_path / "a.txt") == [(1, {"text": "one\ntwo"}), (5, {"text": "  three"})]


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=200), name=st.sampled_from(["a.jsonl", "a.json", "a.csv", "a.tsv", "a.txt"]))
def test_any_bytes_are_rows_or_bad_rows(tmp_path_factory: pytest.TempPathFactory, data: bytes, name: str) -> None:
    path = tmp_path_factory.mktemp("any") / name
    path.write_bytes(data)
    try:
        found = read(path)
    except UserError as error:
        assert "\n" not in str(error)
        return
    if name == "a.jsonl" and data[:2] not in (b"\xff\xfe", b"\xfe\xff") and data[:4] != b"\x00\x00\xfe\xff":
        text = data.removeprefix(b"\xef\xbb\xbf")
        assert len(found) == sum(bool(line) and not line.isspace() for line in text.split(b"\n"))


def test_folder_leaves_tests_aside_and_holds_out_validation(tmp_path: Path) -> None:
    for name in ("train-0.jsonl", "train-1.jsonl", "validation.jsonl", "test.jsonl", "README.md", ".hidden.jsonl"):
        (tmp_path / name).write_bytes(jsonl(ROWS))
    files, held_out, tests = find(str(tmp_path), key="data.path")
    assert [f.name for f in files] == ["train-0.jsonl", "train-1.jsonl"]
    assert [f.name for f in held_out] == ["validation.jsonl"] and [f.name for f in tests] == ["test.jsonl"]
    assert [f.name for f in find(str(tmp_path / "*-?.jsonl"), key="data.path")[0]] == ["train-0.jsonl", "train-1.jsonl"]


@pytest.mark.parametrize("named", ["missing.jsonl", "*.jsonl", "a.docx", "empty"])
def test_what_is_not_there_is_one_line(tmp_path: Path, named: str) -> None:
    (tmp_path / "a.docx").write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as caught:
        find(str(tmp_path / named), key="data.path")
    assert str(caught.value).startswith("data.path=") and "\n" not in str(caught.value)


def test_cut_archives_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(jsonl(ROWS))[:-20])
    (tmp_path / "b.jsonl.gz").write_bytes(bz2.compress(jsonl(ROWS)))
    (tmp_path / "c.jsonl.zst").write_bytes(b"nothing")
    (tmp_path / "d.parquet").write_bytes(b"nothing")
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(UserError, match=path.name):
            read(path)


def test_detect_prefers_the_richer_format() -> None:
    assert detect({"text": "x", "messages": [U, A]}) == "messages"
    assert detect({"prompt": "q", "chosen": "a", "rejected": "b", "messages": []}) == "preference"
    assert all(detect({q: "q", a: "a"}) == "question_answer" for q, a in PAIRS)
