"""Talk to base and tuned model next to each other in a terminal. Each remembers its own answers."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from ftdist import rundir
from ftdist.errors import UserError

HELP = "/reset forgets the conversation, /system TEXT begins a new one, /quit (or Ctrl-D) ends"


def settings(
    *,
    max_new_tokens: Annotated[int, Field(ge=1)],
    temperature: Annotated[float, Field(ge=0)],
    base: str | None,
    system: str | None,
) -> None:
    """The keys of `chat`."""


def chat(run_dir: Path, *, max_new_tokens: int, temperature: float, base: str | None, system: str | None) -> None:
    """Read lines until the end of the input; answer each by both models. UserError for a run that cannot chat."""
    from transformers import set_seed
    from transformers.utils import logging

    from ftdist import base as bases
    from ftdist.evaluate.load import Loader

    logging.disable_progress_bar()
    run = rundir.finished(run_dir)
    base_dir = bases.found(run_dir, base or run["config"]["model"]["path"], "chat.base")
    loader = Loader(run_dir, run["config"], run["plan"], base_dir)
    tuned, tokenizer = loader.load("tuned", quantised=True, dtype=run["plan"]["precision"])
    if not tokenizer.chat_template:
        raise UserError(f"{run_dir}: its tokenizer has no chat template; set data.chat_template when training")
    without: Callable[[], Any] = nullcontext
    if loader.recipe.peft is not None:
        other, without = tuned, tuned.disable_adapter  # one copy of the base serves both
    else:
        other, _ = loader.load("base", quantised=True, dtype=run["plan"]["precision"])
    set_seed(run["config"]["seed"])
    begun = [{"role": "system", "content": system}] if system else []
    talks: dict[str, list[dict[str, str]]] = {"base": [*begun], "tuned": [*begun]}
    asking = sys.stdin.isatty()
    print(f"base and tuned of {run_dir.name}; {HELP}", flush=True)
    while True:
        try:
            line = input("you    ") if asking else next(sys.stdin).rstrip("\n")
        except (EOFError, StopIteration):
            break
        if line in ("/quit", "/exit"):
            break
        if line == "/reset" or line.startswith("/system"):
            words = line.removeprefix("/system").strip() if line != "/reset" else system
            begun = [{"role": "system", "content": words}] if words else []
            talks = {"base": [*begun], "tuned": [*begun]}
            continue
        if line.startswith("/"):
            print(HELP, flush=True)
            continue
        if not line.strip():
            continue
        for side, model, context in (("base", other, without), ("tuned", tuned, nullcontext)):
            talks[side].append({"role": "user", "content": line})
            with context():
                said = _answer(model, tokenizer, talks[side], max_new_tokens, temperature, side)
            talks[side].append({"role": "assistant", "content": said})
            print(_laid_out(side, said), flush=True)


def _answer(
    model: Any, tokenizer: Any, talk: list[dict[str, str]], max_new_tokens: int, temperature: float, side: str
) -> str:
    import torch
    from jinja2 import TemplateError

    from ftdist.evaluate.generate import stops

    try:
        text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    except TemplateError as failure:
        return f"(the chat template of {side} refuses this conversation: {failure}; /reset)"
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"].to(model.device)
    drawn = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    with torch.no_grad():
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            eos_token_id=stops(model, tokenizer) or None,
            pad_token_id=tokenizer.pad_token_id,
            **drawn,
        )
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)).strip()


def _laid_out(side: str, text: str) -> str:
    """The answer behind its name, wrapped to the terminal."""
    width = max(20, shutil.get_terminal_size().columns - 7)
    lines = [part for line in (text or "(empty)").splitlines() for part in textwrap.wrap(line, width) or [""]]
    colour = (
        {"base": "\x1b[36m", "tuned": "\x1b[32m"}[side] if sys.stdout.isatty() and "NO_COLOR" not in os.environ else ""
    )
    name = f"{colour}{side:<7}{chr(27) + '[0m' if colour else ''}"
    return name + f"\n{' ' * 7}".join(lines)
