"""Answers and losses of one model: in batches of like length, with bounded memory."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ftdist.data.rows import Answers, rows_of
from ftdist.errors import UserError

LOGITS = 1 << 28  # elements of the largest logits that a batch may have (1 GiB in float32)


def losses(
    model: Any, prepared: Path, batch_size: int, pad_id: int, which: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of the supervised tokens of every held-out example: the summed negative log-likelihood, the number of those
    that are the likeliest of the vocabulary in their place, and their number.

    A prepared row may hold several examples, one after the other.
    """
    return _losses(model, rows_of(prepared / "validation"), batch_size, pad_id, which)


def pair_losses(
    model: Any, prepared: Path, batch_size: int, pad_id: int, which: str
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The same of the chosen and of the rejected answers of every held-out pair."""
    rows = rows_of(prepared / "validation")
    both = _losses(model, Answers(rows), batch_size, pad_id, which)
    return [values[: len(rows)] for values in both], [values[len(rows) :] for values in both]


def _losses(
    model: Any, rows: Sequence[Mapping[str, Any]], batch_size: int, pad_id: int, which: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    import torch

    from ftdist.loss import IGNORED
    from ftdist.trainer import collate, takes_positions

    lengths, examples = [], []
    for i in range(len(rows)):
        lengths.append(len(rows[i]["input_ids"]))
        examples.append(len(rows[i]["lengths"]))
    order = sorted(range(len(rows)), key=lambda i: -lengths[i])
    first = np.cumsum([0, *examples])  # example of each row
    sums, hits, counts = np.zeros(first[-1]), np.zeros(first[-1]), np.zeros(first[-1])
    vocabulary = model.get_input_embeddings().weight.shape[0]
    with_positions = takes_positions(model)
    done = 0
    while done < len(order):
        room = LOGITS // (lengths[order[done]] * vocabulary)
        chosen = order[done : done + max(1, min(batch_size, room))]
        batch = collate([rows[i] for i in chosen], pad_id)
        batch = {key: value.to(model.device) for key, value in batch.items()}
        targets = batch["targets"]
        with torch.no_grad():
            positions = {"position_ids": batch["position_ids"]} if with_positions else {}
            logits = model(input_ids=batch["input_ids"], use_cache=False, **positions).logits
            for row, i in enumerate(chosen):  # a row at a time: its logits in float32 are a copy
                wanted = targets[row] != IGNORED
                each = torch.nn.functional.cross_entropy(
                    logits[row][wanted].float(), targets[row][wanted], reduction="none"
                )
                right = logits[row][wanted].argmax(-1) == targets[row][wanted]
                inside = rows[i]["lengths"]
                owner = np.repeat(np.arange(len(inside)), inside)[wanted[: sum(inside)].cpu().numpy()]
                own = slice(first[i], first[i + 1])
                sums[own] = np.bincount(owner, each.double().cpu().numpy(), len(inside))
                hits[own] = np.bincount(owner, right.double().cpu().numpy(), len(inside))
                counts[own] = np.bincount(owner, minlength=len(inside))
        done += len(chosen)
        progress(f"loss of {which}: {done}/{len(rows)}", done == len(rows))
    return sums, hits, counts


def turn_ends(tokenizer: Any) -> set[int]:
    """Tokens that end an answer: the tokenizer's end token, and the special one that its template ends a turn with."""
    found = {tokenizer.eos_token_id}
    if tokenizer.chat_template:
        mark = "ftdist"
        turns = [{"role": "user", "content": mark}, {"role": "assistant", "content": mark}]
        try:
            text = tokenizer.apply_chat_template(turns, tokenize=False)
        except Exception:  # a template may refuse whatever it likes; the other ends remain
            text = ""
        after = tokenizer(text.rpartition(mark)[2], add_special_tokens=False)["input_ids"] if text else []
        added = tokenizer.added_tokens_decoder  # some vocabularies add runs of spaces too
        special = {*tokenizer.all_special_ids, *(i for i, token in added.items() if str(token).strip())}
        found |= set([token for token in after if token in special][:1])
    return found - {None}


def stops(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end an answer: those of the tokenizer and its template, and the model's."""
    of_model = model.generation_config.eos_token_id
    return sorted({*turn_ends(tokenizer), *(of_model if isinstance(of_model, list) else [of_model])} - {None})


def encoded(
    tokenizer: Any, prompts: list[str], positions: int | None, max_new_tokens: int
) -> tuple[list[list[int]], int]:
    """Token ids of rendered prompts, and how many had to lose their beginning to fit into `positions` (None: no limit).

    UserError when the positions leave no room for a prompt.
    """
    if positions and positions <= max_new_tokens:
        raise UserError(
            f"eval.max_new_tokens={max_new_tokens}: the model has {positions} positions, prompts need some; give less"
        )
    room = positions - max_new_tokens if positions else sys.maxsize
    whole = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    return [ids[-room:] for ids in whole], sum(len(ids) > room for ids in whole)


def positions_of(model: Any) -> int | None:
    """How many positions a model has; None where its configuration names no limit."""
    found: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return found


def generated(
    model: Any, tokenizer: Any, batch: list[list[int]], max_new_tokens: int, synced_gpus: bool = False
) -> list[str]:
    """Greedy answers to one left-padded batch. synced_gpus: all ranks make the same number of passes."""
    import torch

    width = max(map(len, batch))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    ids = torch.full((len(batch), width), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(batch):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    with torch.no_grad():
        output = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            use_cache=True,
            synced_gpus=synced_gpus,
            eos_token_id=stops(model, tokenizer) or None,
            pad_token_id=pad,
        )
    return list(tokenizer.batch_decode(output[:, width:], skip_special_tokens=True))


def answers(
    model: Any, tokenizer: Any, prompts: list[str], max_new_tokens: int, batch_size: int, which: str
) -> tuple[list[str], int]:
    """Greedy answers to rendered prompts, and how many prompts had to lose their beginning to fit the model.

    Batches of like length, the longest first: what does not fit into memory fails at once.
    """
    ids, cut = encoded(tokenizer, prompts, positions_of(model), max_new_tokens)
    found = [""] * len(prompts)
    for done, batch in _batches(sorted(range(len(prompts)), key=lambda i: -len(ids[i])), batch_size):
        texts = generated(model, tokenizer, [ids[i] for i in batch], max_new_tokens)
        for i, text in zip(batch, texts, strict=True):
            found[i] = text
        progress(f"answers of {which}: {done}/{len(prompts)}", done == len(prompts))
    return found, cut


def _batches(order: list[int], size: int) -> Iterator[tuple[int, list[int]]]:
    for start in range(0, len(order), size):
        batch = order[start : start + size]
        yield start + len(batch), batch


_said = 0.0


def progress(text: str, last: bool) -> None:
    """One live line on a terminal, a line now and then elsewhere."""
    global _said
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{'' if last else text}")
    elif last or time.monotonic() - _said > 10:
        _said = time.monotonic()
        sys.stderr.write(text + "\n")
    sys.stderr.flush()
