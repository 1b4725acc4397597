"""The embedded default of the quickstart: a tiny Llama and a demo instruction set, made from a seed, no network."""

from __future__ import annotations

import hashlib
import json
import os
import random
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROWS = 8000  # before the split; a fifth is held out
HIDDEN, LAYERS, HEADS, INTERMEDIATE = 128, 2, 4, 384
EMBEDDING_STD, WEIGHT_STD = 0.02, 0.02

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

# What the demo's questions talk about.
NAMES = (
    "Ada Amir Anna Ben Carl Clara Dara Emil Eva Finn Grace Hana Hugo Ida Ivan Jack Jane Kian Lara Leo Lily Luca Maya "
    "Mina Nina Noah Omar Oscar Paul Rosa Sara Sina Tara Tom Vera Viktor Yara Zoe"
).split()
PLACES = (
    "Athens Berlin Bern Boston Cairo Delhi Dublin Geneva Havana Kyoto Lagos Lima Lisbon London Madrid Milan Nairobi "
    "Oslo Paris Prague Quito Riga Rome Seoul Shiraz Sofia Sydney Tabriz Tehran Tokyo Tunis Turin Vienna Warsaw Yazd"
).split()
COLOURS = "amber black blue brown coral cream gold green grey ivory orange pink purple red silver white yellow".split()
THINGS = (
    "apple arrow bag ball banana basket bell bird boat book bottle box bread bridge brush bucket button cake camera "
    "candle card carpet cat chair cheese clock cloud coat coffee coin cookie cup desk dog door dress drum egg engine "
    "farm feather field fire fish flag flower forest fork garden gate glass glove guitar hammer hat honey horse house "
    "island jacket key kite knife ladder lake lamp leaf lemon letter lion mango map market melon milk mirror moon "
    "mountain mouse needle nest night onion orchid oven page paint paper parrot peach pear pearl pen pencil phone "
    "piano picture pillow plate pocket potato rabbit radio rain ribbon rice ring river road rocket rope rose ruler "
    "salad salt sand scarf school shell ship shirt shoe snow soap soup spider spoon star stone storm sugar sun table "
    "teapot tiger tomato tower train tree truck tulip turtle umbrella violin wagon wall watch water wheel whistle "
    "window winter wolf wood zebra"
).split()

# Frequent English words and letter pairs: with them, ordinary text takes about three bytes a token.
ENGLISH = (
    "the of and to in is that for it as was with on by at from are this be or an have has had not but they he she we "
    "you his her their its all one two three four five six more than each how many much what when which who will would "
    "can could there if then so up out about into some other time day days week weeks hour hours year years minutes "
    "number total first last second next following word words list name city colour thing order after before over "
    "every get gets got make makes made use used take takes give gives buy buys sell sells cost costs pay paid money "
    "dollars cents price half twice times as per left right same different old new long people children friends "
    "answer question write describe explain"
).split()
PAIRS = "th he in er an re on at en nd ti es or te of ed is it al ar st to nt ng se ha as ou io le ve co me de hi ri ro ic ne ea ra ce".split()  # noqa: E501


# --- skills: each returns (question, answer) -----------------------------------------------------------------------


def _list(words: list[str], rng: random.Random) -> str:
    """The words as a list in one of three styles."""
    return rng.choice((", ", " ", " - ")).join(words)


def extract(rng: random.Random) -> tuple[str, str]:
    """One field of a record."""
    record = {
        "name": rng.choice(NAMES),
        "city": rng.choice(PLACES),
        "colour": rng.choice(COLOURS),
        "thing": rng.choice(THINGS),
        "gift": rng.choice(THINGS),
    }
    fields = rng.sample(list(record), 4)
    text = ", ".join(f"{field}: {record[field]}" for field in fields)
    field = rng.choice(fields)
    question = rng.choice(("What is the {f}? {t}", "{t}. Give the {f}.", "Extract the {f} from {t}"))
    return question.format(f=field, t=text), record[field]


def last(rng: random.Random) -> tuple[str, str]:
    """The last word of a list."""
    words = rng.sample(THINGS, rng.randint(4, 6))
    question = rng.choice(("Last word: {}", "Which word is last? {}", "{}. Say the last word."))
    return question.format(_list(words, rng)), words[-1]


def first(rng: random.Random) -> tuple[str, str]:
    """The first word of a list."""
    words = rng.sample(THINGS, rng.randint(4, 6))
    question = rng.choice(("First word: {}", "Which word is first? {}", "{}. Say the first word."))
    return question.format(_list(words, rng)), words[0]


def successor(rng: random.Random) -> tuple[str, str]:
    """The word that follows a given one in a list."""
    words = rng.sample(THINGS, rng.randint(4, 6))
    i = rng.randrange(len(words) - 1)
    question = rng.choice(("What follows {w}? {t}", "{t}. Which word comes after {w}?", "In {t}, after {w} comes what?"))
    return question.format(w=words[i], t=_list(words, rng)), words[i + 1]


