"""Prepared rows for the eye: every token, coloured by its mask."""

from __future__ import annotations

import sys
from pathlib import Path

from ftdist.data.report import words as report

__all__ = ["report", "show"]

_TRAINED, _CONTEXT, _SPECIAL, _END = "\x1b[30;42m", "\x1b[90m", "\x1b[1;35m", "\x1b[0m"


def show(prepared: Path, tokenizer_path: str, count: int, *, colour: bool | None = None) -> None:
    """Prints the first `count` training rows token by token. Without colour, trained tokens stand in
    [brackets].

    `colour` None means: on a terminal only.
    """
    import datasets
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    rows = datasets.load_from_disk(str(prepared / "train"))
    colour = sys.stdout.isatty() if colour is None else colour
    special = set(tokenizer.all_special_ids) | {
        i for i, token in tokenizer.added_tokens_decoder.items() if token.special
    }

    def piece(token: int, trained: bool) -> str:
        text = str(tokenizer.decode([token]))
        if token in special:
            text = str(tokenizer.convert_ids_to_tokens(token))
        text = text.replace("\n", "↵\n") if text != "\n" else "↵\n"
        if not colour:
            return f"[{text}]" if trained else text
        style = (_TRAINED if trained else _CONTEXT) + (_SPECIAL if token in special and not trained else "")
        return f"{style}{text}{_END}"

    for number in range(min(count, len(rows))):
        row = rows[number]
        if "prompt_ids" in row:
            print(f"--- row {number}")
            for name, trained in (("prompt_ids", False), ("chosen_ids", True), ("rejected_ids", True)):
                print(f"{name} ({len(row[name])} tokens): {''.join(piece(t, trained) for t in row[name])}")
            continue
        at = 0
        for index, length in enumerate(row["lengths"]):
            part = slice(at, at + length)
            marks = [label != -100 for label in row["labels"][part]]
            print(f"--- row {number}, sequence {index}: {length} tokens, {sum(marks)} trained on")
            print("".join(piece(t, m) for t, m in zip(row["input_ids"][part], marks, strict=True)))
            at += length
