"""Rows → token ids with a mask of what is trained on."""

from __future__ import annotations

import json
from contextlib import suppress
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
    pieces: list[bytes] | None  # what each token spells, where that is known
    sizes: np.ndarray | None  # in bytes


@lru_cache(maxsize=2)
def load_frozen(folder: Path) -> Frozen:
    """What freeze_tokenizer wrote."""
    from tokenizers import Tokenizer

    frozen = json.loads((folder / "template.json").read_text(encoding="utf-8"))
    template = Template(
        frozen["template"], tokens=frozen["tokens"], specials=frozen["specials"], keywords=frozen["keywords"]
    )
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    pieces = spelling(tokenizer)
    sizes = None if pieces is None else np.array([len(piece) for piece in pieces], np.int64)
    return Frozen(tokenizer, template, frozen["eos"], frozen["bos"], pieces, sizes)


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
    encoded: list[tuple[np.ndarray, list[tuple[int, int]]]] = [(np.zeros(0, np.int32), [])] * len(rows)
    for special in (False, True):
        which = [i for i, row in enumerate(rows) if row.special_tokens is special]
        texts = [rows[i].text for i in which]
        fast = frozen.pieces is not None and not special
        encode = frozen.tokenizer.encode_batch_fast if fast else frozen.tokenizer.encode_batch
        for i, text, encoding in zip(which, texts, encode(texts, add_special_tokens=special), strict=True):
            listed = encoding.ids
            ids = np.array(listed, np.int32)
            ranges = _ranges(text, listed, ids, rows[i].spans, frozen) if fast else None
            if ranges is None:
                if fast:
                    encoding = frozen.tokenizer.encode(text, add_special_tokens=False)
                ranges = [token_range(encoding, span) for span in rows[i].spans]
            encoded[i] = ids, ranges
    closing = frozen.template.closing.special
    closing_id = None if closing is None else frozen.tokenizer.token_to_id(closing)
    result = []
    for row, (ids, ranges) in zip(rows, encoded, strict=True):
        trained = np.zeros(len(ids), bool)
        for first, last in ranges:
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


def _ranges(
    text: str, listed: list[int], ids: np.ndarray, spans: list[Span], frozen: Frozen
) -> list[tuple[int, int]] | None:
    """The tokens of each span by the bytes that tokens stand for; None unless they spell the text exactly."""
    assert frozen.pieces is not None and frozen.sizes is not None
    whole = text.encode()
    if b"".join(map(frozen.pieces.__getitem__, listed)) != whole:
        return None
    ends = np.cumsum(frozen.sizes[ids])
    if len(whole) == len(text):
        places = spans
    else:
        places = [(len(text[:start].encode()), len(text[:end].encode())) for start, end in spans]
    return [
        (int(np.searchsorted(ends, start, "right")), int(np.searchsorted(ends, end, "left")) + 1)
        if start < end
        else (0, 0)
        for start, end in places
    ]


def spelling(tokenizer: Any) -> list[bytes] | None:
    """The bytes of every token of a byte-level vocabulary, None for another kind."""
    from tokenizers import decoders

    if not isinstance(tokenizer.decoder, decoders.ByteLevel):
        return None
    byte_of, free = {}, 256  # GPT-2's alphabet: printable bytes stand for themselves, the others for what comes next
    for byte in range(256):
        printable = 33 <= byte <= 126 or 161 <= byte <= 172 or byte >= 174
        byte_of[chr(byte if printable else free)] = byte
        free += not printable
    pieces = [b""] * tokenizer.get_vocab_size()
    for token, number in tokenizer.get_vocab(with_added_tokens=False).items():
        with suppress(KeyError, IndexError):
            pieces[number] = bytes(byte_of[character] for character in token)
    for number, added in tokenizer.get_added_tokens_decoder().items():
        pieces += [b""] * (number + 1 - len(pieces))
        pieces[number] = added.content.encode()
    return pieces


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
