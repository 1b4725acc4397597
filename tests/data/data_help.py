"""A small tokenizer, made-up sentences, and reading what was prepared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

DEFAULTS = yaml.safe_load((Path(__file__).parents[2] / "conf" / "data" / "default.yaml").read_text())

SPECIALS = [
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "[INST]",
    "[/INST]",
]

WORDS = [
    "alpha",
    "bravo",
    "charlie",
    "delta",
    "echo",
    "foxtrot",
    "golf",
    "hotel",
    "india",
    "juliet",
    "kilo",
    "lima",
    "mike",
    "november",
    "oscar",
    "papa",
    "quebec",
    "romeo",
    "sierra",
    "tango",
    "uniform",
    "victor",
    "whiskey",
    "xray",
    "yankee",
    "zulu",
    "river",
    "mountain",
    "lake",
    "forest",
    "window",
    "table",
    "chair",
    "garden",
]


def sentence(seed: int, words: int) -> str:
    """Words that differ for every seed."""
    state = seed * 7919 + 17
    chosen = []
    for _ in range(words):
        state = (state * 6364136223846793005 + 1442695040888963407) % (1 << 64)
        chosen.append(WORDS[(state >> 33) % len(WORDS)])
    return " ".join(chosen)


def build_tokenizer(folder: Path, template: str | None, eos: str = "</s>") -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([sentence(i, 30) for i in range(50)] + ["user assistant system model"] * 5, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token=eos, pad_token="<s>")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + "
    "'\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def pair(i: int, words: int = 20) -> dict[str, str]:
    return {"question": sentence(2 * i, words), "answer": sentence(2 * i + 1, words)}


def read_report(prepared: Path) -> dict[str, Any]:
    return json.loads((prepared / "data_report.json").read_text(encoding="utf-8"))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
