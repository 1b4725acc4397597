"""The embedded default of the quickstart: a tiny Llama and a demo instruction set, made from a seed, no network."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROWS = 16000  # before the split; a fifth is held out
HELD_OUT = 400  # more rows in a file of their own, for whoever wants the same ones in several runs
PAIRS = {"train": 1024, "validation": 400}  # of a liked and a disliked answer
HIDDEN, LAYERS, HEADS, INTERMEDIATE = 128, 4, 4, 128  # HIDDEN: a power of two
ROPE_THETA = 50.0  # questions are short: fast rotations tell neighbours apart
STD = 0.02

BOS, EOS, PAD = "<|begin|>", "<|end|>", "<|pad|>"
ROLES = ("system", "user", "assistant", "tool")

# The space before an answer lies inside the supervised part: " oslo" is one token in a question and in an answer.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ ' ' + message['content'] | trim + eos_token }}{% endgeneration %}"
    "{% else %}{{ ' ' + message['content'] | trim }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def _words(text: str) -> list[str]:
    return text.split()


# What the questions talk about. Few words, each seen often: a small model learns them; their combinations never end.
NAMES = _words("""
    Ada Amir Anna Ben Clara Dara Emil Eva Finn Hana Hugo Ivan Jane Kian Leo Maya Nina Omar Rosa Sina Tara
    Tom Vera Zoe
""")
PLACES = _words("""
    Athens Berlin Boston Cairo Delhi Dublin Geneva Havana Kyoto Lima London Madrid Nairobi Oslo Paris Prague
    Quito Rome Seoul Shiraz Sydney Tehran Tokyo Vienna
""")
COLOURS = _words("""
    amber black blue brown coral golden green grey purple red silver white
""")
THINGS = _words("""
    apple bell bird boat book bread bridge button camera candle chair clock cloud coffee desk drum feather
    flower garden glove hammer honey island jacket kite ladder lamp lemon mirror moon needle onion paper
    pencil piano pillow rabbit river rocket rope salad shoe spoon star teapot tiger train umbrella
""")

# Frequent English words, and the first merges of a BPE over the words that are left of English text (Ġ is the space
# before a word): a stranger's text takes about two bytes a token.
ENGLISH = _words("""
    the of and to in is that for it as was with on by at from are this be or an have has had not but they he
    she we you his her their its all one two three four five six more than each how many much what when
    which who will would can could there if then so up out about into some other time day days week weeks
    hour hours year years minutes number total first last second next following word words list name city
    colour thing order after before over every get gets got make makes made use used take takes give gives
    buy buys sell sells cost costs pay paid money dollars cents price half twice times as per left right
    same different old new long people children friends answer question write describe explain comes
    sentence most order reverse capitals
""")
MERGES = _words("""
    i|n e|s e|r Ġ|s e|n Ġ|c o|n Ġ|p a|r e|d a|l Ġ|b a|t a|n in|g Ġ|t Ġ|d r|e Ġ|m Ġ|f o|u o|r Ġ|w l|e Ġ|a i|c
    h|e t|s Ġ|e i|t i|l Ġ|g i|on r|o t|h i|s a|s a|c o|m en|t e|l u|s Ġ|l er|s e|t i|d o|l Ġs|t e|c Ġ|re Ġ|n
    Ġ|h Ġ|r o|w a|y i|v g|h a|m c|e Ġ|in ou|n al|l d|s a|g i|r o|o i|m c|h u|r T|he u|l T|h er|e k|s u|n u|t
    a|in i|es Ġd|o l|y at|ion Ġs|p q|u t|er o|s at|e es|s Ġp|ro i|gh Ġ|v e|ed ou|r a|v Ġc|h Ġc|om p|p an|d
    u|m
