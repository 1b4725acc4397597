"""Chat templates: a conversation → its text, and where in that text every assistant turn lies.

A template says nothing of where a turn begins and ends unless it has `{% generation %}` tags, so the places
are found in one of three ways, each verified against the text that the template really renders:
 1. the template's own `{% generation %}` tags;
 2. a skeleton: the template is rendered once per pattern of roles with marks in place of the contents;
    filled with a row's contents it must equal that row's rendering, character for character. Where the template
    asks nothing of contents (`opaque.py`) it does so for every row, and only the first of a pattern is rendered;
 3. prefixes: what the template renders for the messages before a turn must be the beginning of the whole.
    When none is exact, `Unsegmentable` is raised: no training on tokens that are only probably the answer's.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftdist.data.formats import Reject
from ftdist.data.opaque import is_opaque
from ftdist.errors import UserError

Span = tuple[int, int]

# used when the tokenizer has no template and none is named; plain words, so that any vocabulary can say it
DEFAULT = """\
{%- if tools %}{{ '### Tools:\\n' + (tools | tojson) + '\\n\\n' }}{% endif -%}
{%- for message in messages -%}
{%- if message.role == 'system' %}{{ '### System:\\n' + message.content + '\\n\\n' }}
{%- elif message.role == 'user' %}{{ '### User:\\n' + message.content + '\\n\\n' }}
{%- elif message.role == 'tool' %}{{ '### Tool result:\\n' + message.content + '\\n\\n' }}
{%- else %}{{ '### Assistant:\\n' + message.content }}
{%- if message.tool_calls %}{{ '### Tool calls:\\n' + (message.tool_calls | tojson) }}{% endif %}
{{- eos_token + '\\n\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif -%}
"""

CHATML = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}
"""

ALPACA = """\
{%- for message in messages -%}
{%- if message.role == 'system' %}{{ message.content + '\\n\\n' }}
{%- elif message.role == 'user' %}{{ '### Instruction:\\n' + message.content + '\\n\\n' }}
{%- else %}{{ '### Response:\\n' + message.content + eos_token + '\\n\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '### Response:\\n' }}{% endif -%}
"""

# prompt and completion as they are, one after the other: for base models and data that carry their own markup
PLAIN = """\
{%- for message in messages -%}
{{- message.content -}}
{%- if message.role == 'assistant' %}{{ eos_token }}{% endif -%}
{%- endfor -%}
"""

NAMED = {"default": DEFAULT, "chatml": CHATML, "alpaca": ALPACA, "plain": PLAIN}


# The patterns of roles that nearly all rows have: the whole, and what the model is asked with
_ORDINARY = (("user",), ("user", "assistant"), ("system", "user"), ("system", "user", "assistant"))
_AWKWARD = "words\n\n{{ 'text' }} <b>&amp;</b> \u06a9\u200c \n"  # a content that shows whether it is left as it is


class Unsegmentable(Exception):
    """The template's text can't be divided exactly into turns."""


def choose(named: str, *, tokenizer_template: Any, adds_bos: bool) -> tuple[str, str]:
    """(template text, where it is from) for `data.chat_template`.

    `named` is "tokenizer" (its own, or the default one when it has none), a name in NAMED, a name among the
    tokenizer's several templates, or a file. UserError when it is none of these.
    """
    own = tokenizer_template if isinstance(tokenizer_template, dict) else {}
    if isinstance(tokenizer_template, str):
        own = {"default": tokenizer_template}
    bos = "{{- bos_token -}}\n" if adds_bos else ""
    if named == "tokenizer":
        if "default" in own:
            return own["default"], "the tokenizer's own"
        return bos + DEFAULT, "ftdist's default, because the tokenizer has none"
    if named in NAMED:
        return bos + NAMED[named], f"ftdist's {named}"
    if named in own:
        return own[named], f"the tokenizer's {named}"
    path = Path(named).expanduser()
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8"), str(path)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"data.chat_template={named}: cannot be read ({error}); give a text file") from None
    names = sorted({"tokenizer", *NAMED, *own})
    raise UserError(f"data.chat_template={named}: neither a file nor one of {', '.join(names)}; give one of them")


@dataclass(frozen=True)
class _Skeleton:
    """A rendering with a hole for each message: pieces[0] hole pieces[1] hole … Hole k is filled by message
    `order[k]`, trimmed as `trims[k]` says (left, right)."""

    pieces: tuple[str, ...]
    order: tuple[int, ...]
    trims: tuple[tuple[bool, bool], ...]


@dataclass(frozen=True)
class Closing:
    """What ends an assistant's turn: `text` from the content's end on, `special` when it ends with a
    special token."""

    text: str
    special: str | None


class Template:
    """A chat template with the tokens and the keywords that it sees."""

    def __init__(
        self,
        text: str,
        *,
        tokens: dict[str, str],
        specials: list[str],
        keywords: dict[str, Any],
        known: dict[str, Any] | None = None,
    ) -> None:
        """known: what `learn` of the same template gave."""
        self.text = text
        self._variables = {**tokens, **keywords}
        self._tagged = re.search(r"\{%-?\s*generation\s*-?%\}", text) is not None
        self._skeletons: dict[tuple[tuple[str, ...], bool], _Skeleton | None] = {}
        self._opaque: bool | None = None  # found out at the first rendering
        words = sorted((s for s in specials if s.strip()), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, words)) or r"(?!)")
        self._ends_special = re.compile(rf"(?:{self._special.pattern})\Z")
        if known is None:
            self._header = self._find_header()
            self.closing = self._find_closing()
            return
        self._opaque, self._header, self.closing = known["opaque"], known["header"], Closing(*known["closing"])
        for roles, prompt, pieces, order, trims in known["skeletons"]:
            made = _Skeleton(tuple(pieces), tuple(order), tuple((left, right) for left, right in trims))
            self._skeletons[tuple(roles), prompt] = made

    def learn(self) -> dict[str, Any]:
        """What is known of the template when ordinary conversations have been rendered, as JSON holds it.

        Where the template is opaque, a process that is given this renders such rows without importing transformers.
        """
        for roles in _ORDINARY:
            messages = [{"role": role, "content": f" {role}'s {_AWKWARD}"} for role in roles]
            with suppress(Reject):  # no system prompts, say
                self.render(messages, None, prompt=roles[-1] == "user")
        usable = self._skeletons if self._opaque else {}
        return {
            "opaque": self._opaque,
            "header": self._header,
            "closing": [self.closing.text, self.closing.special],
            "skeletons": [[*key, s.pieces, s.order, s.trims] for key, s in usable.items() if s is not None],
        }

    # --- rendering

    def render(self, messages: list[dict[str, Any]], tools: list[Any] | None, *, prompt: bool = False) -> str:
        """The text; with `prompt` it ends where the assistant is to go on. Reject when the template
        refuses."""
        filled = self._known(messages, tools, prompt=prompt)
        return "".join(filled[1]) if filled else self._render(messages, tools, prompt=prompt, tags=False)[0]

    def _known(
        self, messages: list[dict[str, Any]], tools: list[Any] | None, *, prompt: bool
    ) -> tuple[_Skeleton, list[str]] | None:
        """The skeleton and its parts where they are the rendering beyond doubt: the template asks nothing of contents,
        and the first row of this pattern was compared."""
        if self._opaque is None:
            self._opaque = is_opaque(self._tree())
        if not self._opaque:
            return None
        known = len(self._skeletons)
        filled = self._filled(messages, tools, prompt=prompt)
        if filled is None:
            return None
        for message in messages:
            if not message["content"] or message["content"].isspace():
                return None
        if len(self._skeletons) != known and (
            self._render(messages, tools, prompt=prompt, tags=False)[0] != "".join(filled[1])
        ):
            self._opaque = False  # never seen
            return None
        return filled

    def _tree(self) -> Any:
        import jinja2
        from transformers.utils.chat_template_utils import _compile_jinja_template

        try:
            return _compile_jinja_template(self.text).environment.parse(self.text)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"data.chat_template: not a valid Jinja template ({error}); repair it") from None

    def _render(
        self, messages: list[dict[str, Any]], tools: list[Any] | None, *, prompt: bool, tags: bool
    ) -> tuple[str, list[Span]]:
        import jinja2
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered: Any = render_jinja_template(
                conversations=[messages],
                tools=tools,
                chat_template=self.text,
                add_generation_prompt=prompt,
                return_assistant_tokens_mask=tags,
                **self._variables,
            )
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"data.chat_template: not a valid Jinja template ({error}); repair it") from None
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
            raise Reject("template refuses the row", str(error)) from None
        texts, spans = rendered
        return texts[0], spans[0] if tags else []

    def check_texts(self, messages: list[dict[str, Any]]) -> None:
        """Reject a row whose text would be read as a special token: it could end a turn in the middle of
        an answer."""
        for message in messages:
            found = self._special.search(message["content"])
            if found:
                raise Reject("holds a special token", f"{found.group()!r} in a {message['role']} message")

    def _find_closing(self) -> Closing:
        mark = "\ue000answer\ue001"
        probe = [{"role": "user", "content": "question"}, {"role": "assistant", "content": mark}]
        try:
            text = self.render(probe, None)
        except Reject as error:
            raise UserError(f"data.chat_template: fails on a plain question and answer ({error.detail})") from None
        if text.count(mark) != 1:
            raise UserError("data.chat_template: does not show the assistant's content once; choose another template")
        suffix = text[text.index(mark) + len(mark) :]
        special = self._special.search(suffix)
        if special:
            return Closing(suffix[: special.end()], special.group())
        return Closing(suffix.rstrip(), None)

    # --- places

    def segment(self, messages: list[dict[str, Any]], tools: list[Any] | None) -> tuple[str, list[Span]]:
        """(text, the span of each assistant message with what ends it). Raises Reject or Unsegmentable."""
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        if self._tagged:
            text, spans = self._render(messages, tools, prompt=False, tags=True)
            if len(spans) != len(turns):
                raise Unsegmentable(f"{len(spans)} generation blocks for {len(turns)} assistant turns")
            return text, [(start, self._with_closing(text, start, end)) for start, end in spans]
        filled = self._known(messages, tools, prompt=False)
        if filled is None:
            text = self._render(messages, tools, prompt=False, tags=False)[0]
            filled = self._filled(messages, tools, prompt=False)
            if filled is not None and "".join(filled[1]) != text:
                filled = None
        else:
            text = "".join(filled[1])
        found = None if filled is None else self._spans(*filled, turns)
        if found is None:
            found = [self._by_prefix(text, messages, tools, i) for i in turns]
            self._check_complete(text, messages, tools)
        if any(a[1] > b[0] for a, b in zip(found, found[1:], strict=False)):
            raise Unsegmentable("turns overlap")
        return text, found

    def ends_special(self, text: str, span: Span) -> bool:
        """Whether the span's end is a special token, one that the model can stop at."""
        return self._ends_special.search(text, span[0], span[1]) is not None

    def _with_closing(self, text: str, start: int, end: int) -> int:
        inside = text[start:end].rstrip()
        if self.closing.text and inside.endswith(self.closing.text):
            return start + len(inside)
        return end + len(self.closing.text) if text.startswith(self.closing.text, end) else end

    def _spans(self, skeleton: _Skeleton, parts: list[str], turns: list[int]) -> list[Span]:
        spans, at = [], 0
        for number, part in enumerate(parts):
            if number % 2 and skeleton.order[number // 2] in turns:
                # what the template puts between the generation prompt and the answer is the model's to say
                # as well
                before = parts[number - 1]
                found = before.rfind(self._header) if self._header else -1
                start = at - (len(before) - found - len(self._header)) if found >= 0 else at
                end = at + len(part)
                after = parts[number + 1]
                spans.append((start, end + len(self.closing.text) if after.startswith(self.closing.text) else end))
            at += len(part)
        return spans

    def _filled(
        self, messages: list[dict[str, Any]], tools: list[Any] | None, *, prompt: bool
    ) -> tuple[_Skeleton, list[str]] | None:
        """The skeleton of these roles, and its pieces with the contents between them."""
        if tools:
            return None
        for message in messages:
            if len(message) != 2:  # tool calls and the like: more than a content
                return None
        key = (tuple([message["role"] for message in messages]), prompt)
        if key not in self._skeletons:
            if len(self._skeletons) >= 512:
                self._skeletons.clear()
            self._skeletons[key] = self._make_skeleton(*key)
        skeleton = self._skeletons[key]
        if skeleton is None:
            return None
        parts = [skeleton.pieces[0]]
        for index, (left, right), piece in zip(skeleton.order, skeleton.trims, skeleton.pieces[1:], strict=True):
            content = messages[index]["content"]
            content = content.lstrip() if left else content
            parts += [content.rstrip() if right else content, piece]
        return skeleton, parts

    def _make_skeleton(self, roles: tuple[str, ...], prompt: bool) -> _Skeleton | None:
        marks = [f"\ue000{i}\ue001" for i in range(len(roles))]
        pad = "\u2003"  # white space that no template writes: where it is gone, the template trims
        try:
            bare, padded = (
                self._render(
                    [{"role": r, "content": f"{p}{m}{p}"} for r, m in zip(roles, marks, strict=True)],
                    None,
                    prompt=prompt,
                    tags=False,
                )[0]
                for p in ("", pad)
            )
        except Reject:
            return None
        if any(bare.count(mark) != 1 or padded.count(mark) != 1 for mark in marks):
            return None
        order = sorted(range(len(marks)), key=lambda i: bare.index(marks[i]))
        pieces, trims, at = [], [], 0
        for index in order:
            mark = marks[index]
            place = bare.index(mark)
            pieces.append(bare[at:place])
            at = place + len(mark)
            trims.append((f"{pad}{mark}" not in padded, f"{mark}{pad}" not in padded))
        return _Skeleton((*pieces, bare[at:]), tuple(order), tuple(trims))

    def _find_header(self) -> str:
        """What the generation prompt adds to a conversation that ends with the user."""
        probe = [{"role": "user", "content": "question"}]
        try:
            bare, asked = self.render(probe, None), self.render(probe, None, prompt=True)
        except Reject:
            return ""
        return asked[len(bare) :] if asked.startswith(bare) else ""

    def _by_prefix(self, text: str, messages: list[dict[str, Any]], tools: list[Any] | None, turn: int) -> Span:
        content = messages[turn]["content"].strip()
        asked = self.render(messages[:turn], tools, prompt=True)
        if text.startswith(asked):
            start = len(asked)
        else:
            # a generation prompt that holds more than history shows ("<think>\n"): begin where the two part
            bare = self.render(messages[:turn], tools)
            common = len(bare)
            if not text.startswith(bare):
                raise Unsegmentable(f"the text before turn {turn} is no beginning of the whole")
            while common < min(len(asked), len(text)) and asked[common] == text[common]:
                common += 1
            place = self._place(text, content, len(bare))
            start = min(common, place[0])
        whole = self.render(messages[: turn + 1], tools)
        if text.startswith(whole):
            region = text[start : len(whole)]
            tail = re.search(rf"(?:\s|{self._special.pattern})*\Z", region)
            assert tail
            first = self._special.search(region, tail.start())
            if first:
                return start, start + first.end()
            return start, start + len(region.rstrip())
        # history is shown otherwise than the last turn (thoughts left out): the content itself must be there
        _, end = self._place(text, content, start)
        return start, end + len(self.closing.text) if text.startswith(self.closing.text, end) else end

    def _place(self, text: str, content: str, at: int) -> Span:
        """Where the answer is shown from `at` on, with no more than a turn's header before it."""
        for shown in (content, content.rsplit("</think>", 1)[-1].strip()):
            place = text.find(shown, at) if shown else -1
            marks = len(self._special.findall(text[at:place])) if place >= 0 else 0
            if place >= 0 and marks <= len(self._special.findall(self._header)):
                return place, place + len(shown)
        raise Unsegmentable("an answer is not in the text as it was given")

    def _check_complete(self, text: str, messages: list[dict[str, Any]], tools: list[Any] | None) -> None:
        for message in messages:
            if message["role"] in ("user", "system") and message["content"].strip() not in text:
                raise Reject("template drops a message", f"a {message['role']} message is not in the text")
            for call in message.get("tool_calls", ()):
                name = call.get("function", call).get("name")
                if isinstance(name, str) and name not in text:
                    raise Reject("template drops tools", f"the call of {name} is not in the text")
        for tool in tools or ():
            name = tool.get("function", tool).get("name") if isinstance(tool, dict) else None
            if isinstance(name, str) and name not in text:
                raise Reject("template drops tools", f"the tool {name} is not in the text")