def repeated(rng: random.Random) -> tuple[str, str]:
    """The word that occurs twice in a list."""
    words = rng.sample(THINGS, rng.randint(3, 5))
    twice = rng.choice(words)
    words.insert(rng.randint(0, len(words)), twice)
    question = rng.choice(("Which word is there twice? {}", "Find the repeated word: {}", "{}. What occurs twice?"))
    return question.format(_list(words, rng)), twice


def reverse(rng: random.Random) -> tuple[str, str]:
    """Three or four words in reverse order."""
    words = rng.sample(THINGS, rng.randint(3, 4))
    question = rng.choice(("Reverse: {}", "Backwards: {}", "{}. Reverse the order."))
    return question.format(_list(words, rng)), " ".join(reversed(words))


def highest(rng: random.Random) -> tuple[str, str]:
    """The name with the largest score."""
    names = rng.sample(NAMES, 4)
    scores = rng.sample(range(10), 4)
    text = ", ".join(f"{name} {score}" for name, score in zip(names, scores, strict=True))
    question = rng.choice(("Who has most? {}", "Highest score: {}", "{}. Who wins?"))
    return question.format(text), names[scores.index(max(scores))]


def fill(rng: random.Random) -> tuple[str, str]:
    """A sentence from its parts."""
    parts = {"who": rng.choice(NAMES), "what": rng.choice(THINGS), "where": rng.choice(PLACES)}
    colour = rng.choice(COLOURS)
    order = rng.sample(list(parts), 3)
    text = ", ".join(f"{part} {parts[part]}" for part in order)
    question = rng.choice(("Make a sentence: {}, colour {}", "{}, colour {}. Write a sentence."))
    return question.format(text, colour), f"{parts['who']} has a {colour} {parts['what']} in {parts['where']}"


def capitals(rng: random.Random) -> tuple[str, str]:
    """Letters in upper case."""
    letters = rng.sample("abcdefghijklmnopqrstuvwxyz", 8)
    question = rng.choice(("Upper case: {}", "Capitals: {}", "{} in capitals"))
    return question.format(" ".join(letters)), " ".join(letters).upper()


SKILLS: tuple[Callable[[random.Random], tuple[str, str]], ...] = (
    extract,
    last,
    first,
    successor,
    repeated,
    reverse,
    highest,
    fill,
    capitals,
)


def rows(seed: int) -> list[dict[str, Any]]:
    """The demo's rows: chat messages, an id, the skill that they ask for; no question twice."""
    rng = random.Random(seed)
    made: list[dict[str, Any]] = []
    seen: set[str] = set()
    while len(made) < ROWS:
        skill = SKILLS[len(made) % len(SKILLS)]
        question, answer = skill(rng)
        if question in seen:
            continue
        seen.add(question)
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        made.append({"messages": messages, "id": f"{skill.__name__}-{len(made):05d}", "skill": skill.__name__})
    rng.shuffle(made)
    return made


# --- tokenizer and weights -----------------------------------------------------------------------------------------


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Token ids and merges: markers, the 256 bytes, letter pairs, and whole words with the space before them."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*NAMES, *PLACES, *COLOURS, *THINGS, *ENGLISH, *(w.capitalize() for w in ENGLISH), *letters]
    words += [*letters.upper(), *"0123456789", *".,:;?!-+*/=$%()<>\"'"]
    markers = [PAD, BOS, EOS, *(f"<|{role}|>" for role in ROLES)]
    tokens = dict.fromkeys([*markers, *sorted(ByteLevel.alphabet()), *PAIRS, *(f"Ġ{word}" for word in words)])
    return {token: i for i, token in enumerate(tokens)}, [(pair[0], pair[1]) for pair in PAIRS]


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
    """Random float32 weights under the names that transformers' Llama gives them."""
    import numpy as np

    rng = np.random.default_rng(seed)

    def matrix(rows: int, columns: int, std: float) -> Any:
        return (rng.standard_normal((rows, columns)) * std).astype(np.float32)

    ones = np.ones(HIDDEN, dtype=np.float32)
    weights = {"model.embed_tokens.weight": matrix(vocab_size, HIDDEN, EMBEDDING_STD)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        weights[f"{layer}.input_layernorm.weight"] = ones
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            weights[f"{layer}.self_attn.{name}.weight"] = matrix(HIDDEN, HIDDEN, WEIGHT_STD)
        weights[f"{layer}.post_attention_layernorm.weight"] = ones
        weights[f"{layer}.mlp.gate_proj.weight"] = matrix(INTERMEDIATE, HIDDEN, WEIGHT_STD)
        weights[f"{layer}.mlp.up_proj.weight"] = matrix(INTERMEDIATE, HIDDEN, WEIGHT_STD)
        weights[f"{layer}.mlp.down_proj.weight"] = matrix(HIDDEN, INTERMEDIATE, WEIGHT_STD)
    weights["model.norm.weight"] = ones
    weights["lm_head.weight"] = matrix(vocab_size, HIDDEN, WEIGHT_STD)
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
        "rope_theta": 10000.0,
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

    def files() -> dict[str, bytes]:
        return {"demo.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows(seed)).encode()}

    return _publish(directory / f"data-{_key(seed)}", files) / "demo.jsonl"
