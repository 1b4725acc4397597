"""Rows → token ids with a mask of what is trained on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ftdist.data.formats import Reject
from ftdist.data.template import Span, Template, Unsegmentable, choose
from ftdist.errors import UserError


def freeze_tokenizer(
    path: str,
    *,
    revision: str | None,
    trust_remote_code: bool,
    chat_template: str,
    keywords: dict[str, Any],
    to: Path,
) -> dict[str, Any]:
    """Loads the tokenizer once, with transformers, and writes what the processes need into folder `to`:
    the fast tokenizer (`tokenizer.json`) and `template.json`. Returns the latter. UserError when it can't
    be used."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        message = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"model.path={path}: no tokenizer can be loaded from it ({message})") from None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(f"model.path={path}: only a slow tokenizer; ftdist needs a fast one (tokenizer.json)")
    if tokenizer.eos_token_id is None:
        raise UserError(f"model.path={path}: the tokenizer has no eos_token; set one in its tokenizer_config.json")
    backend.no_truncation()
    backend.no_padding()
    bare = backend.encode("text", add_special_tokens=False).ids
    full = backend.encode("text").ids
    adds_bos = len(full) > len(bare) and full[0] == tokenizer.bos_token_id
    text, origin = choose(chat_template, tokenizer_template=tokenizer.chat_template, adds_bos=adds_bos)
    specials = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    frozen = {
        "template": text,
        "origin": origin,
        "tokens": {k: v for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)},
        "specials": sorted({*specials, *(str(t) for t in tokenizer.all_special_tokens)}),
        "keywords": keywords,
        "eos": int(tokenizer.eos_token_id),
        "bos": tokenizer.bos_token_id if adds_bos else None,
        "vocabulary": len(tokenizer),
    }
    to.mkdir(parents=True, exist_ok=True)
    (to / "tokenizer.json").write_text(backend.to_str(), encoding="utf-8")
    (to / "template.json").write_text(json.dumps(frozen), encoding="utf-8")
    return frozen


@dataclass(frozen=True)
class Frozen:
    """A tokenizer and a template as a process holds them."""

    tokenizer: Any
    template: Template
    eos: int
    bos: int | None


@lru_cache(maxsize=2)
def load_frozen(folder: Path) -> Frozen:
    """What freeze_tokenizer wrote."""
    from tokenizers import Tokenizer

    frozen = json.loads((folder / "template.json").read_text(encoding="utf-8"))
    template = Template(
        frozen["template"], tokens=frozen["tokens"], specials=frozen["specials"], keywords=frozen["keywords"]
    )
    return Frozen(Tokenizer.from_file(str(folder / "tokenizer.json")), template, frozen["eos"], frozen["bos"])


@dataclass(frozen=True)
class Laid:
    """A row as text: `spans` are trained on (characters); with `append_eos` one more token follows and is
    trained on."""

    text: str
    spans: list[Span]
    append_eos: bool
    turns: bool  # each span is one assistant turn
    special_tokens: bool  # let the tokenizer add its own (plain text has no template to do it)


def lay_out(row: dict[str, Any], template: Template, mask: str) -> Laid:
    """Text and trained spans of an sft row. `mask`: auto, assistant, completion, last, all. Raises Reject."""
    if "text" in row:
        if mask not in ("auto", "all"):
            raise Reject("no supervised token", f"plain text has no turns for data.mask={mask}; use auto or all")
        return Laid(row["text"], [(0, len(row["text"]))], append_eos=True, turns=False, special_tokens=True)
    messages, tools = row["messages"], row.get("tools")
    template.check_texts(messages)
    text, spans = template.segment(messages, tools)
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    closed = template.ends_special(text, spans[-1])
    if not closed:
        text = text[: spans[-1][1]]  # an end mark that is plain text, or none: EOS comes right after the answer
    if mask == "all":
        return Laid(text, [(0, spans[-1][1])], append_eos=not closed, turns=False, special_tokens=False)
    if mask == "last":
        spans = spans[-1:]
    elif mask == "completion":
        spans = [span for turn, span in zip(turns, spans, strict=True) if turn >= row["start"]]
    return Laid(text, spans, append_eos=not closed, turns=True, special_tokens=False)


def token_range(encoding: Any, span: Span) -> tuple[int, int]:
    """The tokens that overlap characters [start, end). Empty when there are none."""
    start, end = span
    first = None
    while start < end and first is None:  # white space may belong to no token
        first = encoding.char_to_token(start)
        start += 1
    if first is None:
        return 0, 0
    last = None
    while last is None:
        end -= 1
        last = encoding.char_to_token(end)
    return first, last + 1


def tokenize(rows: list[Laid], frozen: Frozen) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids int32, trained bool) of each row; the first token is never trained on, nothing predicts it."""
    encodings: list[Any] = [None] * len(rows)
    for special in (False, True):
        which = [i for i, row in enumerate(rows) if row.special_tokens is special]
        found = frozen.tokenizer.encode_batch([rows[i].text for i in which], add_special_tokens=special)
        for i, encoding in zip(which, found, strict=True):
            encodings[i] = encoding
    closing = frozen.template.closing.special
    closing_id = None if closing is None else frozen.tokenizer.token_to_id(closing)
    result = []
    for row, encoding in zip(rows, encodings, strict=True):
        ids = np.array(encoding.ids, np.int32)
        trained = np.zeros(len(ids), bool)
        for span in row.spans:
            first, last = token_range(encoding, span)
            trained[first:last] = True
        if row.turns and closing_id is not None and np.count_nonzero(ids[trained] == closing_id) != len(row.spans):
            raise Unsegmentable(f"{closing} does not end each trained turn exactly once")
        if row.append_eos:
            if row.special_tokens and len(ids) and ids[-1] == frozen.eos:
                ids, trained = ids[:-1], trained[:-1]
            ids = np.append(ids, np.int32(frozen.eos))
            trained = np.append(trained, True)
        trained[:1] = False
        result.append((ids, trained))
    return result


def pair_tokens(row: dict[str, Any], frozen: Frozen) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(prompt, chosen, rejected) ids of a preference row. prompt + chosen is the tokenization of their
    joint text."""
    template, tools = frozen.template, row.get("tools")
    asked = template.render(row["prompt"], tools, prompt=True)
    joint = []
    for key in ("chosen", "rejected"):
        messages = row["prompt"] + row[key]
        template.check_texts(messages)
        text, spans = template.segment(messages, tools)
        first = sum(m["role"] == "assistant" for m in row["prompt"])
        start, end = spans[first][0], spans[-1][1]
        special = template.ends_special(text, spans[-1])
        if text.startswith(asked):
            start = len(asked)
        encoding = frozen.tokenizer.encode(text[:end], add_special_tokens=False)
        ids = list(encoding.ids) + ([] if special else [frozen.eos])
        joint.append((ids, token_range(encoding, (start, end))[0]))
    (chosen, a), (rejected, b) = joint
    shared = 0
    while shared < min(a, b) and chosen[shared] == rejected[shared]:
        shared += 1
    return tuple(np.array(ids, np.int32) for ids in (chosen[:shared], chosen[shared:], rejected[shared:]))  # type: ignore[return-value]
