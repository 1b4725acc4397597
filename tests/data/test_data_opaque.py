"""Shortcuts that must change nothing: a template rendered once a pattern, spans by spelling, sorting in pieces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_help import CHATML, build_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data_template import GEMMA, LLAMA3, MISTRAL, MISTRAL_V3, PHI3, QWEN3

from ftdist.data import column, tokens
from ftdist.data.duplicates import exact
from ftdist.data.formats import Reject
from ftdist.data.template import NAMED, Template

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
OPAQUE = {"llama3": LLAMA3, "phi3": PHI3, "mistral": MISTRAL, "mistral_v3": MISTRAL_V3, "gemma": GEMMA, **NAMED}
EACH = "{% for m in messages %}"
ASKING = {
    "qwen3": QWEN3,
    "length": EACH + "{{ m.content | length }}{{ m.content }}{% endfor %}",
    "upper": EACH + "{{ m.content | upper }}{% endfor %}",
    "compares": EACH + "{{ '!' if m.content == 'yes' }}{{ m.content }}{% endfor %}",
    "contains": EACH + "{% if 'x' in m.content %}!{% endif %}{{ m.content }}{% endfor %}",
    "through a variable": "{% set s = messages[0].content %}{% if s > 'k' %}!{% endif %}" + CHATML,
    "through a namespace": "{% set n = namespace(s='') %}" + EACH + "{% set n.s = m.content %}{% endfor %}{{ n.s[0] }}",
    "previous": EACH + "{% if loop.previtem.content == 'a' %}!{% endif %}{{ m.content }}{% endfor %}",
    "whole": "{{ messages | tojson }}",
    "values": EACH + "{% for v in m.values() %}{{ v | first }}{% endfor %}{% endfor %}",
    "letters": EACH + "{% for c in m.content %}{{ c }} {% endfor %}{% endfor %}",
    "sorted": "{% for m in messages | sort(attribute='content') %}{{ m.content }}{% endfor %}",
    "macro": "{% macro f(x) %}{{ x | upper }}{% endmacro %}" + EACH + "{{ f(m.content) }}{% endfor %}",
    "set block": EACH + "{% set s %}{{ m.content }}{% endset %}{{ s | length }}{% endfor %}",
    "late": EACH
    + "{% if kept is defined and kept == 'a' %}!{% endif %}{% set kept = m.content %}{{ kept }}{% endfor %}",
    "index": EACH + "{{ m['content'][:3] }}{% endfor %}",
    "format": EACH + "{{ '%s' | format(m.content) }}{% endfor %}",
    "method": EACH + "{{ m.content.replace('a', 'b') }}{% endfor %}",
}


def template(text: str) -> Template:
    return Template(text, tokens=TOKENS, specials=["<|im_end|>", "</s>", "<|eot_id|>"], keywords={})


def conversation(contents: list[str]) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


@pytest.mark.parametrize("name", ASKING)
def test_a_template_that_asks_something_of_a_content_is_rendered_each_time(name: str) -> None:
    try:
        made = template(ASKING[name])
    except Exception:  # no chat template at all: what counts is how it is read
        made = template(CHATML)
        made.text = ASKING[name]
    assert not tokens_opaque(made)


def tokens_opaque(made: Template) -> bool:
    from ftdist.data.opaque import is_opaque

    return is_opaque(made._tree())


contents = st.text(st.sampled_from("abé 中\n\t\u2003'\"{}%<>|&\u200c😀"), min_size=0, max_size=12)


@pytest.mark.parametrize("name", OPAQUE)
def test_a_template_that_asks_nothing_gives_the_same_text(name: str) -> None:
    made = template(OPAQUE[name])
    assert tokens_opaque(made)
    renderings: list[int] = []
    inner = made._render

    def counted(*given: Any, **keywords: Any) -> Any:
        renderings.append(1)
        return inner(*given, **keywords)

    made._render = counted  # type: ignore[method-assign]  # wrapped to count its calls

    @settings(max_examples=60, deadline=None)
    @given(st.lists(contents, min_size=2, max_size=4).filter(lambda c: len(c) % 2 == 0))
    def same(texts: list[str]) -> None:
        messages = conversation(texts)
        for prompt in (False, True):
            shown = messages[:-1] if prompt else messages
            try:
                expected = inner(shown, None, prompt=prompt, tags=False)[0]
            except Reject:
                continue
            assert made.render(shown, None, prompt=prompt) == expected

    same()
    renderings.clear()
    made.render(conversation(["new question", "new answer"]), None)
    assert not renderings


@pytest.mark.parametrize("name", [*OPAQUE, "qwen3"])
def test_what_one_process_learns_another_need_not_render(name: str) -> None:
    """Through JSON, as it goes to the processes; templates that ask something are rendered there all the same."""
    text = OPAQUE.get(name, QWEN3)
    learnt = template(text).learn()
    fresh = template(text)
    given = {"tokens": TOKENS, "specials": ["<|im_end|>", "</s>", "<|eot_id|>"], "keywords": {}}
    told = Template(text, known=json.loads(json.dumps(learnt)), **given)
    assert told.closing == fresh.closing and told._header == fresh._header
    renderings: list[int] = []
    inner = told._render

    def counted(*given: Any, **keywords: Any) -> Any:
        renderings.append(1)
        return inner(*given, **keywords)

    told._render = counted  # type: ignore[method-assign]  # wrapped to count its calls
    messages = conversation([" who\u200c is <it>?\n", "  nobody & all "])
    assert told.segment(messages, None) == fresh.segment(messages, None)
    assert told.render(messages[:1], None, prompt=True) == fresh.render(messages[:1], None, prompt=True)
    assert bool(renderings) == (name not in OPAQUE)


def test_a_skeleton_that_would_be_wrong_is_noticed() -> None:
    """Whatever the syntax tree says, the first row of a pattern is rendered and compared."""
    made = template(EACH + "{{ m.content }}{{ '!' if 'q' in m.content }}\n{% endfor %}")
    made._opaque = True
    assert made.render(conversation(["a question", "b"]), None) == "a question!\nb\n"
    assert made._opaque is False


@pytest.fixture(scope="module")
def frozen(tmp_path_factory: pytest.TempPathFactory) -> tokens.Frozen:
    folder = tmp_path_factory.mktemp("spelling")
    build_tokenizer(folder, template=CHATML)
    tokens.freeze_tokenizer(
        str(folder), revision=None, trust_remote_code=False, chat_template="tokenizer", keywords={}, to=folder / "out"
    )
    return tokens.load_frozen(folder / "out")


def test_spans_by_spelling_equal_those_by_offsets(frozen: tokens.Frozen) -> None:
    assert frozen.pieces is not None

    @settings(max_examples=150, deadline=None)
    @given(st.lists(contents.filter(str.strip), min_size=2, max_size=2))
    def same(texts: list[str]) -> None:
        row = {"messages": conversation(texts), "start": 1}
        laid = tokens.lay_out(row, frozen.template, "assistant")
        ((ids, trained),) = tokens.tokenize([laid], frozen)
        slow = tokens.Frozen(frozen.tokenizer, frozen.template, frozen.eos, frozen.bos, None, None)
        ((by_offsets, marks),) = tokens.tokenize([laid], slow)
        assert ids.tolist() == by_offsets.tolist()
        text = laid.text.encode()
        ends = np.cumsum([len(frozen.pieces[i]) for i in ids])  # type: ignore[index]
        assert ends[-1] == len(text)
        # Offsets name only some of the tokens that a letter of several bytes is divided into; otherwise equal.
        assert not (marks & ~trained).any()
        start, end = (len(laid.text[:at].encode()) for at in laid.spans[0])
        assert trained.tolist() == [bool(b > start and a < end) for a, b in zip([0, *ends[:-1]], ends, strict=True)]

    same()


def test_a_wrong_spelling_is_never_used(frozen: tokens.Frozen) -> None:
    assert frozen.pieces is not None and frozen.sizes is not None
    row = {"messages": conversation(["what is it", "it is a river"]), "start": 1}
    laid = tokens.lay_out(row, frozen.template, "assistant")
    ((ids, trained),) = tokens.tokenize([laid], frozen)
    wrong = [b"?" * len(piece) for piece in frozen.pieces]
    other = tokens.Frozen(frozen.tokenizer, frozen.template, frozen.eos, frozen.bos, wrong, frozen.sizes * 0 + 1)
    ((same_ids, same),) = tokens.tokenize([laid], other)
    assert ids.tolist() == same_ids.tolist() and trained.tolist() == same.tolist()


@pytest.mark.parametrize("part", [1 << 17, 4])
def test_duplicates_in_pieces(part: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(column, "PART", part)
    generator = np.random.default_rng(0)
    keys = generator.integers(0, 1 << 63, (40, 2)).astype(np.uint64)[generator.integers(0, 40, 500)]
    alive = generator.random(500) < 0.8
    twins = exact(keys, alive, tmp_path)
    first: dict[bytes, int] = {}
    expected = {}
    for row in np.flatnonzero(alive).tolist():
        earlier = first.setdefault(keys[row].tobytes(), row)
        if earlier != row:
            expected[row] = earlier
    assert dict(zip(twins.later.tolist(), twins.earlier.tolist(), strict=True)) == expected
