"""Rows → token ids with a mask of what is trained on."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
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
    frozen["known"] = _template(frozen).learn()
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


def _template(frozen: dict[str, Any]) -> Template:
    given = {key: frozen[key] for key in ("tokens", "specials", "keywords")}
    return Template(frozen["template"], known=frozen.get("known"), **given)


@lru_cache(maxsize=2)
def load_frozen(folder: Path) -> Frozen:
    """What freeze_tokenizer wrote."""
    from tokenizers import Tokenizer

    frozen = json.loads((folder / "template.json").read_text(encoding="utf-8"))
    template = _template(frozen)
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
    encoded: list[tuple[np.ndarray, np.ndarray]] = [(np.zeros(0, np.int32), np.zeros(0, bool))] * len(rows)
    for special in (False, True):
        which = [i for i, row in enumerate(rows) if row.special_tokens is special]
        if which:
            own = [rows[i] for i in which]
            found = (None if special else _by_spelling(own, frozen)) or _by_offsets(own, frozen, special)
            for i, pair in zip(which, found, strict=True):
                encoded[i] = pair
    closing = frozen.template.closing.special
    closing_id = None if closing is None else frozen.tokenizer.token_to_id(closing)
    result = []
    for row, (ids, trained) in zip(rows, encoded, strict=True):
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


def _by_offsets(rows: list[Laid], frozen: Frozen, special: bool) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids, trained) of rows; the tokenizer says which characters a token stands for."""
    result = []
    found = frozen.tokenizer.encode_batch([row.text for row in rows], add_special_tokens=special)
    for row, encoding in zip(rows, found, strict=True):
        ids = np.array(encoding.ids, np.int32)
        trained = np.zeros(len(ids), bool)
        for span in row.spans:
            first, last = token_range(encoding, span)
            trained[first:last] = True
        result.append((ids, trained))
    return result


def _by_spelling(rows: list[Laid], frozen: Frozen) -> list[tuple[np.ndarray, np.ndarray]] | None:
    """The same by the bytes that tokens stand for, which spares the tokenizer its offsets. None where they do not
    spell the texts exactly."""
    if frozen.pieces is None or frozen.sizes is None:
        return None
    texts = [row.text for row in rows]
    listed = [e.ids for e in frozen.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    counts = np.array([len(ids) for ids in listed])
    ids = np.fromiter(chain.from_iterable(listed), np.int32, int(counts.sum()))
    whole = [text.encode() for text in texts]
    ends = np.cumsum(frozen.sizes[ids])  # of the tokens, in bytes of all texts together
    borders = np.concatenate([[0], np.cumsum(counts)])
    text_ends = np.cumsum([len(text) for text in whole])
    spelled = counts.all() and bool((ends[borders[1:] - 1] == text_ends).all())
    if not spelled or b"".join(map(frozen.pieces.__getitem__, chain.from_iterable(listed))) != b"".join(whole):
        return None
    places = []
    for row, text, start in zip(rows, whole, (text_ends - [len(text) for text in whole]).tolist(), strict=True):
        for span in row.spans:
            first, last = span
            if len(text) != len(row.text):
                first, last = (len(row.text[:at].encode()) for at in span)
            if first < last:
                places.append((start + first, start + last))
    edges = np.zeros(len(ids) + 1, np.int32)
    if places:
        firsts, lasts = np.array(places).T
        np.add.at(edges, np.searchsorted(ends, firsts, "right"), 1)
        np.add.at(edges, np.searchsorted(ends, lasts, "left") + 1, -1)
    trained = np.cumsum(edges[:-1]) > 0
    cuts = borders.tolist()
    return [(ids[a:b], trained[a:b]) for a, b in zip(cuts, cuts[1:], strict=False)]


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