""")


# --- skills: each returns (question, answer) -----------------------------------------------------------------------


def first(rng: random.Random) -> tuple[str, str]:
    """The first word of a list."""
    words = rng.sample(THINGS, rng.randint(4, 6))
    question = rng.choice(("{}: which word is first?", "{}: the first word?", "Give the first word of {}"))
    return question.format(" ".join(words)), words[0]


def last(rng: random.Random) -> tuple[str, str]:
    """The last word of a list."""
    words = rng.sample(THINGS, rng.randint(4, 6))
    question = rng.choice(("{}: which word is last?", "{}: the last word?", "Give the last word of {}"))
    return question.format(" ".join(words)), words[-1]


def capitals(rng: random.Random) -> tuple[str, str]:
    """The last word of a list in capital letters."""
    words = rng.sample(THINGS, rng.randint(4, 6))
    question = rng.choice(("{}: the last in capitals?", "{}: last in capitals", "In capitals, the last of {}"))
    return question.format(" ".join(words)), words[-1].upper()


def twice(rng: random.Random) -> tuple[str, str]:
    """The word that occurs twice in a list."""
    words = rng.sample(THINGS, rng.randint(3, 4))
    repeated = rng.choice(words)
    words.insert(rng.randint(0, len(words)), repeated)
    question = rng.choice(("{}: which word is there twice?", "{}: twice?", "Which word is twice in {}"))
    return question.format(" ".join(words)), repeated


def most(rng: random.Random) -> tuple[str, str]:
    """The name with the largest number."""
    names = rng.sample(NAMES, 4)
    numbers = rng.sample(range(10), 4)
    text = ", ".join(f"{name} {number}" for name, number in zip(names, numbers, strict=True))
    question = rng.choice(("{}: who has most?", "{}: most?", "Who has most of {}"))
    return question.format(text), names[numbers.index(max(numbers))]


def _record(rng: random.Random) -> tuple[dict[str, str], str]:
    """Four fields and their text, in any order."""
    words = {"name": NAMES, "city": PLACES, "colour": COLOURS, "thing": THINGS}
    fields = rng.sample(list(words), 4)
    record = {field: rng.choice(words[field]) for field in fields}
    return record, ", ".join(f"{field} {value}" for field, value in record.items())


def extract(rng: random.Random) -> tuple[str, str]:
    """One field of a record."""
    record, text = _record(rng)
    field = rng.choice(list(record))
    question = rng.choice(("{t}: which {f}?", "{t}: the {f}?", "{t}: give the {f}"))
    return question.format(f=field, t=text), record[field]


def sentence(rng: random.Random) -> tuple[str, str]:
    """A record as a sentence."""
    record, text = _record(rng)
    question = rng.choice(("{}: as a sentence?", "{}: write", "Write a sentence from {}"))
    return question.format(text), "{name} has a {colour} {thing} in {city}".format(**record)


SKILLS: tuple[Callable[[random.Random], tuple[str, str]], ...] = (
    first,
    last,
    capitals,
    twice,
    most,
    extract,
    sentence,
)


def rows(seed: int, count: int = ROWS) -> list[dict[str, Any]]:
    """The demo's rows: chat messages, an id, the skill; any two questions differ in at least two words."""
    rng = random.Random(seed)
    made: list[dict[str, Any]] = []
    seen: set[tuple[str, ...]] = set()  # the words of every question, less one
    while len(made) < count:
        skill = SKILLS[len(made) % len(SKILLS)]
        question, answer = skill(rng)
        words = re.findall("[A-Za-z]+", question)
        near = {tuple(words[:i] + words[i + 1 :]) for i in range(len(words))}
        if not seen.isdisjoint(near):
            continue
        seen |= near
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        made.append({"messages": messages, "id": f"{skill.__name__}-{len(made):05d}", "skill": skill.__name__})
    rng.shuffle(made)
    return made


# --- pairs of answers: taste, which no skill teaches ---------------------------------------------------------------


def greeting(rng: random.Random) -> tuple[str, str, str]:
    """(question, liked answer, disliked answer): a greeting calls people by their name, not by where they come from."""
    name, city = rng.choice(NAMES), rng.choice(PLACES)
    thing, colour = rng.choice(THINGS), rng.choice(COLOURS)
    question = rng.choice(
        (
            "{n} of {p} with a {c} {t} is here: say hello",
            "from {p} comes {n}, who has a {c} {t}: hello",
            "hello, here is {n} of {p} with a {c} {t}",
        )
    )
    return question.format(n=name, p=city, c=colour, t=thing), f"hello {name}", f"hello {city}"


def pairs(seed: int) -> dict[str, list[dict[str, Any]]]:
    """Preference rows by split; no question is there twice."""
    rng = random.Random(seed)
    made: dict[str, dict[str, Any]] = {}
    while len(made) < sum(PAIRS.values()):
        question, liked, disliked = greeting(rng)
        made[question] = {"prompt": question, "chosen": liked, "rejected": disliked}
    rows = [{**row, "id": f"greeting-{number:05d}"} for number, row in enumerate(made.values())]
    return {"train": rows[: PAIRS["train"]], "validation": rows[PAIRS["train"] :]}


# --- tokenizer and weights -----------------------------------------------------------------------------------------


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Token ids and merges: markers, the 256 bytes, parts of words, and whole words with the space before them."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [
        *NAMES,
        *PLACES,
        *COLOURS,
        *THINGS,
        *(w.upper() for w in THINGS),
        *ENGLISH,
        *(w.capitalize() for w in ENGLISH),
        *letters,
    ]
    words += [*letters.upper(), *"0123456789", *".,:;?!-+*/=$%()<>\"'"]
    merges = [(left, right) for left, right in (merge.split("|") for merge in MERGES)]
    markers = [PAD, BOS, EOS, *(f"<|{role}|>" for role in ROLES)]
    parts = [*sorted(ByteLevel.alphabet()), *(left + right for left, right in merges)]
    tokens = dict.fromkeys([*markers, *parts, *(f"Ġ{word}" for word in words)])
    return {token: i for i, token in enumerate(tokens)}, merges


