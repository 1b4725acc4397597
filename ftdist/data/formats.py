"""One raw row in any of the formats that people have → one row in the only form that the rest reads.

The form: `{"messages": [...], "start": int}` for chats, where `start` is the index of the completion's first
message; `{"text": str}` for plain text; `{"prompt": [...], "chosen": [...], "rejected": [...]}` for
preferences; and with each of them `tools` (a list or None) and `id` (a string or None).
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from typing import Any

FORMATS = ("messages", "sharegpt", "alpaca", "prompt_completion", "question_answer", "text", "preference")

# column pairs that `question_answer` recognises without being told, in this order
PAIRS = (
    ("question", "answer"),
    ("query", "response"),
    ("query", "answer"),
    ("question", "response"),
    ("prompt", "response"),
    ("prompt", "answer"),
    ("input", "output"),
)
_ALPACA_ANSWERS = ("output", "response", "answer", "completion")
# what `data.columns` may name
COLUMNS = [
    "messages",
    "conversations",
    "instruction",
    "input",
    "output",
    "history",
    "prompt",
    "completion",
    "question",
    "answer",
    "text",
    "chosen",
    "rejected",
    "system",
    "tools",
    "id",
]

_PREFERENCE_PROMPTS = ("prompt", "conversations", "messages", "question", "instruction")

EXPECTED = (
    "messages | conversations | instruction + output (or response) | prompt + completion | question + answer "
    "| text | chosen + rejected; or name yours with data.columns"
)

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "function_call",
    "tool_call": "function_call",
    "tool": "tool",
    "ipython": "tool",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}

# C0 controls (without tab and newline), DEL, C1 controls, BOM inside a text, line/paragraph separators stay
# out of training data; ZWNJ, ZWJ, bidirectional marks and variation selectors are part of scripts and stay
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff]")
# NFC replaces compatibility ideographs (names in Chinese, Japanese, Korean) by other characters: leave them
# alone
_IDEOGRAPHS = re.compile("([\uf900-\ufaff\U0002f800-\U0002fa1f]+)")


class Reject(Exception):
    """A row that can't be used: `reason` is the class that the report counts, `detail` says more."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


def clean(text: str) -> str:
    """NFC, Unix line ends, no control characters; lone surrogates are a reject because UTF-8 can't hold
    them."""
    if text.isascii():
        if "\r" in text:
            text = text.replace("\r\n", "\n").replace("\r", "\n")
        return _CONTROLS.sub("", text)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Reject("wrong encoding", "half of a surrogate pair") from None
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = _CONTROLS.sub("", text)
    if unicodedata.is_normalized("NFC", text):
        return text
    parts = _IDEOGRAPHS.split(text)
    parts[::2] = [unicodedata.normalize("NFC", part) for part in parts[::2]]
    return "".join(parts)


def detect(row: dict[str, Any]) -> str | None:
    """The format of a row, by its keys; None when there is none."""
    if "chosen" in row and "rejected" in row:
        return "preference"
    if isinstance(row.get("messages"), list):
        return "messages"
    if isinstance(row.get("conversations"), list):
        return "sharegpt"
    if "instruction" in row and any(key in row for key in _ALPACA_ANSWERS):
        return "alpaca"
    if "prompt" in row and "completion" in row:
        return "prompt_completion"
    for question, answer in PAIRS:
        if question in row and answer in row:
            return "question_answer"
    if "text" in row:
        return "text"
    if "messages" in row:
        return "messages"
    if "conversations" in row:
        return "sharegpt"
    return None


def ignored(raw: dict[str, Any], *, format: str, columns: dict[str, str]) -> list[str]:
    """The columns of a row that nothing reads."""
    if columns:
        return [k for k in raw if k not in columns.values() and k not in _read_by(raw, format)]
    return [k for k in raw if k not in _read_by(raw, format)]


def _read_by(raw: dict[str, Any], format: str) -> set[str]:
    kind = detect(raw) if format == "auto" else format
    read = {"id", "system"}
    if kind == "question_answer":
        return read | set(next(((q, a) for q, a in PAIRS if q in raw and a in raw), ()))
    return read | {
        "messages": {"messages", "tools"},
        "sharegpt": {"conversations", "messages", "tools"},
        "alpaca": {"instruction", "input", "context", "history", *_ALPACA_ANSWERS},
        "prompt_completion": {"prompt", "completion"},
        "text": {"text"},
        "preference": {"chosen", "rejected", "tools", *_PREFERENCE_PROMPTS, "input"},
    }.get(str(kind), set())


