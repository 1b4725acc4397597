"""Which tokens are trained on, under templates as they are in use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_help import CHATML, build_tokenizer

from ftdist.data.formats import Reject
from ftdist.data.template import NAMED, Unsegmentable
from ftdist.data.tokens import Frozen, freeze_tokenizer, lay_out, load_frozen, pair_tokens, tokenize
from ftdist.errors import UserError

LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
PHI3 = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'] + "
    "'<|end|>\n'}}{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] + eos_token}}{% endif %}{% endfor %}"
)
# the system prompt goes to the last question: the text before a turn is no beginning of the whole
MISTRAL_V3 = (
    "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}{%- set rest = messages[1:] %}"
    "{%- else %}{%- set rest = messages %}{%- endif %}{{- bos_token }}{%- for message in rest %}"
    "{%- if message['role'] == 'user' %}{%- if loop.index0 == rest | length - 2 and system is defined %}"
    "{{- '[INST] ' + system + '\n\n' + message['content'] + '[/INST]' }}{%- else %}"
    "{{- '[INST] ' + message['content'] + '[/INST]' }}{%- endif %}{%- else %}"
    "{{- ' ' + message['content'] + eos_token }}{%- endif %}{%- endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | "
    "trim + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
# thoughts are shown in the last turn only, and an empty thought is put there when there is none (as Qwen3 does)
QWEN3 = (
    "{%- set ns = namespace(last=0) %}{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 "
    "%}{%- endif %}{%- endfor %}{%- for m in messages %}{%- if m.role == 'assistant' %}{%- set c = m.content %}"
    "{%- set r = '' %}{%- if '</think>' in c %}{%- set r = c.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{%- set c = c.split('</think>')[-1].lstrip('\n') %}{%- endif %}{%- if loop.index0 > ns.last %}"
    "{{- '<|im_start|>assistant\n<think>\n' + r + '\n</think>\n\n' + c + '<|im_end|>\n' }}{%- else %}"
    "{{- '<|im_start|>assistant\n' + c + '<|im_end|>\n' }}{%- endif %}{%- else %}"
    "{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
# the generation prompt opens a thought that history does not show (as DeepSeek-R1's distillations do)
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|user|>' + m.content }}{% else %}"
    "{% set c = m.content %}{% if '</think>' in c %}{% set c = c.split('</think>')[-1] %}{% endif %}"
    "{{ '<|assistant|>' + c + eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|assistant|><think>\n' }}{% endif %}"
)
GENERATION = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}\n{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS = (
    "{%- if tools %}{{- '<|im_start|>system\n' }}{%- for tool in tools %}{{- tool | tojson }}{%- endfor %}"
    "{{- '<|im_end|>\n' }}{%- endif %}{%- for m in messages %}{%- if m.role == 'assistant' %}"
    "{{- '<|im_start|>assistant\n' }}{%- if m.content %}{{- m.content }}{%- endif %}"
    "{%- for call in m.tool_calls or [] %}"
    "{{- '<tool_call>' + (call.function | tojson) + '</tool_call>' }}{%- endfor %}{{- '<|im_end|>\n' }}{%- else %}"
    "{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)

ONE = [("user", "alpha bravo?"), ("assistant", "charlie delta.")]
TWO = [*ONE, ("user", "  echo\nfoxtrot "), ("assistant", "golf\n\nhotel")]
SYSTEM = [("system", "kilo lima"), *TWO]


def chat(*turns: tuple[str, str]) -> dict[str, Any]:
    messages = [{"role": role, "content": content} for role, content in turns]
    start = max(i for i, m in enumerate(messages) if m["role"] == "user") + 1
    return {"messages": messages, "start": start, "tools": None, "id": None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("templates")


_made: dict[Any, Frozen] = {}


def frozen(folder: Path, template: str | None, eos: str = "</s>", named: str = "tokenizer") -> Frozen:
    key = (template, eos, named)
    if key not in _made:
        own = folder / str(len(_made))
        build_tokenizer(own / "tokenizer", template, eos)
        freeze_tokenizer(
            str(own / "tokenizer"),
            revision=None,
            trust_remote_code=False,
            chat_template=named,
            keywords={},
            to=own / "frozen",
        )
        _made[key] = load_frozen(own / "frozen")
    return _made[key]


def trained(frozen: Frozen, row: dict[str, Any], mask: str = "auto") -> list[str]:
    """The runs of trained tokens, as text."""
    ids, marks = tokenize([lay_out(row, frozen.template, mask)], frozen)[0]
    runs, current = [], []
    for token, mark in zip(ids.tolist(), marks.tolist(), strict=True):
        if mark:
            current.append(token)
        elif current:
            runs.append(frozen.tokenizer.decode(current, skip_special_tokens=False))
            current = []
    if current:
        runs.append(frozen.tokenizer.decode(current, skip_special_tokens=False))
    return runs


CASES = {
    "chatml": (CHATML, "<|im_end|>", "<|im_end|>"),
    "llama3": (LLAMA3, "<|eot_id|>", "<|eot_id|>"),
    "phi3": (PHI3, "</s>", "<|end|>"),
    "gemma": (GEMMA, "</s>", "<end_of_turn>"),
    "generation": (GENERATION, "<|im_end|>", "<|im_end|>"),
    "r1": (R1, "</s>", "</s>"),
    "default": (None, "</s>", "</s>"),
}


@pytest.mark.parametrize("name", CASES)
def test_each_answer_with_one_end_is_trained_on(folder: Path, name: str) -> None:
    template, eos, end = CASES[name]
    f = frozen(folder, template, eos)
    assert trained(f, chat(*ONE)) == [f"charlie delta.{end}"]
    assert trained(f, chat(*TWO)) == [f"charlie delta.{end}", f"golf\n\nhotel{end}"]
    assert trained(f, chat(*TWO), "last") == [f"golf\n\nhotel{end}"]
    if name not in ("gemma", "r1"):
        assert trained(f, chat(*SYSTEM)) == [f"charlie delta.{end}", f"golf\n\nhotel{end}"]


def test_leading_space_of_an_answer_belongs_to_it(folder: Path) -> None:
    f = frozen(folder, MISTRAL)
    assert trained(f, chat(*TWO)) == [" charlie delta.</s>", " golf\n\nhotel</s>"]


def test_system_prompt_that_moves_to_the_last_question(folder: Path) -> None:
    f = frozen(folder, MISTRAL_V3)
    assert [t.strip() for t in trained(f, chat(*SYSTEM))] == ["charlie delta.</s>", "golf\n\nhotel</s>"]


def test_thoughts_are_trained_on_where_the_template_shows_them(folder: Path) -> None:
    f = frozen(folder, QWEN3, "<|im_end|>")
    assert trained(f, chat(*TWO)) == ["charlie delta.<|im_end|>", "<think>\n\n</think>\n\ngolf\n\nhotel<|im_end|>"]
    thinking = [("user", "a"), ("assistant", "<think>\nkilo\n</think>\n\nlima"), *TWO]
    assert trained(f, chat(*thinking))[0] == "lima<|im_end|>"
    last = [*ONE, ("user", "a"), ("assistant", "<think>\nkilo\n</think>\n\nlima")]
    assert trained(f, chat(*last)) == ["charlie delta.<|im_end|>", "<think>\nkilo\n</think>\n\nlima<|im_end|>"]


def test_generation_prompt_with_more_than_history_shows(folder: Path) -> None:
    f = frozen(folder, R1)
    row = chat(*ONE, ("user", "x"), ("assistant", "<think>\nkilo</think>lima"))
    assert trained(f, row) == ["charlie delta.</s>", "lima</s>"]


def test_template_that_shows_history_otherwise_stops(folder: Path) -> None:
    shouted = CHATML.replace("message['content']", "(message['content'] if loop.last else message['content'] | upper)")
    f = frozen(folder, shouted, "<|im_end|>")
    with pytest.raises(Unsegmentable):
        trained(f, chat(*[(role, content.upper() if role == "user" else content) for role, content in TWO]))


def test_end_mark_that_is_no_special_token_is_followed_by_eos(folder: Path) -> None:
    template = CHATML.replace("<|im_end|>", "@@end")
    f = frozen(folder, template)
    assert trained(f, chat(*TWO)) == ["charlie delta.@@end", "golf\n\nhotel@@end</s>"]


def test_template_without_any_end_gets_eos_once_at_the_end(folder: Path) -> None:
    f = frozen(folder, "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}")
    assert trained(f, chat(*TWO))[-1].strip() == "golf\n\nhotel</s>"
    ids, marks = tokenize([lay_out(chat(*TWO), f.template, "all")], f)[0]
    assert (ids == f.eos).sum() == 1 and ids[-1] == f.eos and marks[-1] and not marks[0] and marks[1:].all()


def test_completion_is_what_follows_the_last_question(folder: Path) -> None:
    f = frozen(folder, TOOLS, "<|im_end|>")
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "lima"}}}
    row = chat(*ONE, ("user", "golf"), ("assistant", ""), ("tool", "rain"), ("assistant", "It rains."))
    row["messages"][3]["tool_calls"] = [call]
    row["tools"] = [{"type": "function", "function": {"name": "weather"}}]
    called = '<tool_call>{"name": "weather", "arguments": {"city": "lima"}}</tool_call><|im_end|>'
    assert trained(f, row) == ["charlie delta.<|im_end|>", called, "It rains.<|im_end|>"]
    assert trained(f, row, "completion") == [called, "It rains.<|im_end|>"]
    assert trained(f, row, "last") == ["It rains.<|im_end|>"]


def test_template_that_drops_tools_refuses_the_row(folder: Path) -> None:
    f = frozen(folder, CHATML, "<|im_end|>")
    row = chat(*ONE) | {"tools": [{"type": "function", "function": {"name": "weather"}}]}
    with pytest.raises(Reject, match="template drops tools"):
        trained(f, row)


def test_system_prompt_that_the_template_refuses_is_a_reject(folder: Path) -> None:
    with pytest.raises(Reject, match="System role not supported"):
        trained(frozen(folder, GEMMA), chat(*SYSTEM))


def test_special_token_as_text_is_a_reject(folder: Path) -> None:
    with pytest.raises(Reject, match="holds a special token"):
        trained(frozen(folder, CHATML, "<|im_end|>"), chat(("user", "say <|im_end|>"), ("assistant", "no")))


@pytest.mark.parametrize("named", sorted(NAMED))
def test_named_templates(folder: Path, named: str) -> None:
    f = frozen(folder, CHATML, "<|im_end|>", named)
    assert [t.strip() for t in trained(f, chat(*TWO))] == ["charlie delta.<|im_end|>", "golf\n\nhotel<|im_end|>"]


def test_plain_template_is_prompt_and_completion_as_they_are(folder: Path) -> None:
    f = frozen(folder, None, named="plain")
    laid = lay_out(chat(("user", "Q: alpha\nA:"), ("assistant", " bravo")), f.template, "auto")
    assert laid.text == "Q: alpha\nA: bravo</s>" and laid.text[slice(*laid.spans[0])] == " bravo</s>"


def test_unknown_template_name_lists_the_known(folder: Path) -> None:
    with pytest.raises(UserError, match=r"data.chat_template=nope: .*chatml.*"):
        frozen(folder, CHATML, named="nope")


def test_plain_text_is_trained_on_whole_and_ends_once(folder: Path) -> None:
    f = frozen(folder, None)
    ids, marks = tokenize([lay_out({"text": "alpha bravo"}, f.template, "auto")], f)[0]
    assert f.tokenizer.decode(ids.tolist(), skip_special_tokens=False) == "alpha bravo</s>"
    assert marks.tolist() == [False] + [True] * (len(ids) - 1)
    with pytest.raises(Reject, match="no supervised token"):
        lay_out({"text": "alpha"}, f.template, "assistant")


@pytest.mark.parametrize("name", CASES)
def test_tokens_are_those_of_apply_chat_template(folder: Path, name: str, tmp_path: Path) -> None:
    template, eos, _ = CASES[name]
    f = frozen(folder, template, eos)
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(build_tokenizer(tmp_path, f.template.text, eos))
    row = chat(*TWO)
    want = theirs.apply_chat_template(row["messages"], tokenize=True, return_dict=True)["input_ids"]
    ids, _ = tokenize([lay_out(row, f.template, "auto")], f)[0]
    assert ids.tolist() == want


@pytest.mark.parametrize("name", CASES)
def test_preference_prompt_and_answers(folder: Path, name: str) -> None:
    template, eos, end = CASES[name]
    f = frozen(folder, template, eos)
    messages = chat(*TWO)["messages"]
    row = {
        "prompt": messages[:3],
        "chosen": [messages[3]],
        "rejected": [{"role": "assistant", "content": "golf no"}],
        "tools": None,
        "id": None,
    }
    prompt, chosen, rejected = pair_tokens(row, f)
    decode = lambda ids: f.tokenizer.decode(ids.tolist(), skip_special_tokens=False)  # noqa: E731
    assert decode(chosen) == f"golf\n\nhotel{end}" and decode(rejected) == f"golf no{end}"
    joint = f.template.segment(messages, None)
    text = joint[0][: joint[1][-1][1]]
    assert np.concatenate([prompt, chosen]).tolist() == f.tokenizer.encode(text, add_special_tokens=False).ids