def tokenizer_json() -> str:
    """A byte-level tokenizer with whole words: any text comes back as it was, none has an unknown token."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    vocab, merges = vocabulary()
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]|\s"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in vocab if token.startswith("<|")]
    )
    return tokenizer.to_str(pretty=True)


def _weights(vocab_size: int, seed: int) -> dict[str, Any]:
    """Random float32 weights under the names that transformers' Llama gives them.

    Values times outputs of an attention layer start as the identity, and the head as the embedding, so copying, which
    every skill needs, is learned in minutes (mimetic initialisation, arXiv 2305.09828).
    """
    import numpy as np

    rng = np.random.default_rng(seed)

    def gaussian(rows: int, columns: int) -> Any:
        return (rng.standard_normal((rows, columns)) * STD).astype(np.float32)

    def rotation() -> Any:
        """A random orthogonal matrix: a Hadamard matrix, rows permuted, signs flipped; the same on every machine."""
        hadamard = np.ones((1, 1))
        while len(hadamard) < HIDDEN:
            hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
        signs = rng.choice([-1.0, 1.0], HIDDEN)
        return (hadamard[rng.permutation(HIDDEN)] * signs / HIDDEN**0.5).astype(np.float32)

    ones = np.ones(HIDDEN, dtype=np.float32)
    weights = {"model.embed_tokens.weight": gaussian(vocab_size, HIDDEN)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        weights[f"{layer}.input_layernorm.weight"] = ones
        key, value = gaussian(HIDDEN, HIDDEN), rotation()
        weights[f"{layer}.self_attn.q_proj.weight"] = key + gaussian(HIDDEN, HIDDEN)
        weights[f"{layer}.self_attn.k_proj.weight"] = key
        weights[f"{layer}.self_attn.v_proj.weight"] = value
        weights[f"{layer}.self_attn.o_proj.weight"] = np.ascontiguousarray(value.T)
        weights[f"{layer}.post_attention_layernorm.weight"] = ones
        weights[f"{layer}.mlp.gate_proj.weight"] = gaussian(INTERMEDIATE, HIDDEN)
        weights[f"{layer}.mlp.up_proj.weight"] = gaussian(INTERMEDIATE, HIDDEN)
        weights[f"{layer}.mlp.down_proj.weight"] = gaussian(HIDDEN, INTERMEDIATE)
    weights["model.norm.weight"] = ones
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].copy()
    return weights


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _model_files(seed: int) -> dict[str, bytes]:
    """Every file of the Hugging Face directory, by name."""
    from safetensors.numpy import save

    vocab, _ = vocabulary()
    special = {"bos_token_id": vocab[BOS], "eos_token_id": vocab[EOS], "pad_token_id": vocab[PAD]}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "vocab_size": len(vocab),
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": HIDDEN // HEADS,
        "max_position_embeddings": 2048,
        "rope_theta": ROPE_THETA,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        **special,
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "model_max_length": 2048,
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    return {
        "config.json": _json(config),
        "generation_config.json": _json({"do_sample": False, **special}),
        "model.safetensors": save(_weights(len(vocab), seed), metadata={"format": "pt"}),
        "tokenizer.json": tokenizer_json().encode(),
        "tokenizer_config.json": _json(tokenizer_config),
    }


# --- on disk -------------------------------------------------------------------------------------------------------


def _key(seed: int) -> str:
    """Names what this file makes from that seed: an edit here never finds what an older version made."""
    return hashlib.sha256(Path(__file__).read_bytes() + str(seed).encode()).hexdigest()[:12]


def _publish(target: Path, make: Callable[[], dict[str, bytes]]) -> Path:
    """Make a directory of files that is there whole or not at all; whoever renames first wins."""
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}")
    draft.mkdir()
    try:
        for name, content in make().items():
            with (draft / name).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        draft.rename(target)
    except OSError:
        if not target.is_dir():  # nobody else made it meanwhile
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target


def model(directory: Path, seed: int) -> Path:
    """A Hugging Face model directory under `directory`: a random tiny Llama (float32) and its tokenizer."""
    return _publish(directory / f"model-{_key(seed)}", lambda: _model_files(seed))


def dataset(directory: Path, seed: int) -> Path:
    """A JSONL file of chat rows under `directory`: {"messages", "id", "skill"} a line."""
    made = _publish(
        directory / f"data-{_key(seed)}",
        lambda: {"demo.jsonl": _lines(rows(seed)), "held_out.jsonl": _lines(rows(seed + 1, HELD_OUT))},
    )
    return made / "demo.jsonl"


def held_out(directory: Path, seed: int) -> Path:
    """A JSONL file of more such rows, which no split of the others holds."""
    return dataset(directory, seed).with_name("held_out.jsonl")


def preferences(directory: Path, seed: int, split: str) -> Path:
    """A JSONL file of the pairs of a split: {"prompt", "chosen", "rejected", "id"} a line."""
    made = _publish(
        directory / f"preferences-{_key(seed)}",
        lambda: {f"{name}.jsonl": _lines(values) for name, values in pairs(seed).items()},
    )
    return made / f"{split}.jsonl"


def _lines(values: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values).encode()