def convert(raw: Any, *, format: str, columns: dict[str, str]) -> dict[str, Any]:
    """The row in our form. Raises Reject."""
    if not isinstance(raw, dict):
        raise Reject("not an object", f"a {type(raw).__name__} where a row with named columns is expected")
    if columns:
        named = {ours: raw[theirs] for ours, theirs in columns.items() if theirs in raw}
        taken = set(columns.values())
        raw = {k: v for k, v in raw.items() if k not in taken and k not in columns} | named
    kind = detect(raw) if format == "auto" else format
    if kind is None:
        keys = sorted(map(str, raw))
        shown = ", ".join(keys[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")
        raise Reject("missing columns", f"found: {shown or 'nothing'}; expected: {EXPECTED}")
    row: dict[str, Any] = _CONVERTERS[kind](raw)
    row["tools"] = _tools(raw.get("tools")) if kind in ("messages", "sharegpt", "preference") else None
    identifier = raw.get("id")
    row["id"] = None if identifier is None else str(identifier)
    return row


# --- one function a format ------------------------------------------------------------------------


def _chat(raw: dict[str, Any], key: str) -> dict[str, Any]:
    messages = _messages(_need(raw, key), key)
    messages = _with_system(messages, raw)
    _check_order(messages)
    return {"messages": messages, "start": _after_last_user(messages)}


def _messages_format(raw: dict[str, Any]) -> dict[str, Any]:
    return _chat(raw, "messages")


def _sharegpt(raw: dict[str, Any]) -> dict[str, Any]:
    return _chat(raw, "conversations" if "conversations" in raw else "messages")


def _alpaca(raw: dict[str, Any]) -> dict[str, Any]:
    question = _text(_need(raw, "instruction"), "instruction", empty_ok=True)
    extra = raw.get("input", raw.get("context"))  # "context" is Dolly's name for it
    if extra is not None:
        extra = _text(extra, "input", empty_ok=True)
        if extra.strip():
            question = f"{question}\n{extra}" if question.strip() else extra
    key = next((k for k in _ALPACA_ANSWERS if k in raw), "output")
    answer = _text(_need(raw, key), key)
    messages = []
    for turn in raw.get("history") or []:
        if not isinstance(turn, (list, tuple)) or len(turn) != 2:
            raise Reject("wrong type", "history must be a list of [question, answer]")
        messages += [
            _message("user", _text(turn[0], "history")),
            _message("assistant", _text(turn[1], "history")),
        ]
    if not question.strip():
        raise Reject("empty prompt", "instruction and input are empty")
    messages += [_message("user", question), _message("assistant", answer)]
    messages = _with_system(messages, raw)
    return {"messages": messages, "start": len(messages) - 1}


def _prompt_completion(raw: dict[str, Any]) -> dict[str, Any]:
    return _pair(raw, "prompt", "completion")


def _question_answer(raw: dict[str, Any]) -> dict[str, Any]:
    for question, answer in PAIRS:
        if question in raw and answer in raw:
            return _pair(raw, question, answer)
    raise Reject("missing columns", f"found: {', '.join(sorted(map(str, raw)))}; expected: question, answer")


def _pair(raw: dict[str, Any], prompt_key: str, answer_key: str) -> dict[str, Any]:
    prompt = _as_messages(_need(raw, prompt_key), "user", prompt_key)
    answer = _as_messages(_need(raw, answer_key), "assistant", answer_key)
    prompt = _with_system(prompt, raw)
    messages = prompt + answer
    _check_order(messages)
    return {"messages": messages, "start": len(prompt)}


def _plain(raw: dict[str, Any]) -> dict[str, Any]:
    return {"text": _text(_need(raw, "text"), "text")}


def _preference(raw: dict[str, Any]) -> dict[str, Any]:
    chosen = _as_messages(_need(raw, "chosen"), "assistant", "chosen")
    rejected = _as_messages(_need(raw, "rejected"), "assistant", "rejected")
    prompt: list[dict[str, Any]] = []
    for key in _PREFERENCE_PROMPTS:
        if raw.get(key) is not None:
            if key == "instruction":
                prompt = _alpaca({**raw, "output": "-"})["messages"][:-1]
            else:
                prompt = _as_messages(raw[key], "user", key)
            break
    # whole conversations in chosen and rejected: what they share is the prompt
    if len(chosen) > 1 or len(rejected) > 1 or not prompt:
        shared = 0
        while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
            shared += 1
        # an identical pair shares everything: leave the last message, the check below names it
        shared = min(shared, len(chosen) - 1, len(rejected) - 1)
        common = chosen[:shared]
        if common and (not prompt or common[-len(prompt) :] == prompt or common == prompt[-len(common) :]):
            prompt = common if len(common) > len(prompt) else prompt
            chosen, rejected = chosen[shared:], rejected[shared:]
        elif common:
            prompt, chosen, rejected = prompt + common, chosen[shared:], rejected[shared:]
    if not prompt:
        raise Reject("empty prompt", "neither a prompt nor a shared beginning of chosen and rejected")
    prompt = _with_system(prompt, raw)
    if chosen == rejected:
        raise Reject("identical chosen and rejected")
    _check_order(prompt + chosen)
    _check_order(prompt + rejected)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


_CONVERTERS = {
    "messages": _messages_format,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
    "question_answer": _question_answer,
    "text": _plain,
    "preference": _preference,
}


# --- pieces ---------------------------------------------------------------------------------------


def _need(raw: dict[str, Any], key: str) -> Any:
    if key not in raw:
        raise Reject("missing columns", f"found: {', '.join(sorted(map(str, raw)))}; expected: {key}")
    if raw[key] is None:
        raise Reject("null value", f"{key} is null")
    return raw[key]


def _text(value: Any, name: str, *, empty_ok: bool = False) -> str:
    """The value as cleaned text. Numbers and booleans become their text, as JSON writes them."""
    if isinstance(value, float) and not math.isfinite(value):
        value = None
    if isinstance(value, (bool, int, float)):
        value = json.dumps(value)
    elif value is None:
        raise Reject("null value", f"{name} is null")
    elif isinstance(value, list) and value and all(isinstance(p, dict) and p.get("type") == "text" for p in value):
        value = "".join(_text(part.get("text"), name, empty_ok=True) for part in value)
    elif not isinstance(value, str):
        raise Reject("wrong type", f"{name} is a {type(value).__name__}, not text")
    value = clean(value)
    if not empty_ok and not value.strip():
        raise Reject("empty text", f"{name} is empty")
    return value


def _message(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def _as_messages(value: Any, role: str, name: str) -> list[dict[str, Any]]:
    """A string, one message or a list of messages → messages."""
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, list) and value and all(isinstance(m, dict) and ("role" in m or "from" in m) for m in value):
        return _messages(value, name)
    return [_message(role, _text(value, name))]


def _messages(value: Any, name: str) -> list[dict[str, Any]]:
    if isinstance(value, str):  # a csv or a parquet column may hold the list as JSON
        try:
            value = json.loads(value)
        except ValueError:
            raise Reject("wrong type", f"{name} is text, not a list of messages") from None
    if not isinstance(value, list):
        raise Reject("wrong type", f"{name} is a {type(value).__name__}, not a list of messages")
    if not value:
        raise Reject("empty text", f"{name} holds no message")
    result: list[dict[str, Any]] = []
    for number, item in enumerate(value):
        if not isinstance(item, dict):
            raise Reject("wrong type", f"message {number} of {name} is a {type(item).__name__}, not an object")
        said = item.get("role", item.get("from"))
        role = ROLES.get(said.lower()) if isinstance(said, str) else None
        if role is None:
            raise Reject("unknown role", f"{said!r} in message {number} of {name}")
        content = item["content"] if "content" in item else item.get("value")
        message: dict[str, Any] = {}
        if role == "function_call":
            message = {"role": "assistant", "content": "", "tool_calls": _call(content)}
        else:
            calls = item.get("tool_calls") if role == "assistant" else None
            has_calls = isinstance(calls, list) and bool(calls)
            if content is None and has_calls:
                content = ""
            # tools may return nothing and a system prompt may be left empty; people and models must say
            # something
            text = _text(content, f"message {number} of {name}", empty_ok=has_calls or role in ("tool", "system"))
            if role == "system" and not text.strip():
                continue
            message = _message(role, text)
            if has_calls:
                message["tool_calls"] = _plain_json(calls)
            for key in ("reasoning_content", "thinking", "name", "tool_call_id"):
                if isinstance(item.get(key), str):
                    message[key] = clean(item[key])
        result.append(message)
    if not result:
        raise Reject("empty text", f"{name} holds no message with text")
    return result


def _plain_json(value: Any) -> Any:
    """Without the nulls that parquet puts into structs, texts cleaned."""
    if isinstance(value, dict):
        return {str(k): _plain_json(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_plain_json(v) for v in value]
    return clean(value) if isinstance(value, str) else value


def _call(content: Any) -> list[dict[str, Any]]:
    """ShareGPT's function_call turn: JSON with name and arguments, or a list of them."""
    try:
        calls = json.loads(content) if isinstance(content, str) else content
    except ValueError:
        raise Reject("wrong type", "a function_call turn is not JSON") from None
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(c, dict) and isinstance(c.get("name"), str) for c in calls):
        raise Reject("wrong type", "a function_call turn has no name")
    return [{"type": "function", "function": _plain_json(call)} for call in calls]


def _tools(value: Any) -> list[Any] | None:
    if isinstance(value, str):
        if not value.strip():
            return None
        try:
            value = json.loads(value)
        except ValueError:
            raise Reject("wrong type", "tools is not JSON") from None
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise Reject("wrong type", "tools is not a list of objects")
    return list(_plain_json(value))


def _with_system(messages: list[dict[str, Any]], raw: dict[str, Any]) -> list[dict[str, Any]]:
    system = raw.get("system")
    if system is None:
        return messages
    text = _text(system, "system", empty_ok=True)
    if not text.strip() or messages[0]["role"] == "system":
        return messages
    return [_message("system", text), *messages]


_BEFORE = {
    "system": ("start",),
    "user": ("start", "system", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


def _check_order(messages: list[dict[str, Any]]) -> None:
    """[system] user assistant …, tool results only after an assistant's turn, an assistant's turn at the
    end."""
    before = "start"
    for number, message in enumerate(messages):
        role = message["role"]
        if before not in _BEFORE[role]:
            raise Reject("roles out of order", f"message {number}: {role} after {before}")
        before = role
    if before != "assistant":
        raise Reject("no answer at the end", f"the last message is the {before}'s")


def _after_last_user(messages: list[dict[str, Any]]) -> int:
    return max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1) + 1
