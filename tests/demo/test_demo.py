"""The embedded model and data: deterministic, whole or absent, any text tokenises, right answers, a clean split."""

import hashlib
import json
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftdist import demo


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return demo.model(tmp_path_factory.mktemp("demo"), seed=0)


@pytest.fixture(scope="module")
def tokenizer(model_dir):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_dir)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = demo.dataset(tmp_path_factory.mktemp("demo"), seed=42)
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def question(row):
    return row["messages"][0]["content"]


def answer(row):
    return row["messages"][1]["content"]


# --- on disk


def test_making_either_needs_no_torch(tmp_path):
    code = (
        "import sys; from pathlib import Path; from ftdist import demo\n"
        f"demo.model(Path({str(tmp_path)!r}), 0); demo.dataset(Path({str(tmp_path)!r}), 0)\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_same_seed_same_bytes(model_dir, tmp_path):
    again, other = demo.model(tmp_path, seed=0), demo.model(tmp_path, seed=1)
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in again.iterdir()} == names
    for name in names:
        assert (again / name).read_bytes() == (model_dir / name).read_bytes()
    assert (other / "model.safetensors").read_bytes() != (again / "model.safetensors").read_bytes()
    assert (other / "tokenizer.json").read_bytes() == (again / "tokenizer.json").read_bytes()
    assert demo.rows(3) == demo.rows(3) != demo.rows(4)


def test_what_is_there_is_not_made_again(model_dir, monkeypatch):
    monkeypatch.setattr(demo, "_model_files", lambda seed: pytest.fail("made again"))
    assert demo.model(model_dir.parent, seed=0) == model_dir


def test_a_failed_writer_leaves_nothing(tmp_path, monkeypatch):
    written = []

    def full_disk(descriptor):
        written.append(descriptor)
        if len(written) == 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(demo.os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        demo.model(tmp_path, seed=0)
    assert list(tmp_path.iterdir()) == []


def test_a_concurrent_winner_is_accepted(tmp_path, monkeypatch):
    real = demo._model_files

    def beaten(seed):
        monkeypatch.setattr(demo, "_model_files", real)
        demo.model(tmp_path, seed)  # somebody else is first
        return {"config.json": b"the loser's"}

    monkeypatch.setattr(demo, "_model_files", beaten)
    path = demo.model(tmp_path, seed=0)
    assert list(tmp_path.iterdir()) == [path]
    assert json.loads((path / "config.json").read_text())["model_type"] == "llama"


# --- tokenizer


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=60))
def test_any_text_comes_back(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert max(ids, default=0) < len(tokenizer) <= 2048
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    "text",
    [
        "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n#### 72",
        "### Instruction:\n\tGive three tips — “healthy” ones.\r\n",
        "سلام، می\u200cخواهم ۱۲ کتاب بخرم؛ چند می‌شود؟",  # noqa: RUF001
        "한국어 日本語 🙂\u200d↔️ \x00\x7f",
    ],
)
def test_real_text_comes_back(tokenizer, text):
    assert tokenizer.unk_token is None
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_words_of_the_demo_are_single_tokens(tokenizer, rows):
    for row in rows[:300]:
        words = re.findall(r"\w+", answer(row))
        assert len(tokenizer(" " + answer(row))["input_ids"]) == len(words)


def test_exactly_the_answer_is_supervised(tokenizer, rows):
    for row in rows[:300]:
        full = tokenizer.apply_chat_template(row["messages"], return_dict=True, return_assistant_tokens_mask=True)
        prompt = tokenizer.apply_chat_template(row["messages"][:1], add_generation_prompt=True, return_dict=True)
        ids, mask, head = full["input_ids"], full["assistant_masks"], prompt["input_ids"]
        assert ids[: len(head)] == head
        assert mask == [0] * len(head) + [1] * (len(ids) - len(head))
        assert tokenizer.decode(ids[len(head) :]) == f" {answer(row)}{demo.EOS}"


# --- model


