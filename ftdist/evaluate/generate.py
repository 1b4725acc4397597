"""Answers and losses of one model: in batches of like length, with bounded memory."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

LOGITS = 1 << 28  # elements of the largest logits that a batch may have (1 GiB in float32)


def losses(model: Any, prepared: Path, batch_size: int, pad_id: int, which: str) -> tuple[np.ndarray, np.ndarray]:
    """Summed negative log-likelihood of the supervised tokens of every prepared held-out row, and their number."""
    import datasets
    import torch

    from ftdist.loss import IGNORED
    from ftdist.trainer import collate

    rows = datasets.load_from_disk(str(prepared / "validation"))
    lengths = [len(ids) for ids in rows["input_ids"]]
    order = sorted(range(len(rows)), key=lambda i: -lengths[i])
    sums, counts = np.zeros(len(rows)), np.zeros(len(rows))
    vocabulary = model.get_input_embeddings().weight.shape[0]
    done = 0
    while done < len(order):
        room = LOGITS // (lengths[order[done]] * vocabulary)
        chosen = order[done : done + max(1, min(batch_size, room))]
        batch = collate([rows[i] for i in chosen], pad_id)
        batch = {key: value.to(model.device) for key, value in batch.items()}
        targets = batch["targets"]
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
            for row, i in enumerate(chosen):  # a row at a time: its logits in float32 are a copy
                wanted = targets[row] != IGNORED
                sums[i] = float(
                    torch.nn.functional.cross_entropy(
                        logits[row][wanted].float(), targets[row][wanted], reduction="sum"
                    )
                )
                counts[i] = int(wanted.sum())
        done += len(chosen)
        progress(f"loss of {which}: {done}/{len(rows)}", done == len(rows))
    return sums, counts


def stops(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end an answer: the tokenizer's, the model's, and the one that the chat template ends a turn with."""
    of_model = model.generation_config.eos_token_id
    found = [tokenizer.eos_token_id, *(of_model if isinstance(of_model, list) else [of_model])]
    if tokenizer.chat_template:
        mark = "ftdist"
        turns = [{"role": "user", "content": mark}, {"role": "assistant", "content": mark}]
        try:
            text = tokenizer.apply_chat_template(turns, tokenize=False)
        except Exception:  # a template may refuse whatever it likes; the other ends remain
            text = ""
        after = tokenizer(text.rpartition(mark)[2].lstrip(), add_special_tokens=False)["input_ids"]
        if text and after and after[0] in {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}:
            found.append(after[0])
    return sorted({token for token in found if token is not None})


def answers(
    model: Any, tokenizer: Any, prompts: list[str], max_new_tokens: int, batch_size: int, which: str
) -> tuple[list[str], int]:
    """Greedy answers to rendered prompts, and how many prompts had to lose their beginning to fit the model.

    Left-padded batches of like length, the longest first: what does not fit into memory fails at once.
    """
    import torch

    encoded = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    room = max(1, positions - max_new_tokens) if positions else sys.maxsize
    cut = sum(len(ids) > room for ids in encoded)
    encoded = [ids[-room:] for ids in encoded]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    ends = stops(model, tokenizer)
    found = [""] * len(prompts)
    for done, batch in _batches(sorted(range(len(prompts)), key=lambda i: -len(encoded[i])), batch_size):
        width = len(encoded[batch[0]])
        ids = torch.full((len(batch), width), pad)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(batch):
            ids[row, width - len(encoded[i]) :] = torch.tensor(encoded[i])
            mask[row, width - len(encoded[i]) :] = 1
        with torch.no_grad():
            output = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                eos_token_id=ends or None,
                pad_token_id=pad,
            )
        for i, text in zip(batch, tokenizer.batch_decode(output[:, width:], skip_special_tokens=True), strict=True):
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
