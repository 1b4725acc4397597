"""G-Eval (Liu et al. 2023): a judge writes evaluation steps for criteria in words, then fills in a score.

The score of an answer is Σ p(s)·s over the score tokens 1 … scale, normalised over them. Without token probabilities
it is the mean of answers drawn at temperature 1. What cannot be read is a failure and has no score, never a zero.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Annotated, Any, Protocol

from pydantic import Field

from ftdist import rundir
from ftdist.errors import Failed, UserError
from ftdist.evaluate.generate import positions_of, progress, stops
from ftdist.spectrum import reader

IN_A_ROW = 3  # answers that stayed away after all tries, one after another: the judge is down
LONGEST_WAIT = 30.0  # seconds between two tries, unless the endpoint asks for more
LONGEST_ASKED = 600.0  # seconds; an endpoint that asks for more is down for us
STEPS_TOKENS = 512
TOP = 20  # token probabilities asked for: the most that the API gives


def settings(
    *,
    criteria: str | dict[str, str] | None,
    judge: str | None,
    model: str | None,
    steps: str | dict[str, str] | None,
    scale: Annotated[int, Field(ge=2, le=9)],
    reference: bool,
    samples: Annotated[int, Field(ge=1)],
    concurrency: Annotated[int, Field(ge=1)],
    requests_per_minute: Annotated[float, Field(gt=0)],
    retries: Annotated[int, Field(ge=0)],
    timeout: Annotated[float, Field(gt=0)],
    price_in: Annotated[float, Field(ge=0)] | None,
    price_out: Annotated[float, Field(ge=0)] | None,
) -> None:
    """The keys of `eval.g_eval`."""


class Unreadable(Exception):
    """The judge answered, but not with a score."""


class Judge(Protocol):
    """Somebody who writes and scores. Both may be called from several threads."""

    ledger: dict[str, Any]

    def write(self, prompt: str) -> str:
        """A text."""

    def score(self, prompt: str, scale: int) -> float:
        """The expected score; Unreadable without any."""


def judge(
    rows: list[dict[str, Any]],
    answers: dict[str, list[str]],
    *,
    criteria: str | dict[str, str],
    judge: str,
    model: str | None,
    steps: str | dict[str, str] | None,
    scale: int,
    reference: bool,
    samples: int,
    concurrency: int,
    requests_per_minute: float,
    retries: int,
    timeout: float,
    price_in: float | None,
    price_out: float | None,
) -> tuple[dict[str, dict[str, list[float]]], dict[str, Any]]:
    """Side → metric → a score for each row (NaN: none), and what judging took.

    Several criteria give `g_eval_NAME` each, and `g_eval`, their mean.
    """
    of: Judge
    if re.match(r"https?://", judge):
        of = Endpoint(judge, model, samples, requests_per_minute, retries, timeout)
    elif Path(judge).expanduser().is_dir():
        of, concurrency = Local(Path(judge).expanduser()), 1
    else:
        raise UserError(f"eval.g_eval.judge={judge}: no URL and no model directory; http://HOST:PORT/v1 or a directory")
    named = criteria if isinstance(criteria, dict) else {"": criteria}
    found: dict[str, dict[str, list[float]]] = {side: {} for side in answers}
    of.ledger |= {"judge": judge, "model": model, "scale": scale, "scored": 0, "failed": 0, "steps": {}}
    for name, words in named.items():
        given = steps.get(name) if isinstance(steps, dict) else steps
        try:
            written = given or of.write(_steps_prompt(words, scale)).strip()
        except Unreadable as failure:
            raise Failed(f"eval.g_eval.criteria: {failure}; shorten them")
        if not written:
            raise Failed(f"eval.g_eval.judge={judge}: wrote no evaluation steps; give them with eval.g_eval.steps")
        of.ledger["steps"][name or "g_eval"] = written
        tasks = [
            _form(words, written, row, answers[side][i], scale, reference)
            for side in answers
            for i, row in enumerate(rows)
        ]
        values = _scored(of, tasks, scale, concurrency)
        for n, side in enumerate(answers):
            found[side][f"g_eval_{name}" if name else "g_eval"] = values[n * len(rows) : (n + 1) * len(rows)]
    if isinstance(criteria, dict):
        for of_side in found.values():
            of_side["g_eval"] = [sum(values) / len(values) for values in zip(*of_side.values(), strict=True)]
    ledger = of.ledger
    if price_in is not None or price_out is not None:
        spent = ledger["tokens_in"] * (price_in or 0) + ledger["tokens_out"] * (price_out or 0)
        ledger["cost"] = round(spent / 1e6, 6)
    if not ledger["scored"]:
        raise Failed(f"eval.g_eval: no answer of {judge} holds a score ({ledger.get('example', 'nothing')}); "
                     "no g_eval was written, the other metrics are")  # fmt: skip
    return found, ledger


def _scored(of: Judge, prompts: list[str], scale: int, concurrency: int) -> list[float]:
    lock, state = threading.Lock(), {"done": 0, "in_a_row": 0}
    distinct = list(dict.fromkeys(prompts))  # base and tuned may have answered alike

    def one(prompt: str) -> float:
        value, unreachable = math.nan, None
        try:
            value = of.score(prompt, scale)
        except Unreadable as failure:
            with lock:
                of.ledger["failed"] += 1
                of.ledger.setdefault("example", str(failure))
        except Unreachable as failure:
            unreachable = str(failure)
        with lock:
            state["done"] += 1
            state["in_a_row"] = state["in_a_row"] + 1 if unreachable else 0
            of.ledger["scored"] += not math.isnan(value)
            if unreachable:
                of.ledger["failed"] += 1
                of.ledger["unreachable"] = of.ledger.get("unreachable", 0) + 1
                if state["in_a_row"] >= min(IN_A_ROW, len(distinct)):
                    raise Failed(_down(of, unreachable))
            progress(f"judged: {state['done']}/{len(distinct)}", state["done"] == len(distinct))
        return value

    pool = ThreadPoolExecutor(concurrency)
    try:
        values = dict(zip(distinct, pool.map(one, distinct), strict=True))
        return [values[prompt] for prompt in prompts]
    finally:
        pool.shutdown(cancel_futures=True)


def _down(of: Judge, reason: str) -> str:
    return (
        f"eval.g_eval.judge={of.ledger.get('judge')}: does not answer ({reason}); the other metrics are written; "
        "run it again: what was judged is remembered"
    )


def _remembered(asked: Any) -> tuple[Path, Any]:
    """Where the answer to `asked` is kept, and the answer: None if there is none yet."""
    key = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
    place = rundir.cache_root() / "judge" / f"{key}.json"
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        return place, json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return place, None


# --- prompts --------------------------------------------------------------------------------------


def _steps_prompt(criteria: str, scale: int) -> str:
    return (
        f"An assistant's answer to a user will be graded from 1 (worst) to {scale} (best).\n\nCriteria:\n{criteria}\n\n"
        "Write the steps that a careful grader takes to apply these criteria, as a short numbered list. Write only it."
    )


def _form(criteria: str, steps: str, row: dict[str, Any], answer: str, scale: int, reference: bool) -> str:
    said = [m for m in row["messages"] if m["role"] in ("system", "user", "assistant")]
    asked = said[:-1] if said and said[-1]["role"] == "assistant" else said
    talk = "\n".join(f"{m['role']}: {m['content']}" for m in asked)
    parts = [
        f"Grade an assistant's answer from 1 (worst) to {scale} (best).",
        f"Criteria:\n{criteria}",
        f"Evaluation steps:\n{steps}",
        f"Conversation:\n{talk}",
        f"Answer to grade:\n{answer or '(empty)'}",
    ]
    if reference:
        parts.insert(4, f"Reference answer:\n{row['reference']}")
    return "\n\n".join(parts) + f"\n\nAnswer with one number from 1 to {scale} and nothing else.\nScore:"


def expected(probabilities: dict[str, float], scale: int) -> float | None:
    """Σ p(s)·s / Σ p(s) over tokens that are a score; None if no token is."""
    weights = [0.0] * (scale + 1)
    for token, p in probabilities.items():
        text = token.strip().strip("Ġ▁*\"'")
        if text.isascii() and text.isdigit() and len(text) == 1 and 1 <= int(text) <= scale:
            weights[int(text)] += p
    total = sum(weights)
    return sum(s * p for s, p in enumerate(weights)) / total if total > 0 else None


def stated(text: str, scale: int) -> int | None:
    """The score that a text states: the only number of the scale in it, or the one after its last "score"."""
    after = re.findall(r"(?i)score\W{0,4}(\d+(?:\.\d+)?)", text)
    numbers = after[-1:] or re.findall(r"(?<![\d.])\d+(?:\.\d+)?(?!\s*(?:/|out of)?\s*\d)", text.split("/")[0])
    fitting = {n for n in numbers if n.isdigit() and 1 <= int(n) <= scale}
    return int(fitting.pop()) if len(fitting) == 1 and len(set(numbers)) == 1 else None


def _weighted(tokens: list[dict[str, Any]], scale: int) -> float | None:
    """The expected score at the first token that is one; a judge may begin with a space or a quote."""
    for token in tokens:
        top = {t["token"]: math.exp(t["logprob"]) for t in token.get("top_logprobs") or [token]}
        value = expected(top, scale) if expected({token["token"]: 1.0}, scale) is not None else None
        if value is not None:
            return value
    return None


# --- an OpenAI-compatible endpoint ----------------------------------------------------------------


class Unreachable(Exception):
    """No usable answer after all tries."""


class Endpoint:
    """Chat completions over HTTP: remembered on disk, at most so many a minute, tried again when that may help."""

    def __init__(
        self, url: str, model: str | None, samples: int, requests_per_minute: float, retries: int, timeout: float
    ) -> None:
        import httpx

        if not model:
            raise UserError(f"eval.g_eval.model=null: which model of {url} judges? eval.g_eval.model=NAME")
        self.url, self.model, self.samples, self.retries = url.rstrip("/"), model, samples, retries
        self.pause = 60.0 / requests_per_minute
        key = os.environ.get("OPENAI_API_KEY")
        self.client = httpx.Client(timeout=timeout, headers={"Authorization": f"Bearer {key}"} if key else {})
        self.lock = threading.Lock()
        self.next = 0.0
        self.probabilities = True  # until the endpoint says that it has none
        self.ledger: dict[str, Any] = dict.fromkeys(
            ("requests", "remembered", "retried", "tokens_in", "tokens_out", "by_sampling"), 0
        )

    def write(self, prompt: str) -> str:
        try:
            choices = self._ask(prompt, {"temperature": 0, "max_tokens": STEPS_TOKENS})
        except Unreachable as failure:
            raise Failed(_down(self, str(failure)))
        return _content(choices[0])

    def score(self, prompt: str, scale: int) -> float:
        if self.probabilities:
            extra = {"temperature": 0, "max_tokens": 8, "logprobs": True, "top_logprobs": TOP}
            choice = self._ask(prompt, extra)[0]
            try:
                tokens = (choice.get("logprobs") or {}).get("content")
                found = _weighted(tokens, scale) if tokens else None
            except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
                raise Unreadable("its token probabilities are not those of the API")
            if found is not None:
                return found
            if tokens:
                raise Unreadable(repr(_content(choice)[:80]))
            self.probabilities = False
        return self._by_sampling(prompt, scale)

    def _by_sampling(self, prompt: str, scale: int) -> float:
        texts: list[str] = []
        for call in range(self.samples):
            left = self.samples - len(texts)
            if left <= 0:
                break
            extra = {"temperature": 1, "max_tokens": 16, "n": left, "seed": call}
            texts += [_content(choice) for choice in self._ask(prompt, extra)]
        values = [value for text in texts if (value := stated(text, scale)) is not None]
        with self.lock:
            self.ledger["by_sampling"] += 1
        if not values:
            raise Unreadable(repr(texts[0][:80]) if texts else "no text")
        return sum(values) / len(values)

    def _ask(self, prompt: str, extra: dict[str, Any]) -> list[dict[str, Any]]:
        """The choices of a completion, from memory if it was asked before."""
        body = {"model": self.model, "messages": [{"role": "user", "content": prompt}], **extra}
        place, known = _remembered([self.url, body])
        if known is not None:
            with self.lock:
                self.ledger["remembered"] += 1
            return list(known)
        answer = self._post(body)
        choices: list[dict[str, Any]] = answer["choices"]
        usage = answer.get("usage") or {}
        with self.lock:
            self.ledger["tokens_in"] += usage.get("prompt_tokens") or 0
            self.ledger["tokens_out"] += usage.get("completion_tokens") or 0
        rundir.write_json(place, choices)
        return choices

    def _post(self, body: dict[str, Any]) -> dict[str, Any]:
        import httpx

        reason, attempt = "", 0
        while attempt <= self.retries:
            self._wait_for_a_turn()
            with self.lock:
                self.ledger["requests"] += 1
                self.ledger["retried"] += attempt > 0
            attempt += 1
            wanted = 0.0
            try:
                response = self.client.post(f"{self.url}/chat/completions", json=body)
            except httpx.TimeoutException:
                reason = "no answer in time"
            except (httpx.HTTPError, httpx.InvalidURL) as failure:
                reason = str(failure) or type(failure).__name__
            else:
                if response.status_code == 200:
                    answer = _json(response)
                    if answer is not None:
                        return answer
                    reason = "its answer is no chat completion"
                elif response.status_code in (408, 409, 429) or response.status_code >= 500:
                    reason = f"status {response.status_code}"
                    wanted = _retry_after(response.headers.get("retry-after"))
                else:
                    text = " ".join(response.text.split())
                    if "logprob" in text and body.pop("logprobs", None) is not None:
                        body.pop("top_logprobs", None)  # an endpoint that refuses to tell probabilities
                        attempt -= 1
                        continue
                    raise Failed(f"eval.g_eval.judge={self.url}: refuses (status {response.status_code}: {text[:160]})")
            if attempt <= self.retries:
                if wanted > LONGEST_ASKED:
                    reason += f", and asks to wait for {wanted:.0f} s"
                    break
                with self.lock:  # nobody asks before that time
                    self.next = max(self.next, time.monotonic() + wanted)
                time.sleep(min(0.25 * 2**attempt * random.uniform(0.5, 1.5), LONGEST_WAIT))
        raise Unreachable(reason)

    def _wait_for_a_turn(self) -> None:
        with self.lock:
            now = time.monotonic()
            mine = max(now, self.next)
            self.next = mine + self.pause
        time.sleep(max(0.0, mine - now))


def _json(response: Any) -> dict[str, Any] | None:
    """A chat completion with at least one choice, or None."""
    try:
        answer = response.json()
        fine = all(isinstance(choice["message"], dict) for choice in answer["choices"]) and answer["choices"]
    except (ValueError, KeyError, TypeError):
        return None
    return answer if fine and isinstance(answer.get("usage") or {}, dict) else None


def _content(choice: dict[str, Any]) -> str:
    return str(choice["message"].get("content") or "")


def _retry_after(value: str | None) -> float:
    """Seconds that the header asks to wait for: a number or a date."""
    if not value:
        return 0.0
    try:
        return float(value)
    except ValueError:
        try:
            return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
        except (TypeError, ValueError):
            return 0.0


# --- a local model --------------------------------------------------------------------------------


class Local:
    """A Hugging Face causal language model on this machine: the probabilities of the whole vocabulary."""

    def __init__(self, directory: Path) -> None:
        import torch

        from ftdist import models

        self.tokenizer: Any = models.tokenizer(str(directory), None, False)
        loaded: Any = models.load(
            path=str(directory),
            revision=None,
            dtype="auto",
            attn_implementation="sdpa",
            trust_remote_code=False,
            quantization=None,
            loaded_dtype="auto",
        )
        self.model: Any = loaded.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        self.model.config.use_cache = True
        self.ledger: dict[str, Any] = dict.fromkeys(("requests", "remembered", "retried", "tokens_in", "tokens_out"), 0)
        digits: dict[str, list[int]] = {}
        for token in range(len(self.tokenizer)):
            text = str(self.tokenizer.decode([token])).strip()
            if len(text) == 1 and text in "123456789":
                digits.setdefault(text, []).append(token)
        self.digits = digits
        small = [file for kind in ("*.json", "*.jinja", "*.model") for file in sorted(directory.glob(kind))]
        parts = [reader.content_key(reader.shards(directory), rank=0, world=1), *map(reader.digest, small)]
        self.identity = hashlib.sha256(" ".join(parts).encode()).hexdigest()

    def _encoded(self, prompt: str) -> Any:
        import torch

        if self.tokenizer.chat_template:
            text = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            ids = self.tokenizer(prompt)["input_ids"]
        positions = positions_of(self.model)
        if positions and len(ids) > positions:
            raise Unreadable(f"{len(ids)} tokens to read, the judge takes {positions}")
        self.ledger["requests"] += 1
        self.ledger["tokens_in"] += len(ids)
        return torch.tensor([ids], device=self.model.device)

    def write(self, prompt: str) -> str:
        import torch

        place, known = _remembered([self.identity, "write", prompt])
        if known is not None:
            self.ledger["remembered"] += 1
            return str(known)
        ids = self._encoded(prompt)
        with torch.no_grad():
            output = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=STEPS_TOKENS // 2,
                do_sample=False,
                eos_token_id=stops(self.model, self.tokenizer) or None,
                pad_token_id=self.tokenizer.pad_token_id,
            )[0, ids.shape[1] :]
        self.ledger["tokens_out"] += len(output)
        text = str(self.tokenizer.decode(output, skip_special_tokens=True))
        rundir.write_json(place, text)
        return text

    def score(self, prompt: str, scale: int) -> float:
        import torch

        place, known = _remembered([self.identity, "score", scale, prompt])
        if known is not None:
            self.ledger["remembered"] += 1
            return float(known)
        with torch.no_grad():
            logits = self.model(input_ids=self._encoded(prompt), use_cache=False).logits[0, -1].double()
        p = logits.softmax(-1)
        by_score: dict[str, float] = {
            text: float(p[tokens].sum()) for text, tokens in self.digits.items() if int(text) <= scale
        }
        self.ledger["tokens_out"] += 1
        value = expected(by_score, scale)
        if value is None or math.isnan(value):
            raise Unreadable("no score token has any probability")
        rundir.write_json(place, value)
        return value