def test_transformers_loads_it_and_it_knows_nothing(model_dir, tokenizer, rows):
    import torch
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(model_dir, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config.architectures == ["LlamaForCausalLM"]
    tokenizer.padding_side = "left"
    batch = tokenizer.apply_chat_template(
        [row["messages"][:1] for row in rows[:200]],
        add_generation_prompt=True,
        padding=True,
        return_tensors="pt",
        return_dict=True,
    )
    out = model.generate(**batch, max_new_tokens=8)[:, batch["input_ids"].shape[1] :]
    answers = tokenizer.batch_decode(out, skip_special_tokens=True)
    assert sum(text.strip() == answer(row) for text, row in zip(answers, rows, strict=False)) <= 4


# --- data


def expected(row):
    """The right answer, worked out again from the question's text."""
    text = question(row)
    things = [word for word in re.findall("[A-Za-z]+", text) if word in demo.THINGS]
    skill = row["skill"]
    if skill == "first":
        return things[0]
    if skill == "last":
        return things[-1]
    if skill == "twice":
        return Counter(things).most_common(1)[0][0]
    if skill == "capitals":
        return things[-1].upper()
    if skill == "most":
        return max(re.findall(r"([A-Z][a-z]+) (\d)", text), key=lambda pair: int(pair[1]))[0]
    record = dict(re.findall(r"(name|city|colour|thing) ([A-Za-z]+)(?=[,:]|$)", text))
    if skill == "sentence":
        return f"{record['name']} has a {record['colour']} {record['thing']} in {record['city']}"
    assert skill == "extract"
    return record[re.search(r"(?:which|: the|give the) (\w+)", text).group(1)]


def test_every_answer_is_right(rows):
    assert len({row["skill"] for row in rows}) >= 5
    assert len({row["id"] for row in rows}) == len(rows)
    for row in rows:
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        assert answer(row) == expected(row), row


def letters(texts):
    return np.array([np.bincount(np.frombuffer(text.encode(), np.uint8), minlength=128) for text in texts])


def edit_similarity(text, others, counts, at_least):
    """The largest 1 - Levenshtein / longer length between a text and others (`counts`: their letters); 0 if below."""
    longer = np.maximum(counts.sum(1), len(text))
    bound = np.minimum(counts, letters([text])).sum(1) / longer  # an edit mends at most one character
    best = 0.0
    for k in np.flatnonzero(bound >= at_least):
        other = np.frombuffer(others[k].encode(), np.uint8)
        ramp = np.arange(len(other) + 1)
        row = ramp
        for i, character in enumerate(text.encode()):
            step = np.concatenate([[i + 1], np.minimum(row[1:] + 1, row[:-1] + (other != character))])
            row = np.minimum.accumulate(step - ramp) + ramp
        best = max(best, 1 - row[-1] / longer[k])
    return best


def shingles(text):
    words = text.split()
    return {tuple(words[i : i + 5]) for i in range(max(1, len(words) - 4))}


def jaccard(text, others):
    mine = shingles(text)
    return max(len(mine & theirs) / len(mine | theirs) for theirs in others)


def test_near_copies_are_seen():
    train = ["lamp key rope moon star: the first word?", "Reverse the list piano river"]
    assert edit_similarity("lamp key rope moon star: the last word?", train, letters(train), 0.5) == 1 - 3 / 40
    assert edit_similarity("kitten", ["sitting"], letters(["sitting"]), 0.1) == pytest.approx(1 - 3 / 7)
    assert jaccard("lamp key rope moon star: the first word?", [shingles(text) for text in train]) == 1


def test_no_held_out_row_has_a_near_copy_in_training(rows):
    held_out, train = [], []
    for row in rows:
        share = int(hashlib.sha256(json.dumps(row["messages"]).encode()).hexdigest()[:8], 16) / 2**32
        (held_out if share < 0.2 else train).append(question(row))
    assert 0.18 < len(held_out) / len(rows) < 0.22
    trained, counts = [shingles(text) for text in train], letters(train)
    for text in held_out[:80]:
        assert jaccard(text, trained) < 0.7, text
        assert edit_similarity(text, train, counts, 0.9) < 0.9, text
