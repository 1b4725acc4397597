"""ROUGE-1, -2, -L and -Lsum (Lin 2004) for every script. On ASCII text the scores are rouge-score's.

rouge-score keeps only a–z and 0–9, so that two equal Persian texts score 0. Here a token is a run of letters, marks and
digits; a letter of a script that is written without spaces is a token by itself, with its marks.
"""

from __future__ import annotations

import unicodedata
from collections import Counter

import numpy as np
import regex

KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
_ALONE = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
# A zero-width non-joiner joins the halves of a Persian word: می‌روم is one token.
_TOKEN = regex.compile(rf"[{_ALONE}]\p{{M}}*|[[\p{{L}}\p{{Nd}}]--[{_ALONE}]](?:[[\p{{L}}\p{{M}}\p{{Nd}}]--[{_ALONE}]]"
                       r"|\u200c(?=\p{L}))*", flags=regex.V1)  # fmt: skip
_FORMS = regex.compile(r"[\uFB50-\uFDFF\uFE70-\uFEFC\uFF00-\uFFEF]+")  # presentation forms, full and half width
# Two code points for one letter, by keyboard: Arabic yeh and kaf in Persian text. Tatweel and vowel signs are optional.
_OPTIONAL = "\u0640\u064b\u064c\u064d\u064e\u064f\u0650\u0651\u0652\u0670"
_LETTERS = str.maketrans({"ي": "ی", "ى": "ی", "ك": "ک"} | dict.fromkeys(_OPTIONAL))


def tokens(text: str) -> list[str]:
    """The words of a text in lower case, spelled one way."""
    text = unicodedata.normalize("NFC", _FORMS.sub(lambda m: unicodedata.normalize("NFKC", m[0]), text))
    text = text.lower().translate(_LETTERS)
    return [_digits(token) for token in _TOKEN.findall(text)]


def _digits(token: str) -> str:
    """Persian, Arabic and other digits as 0–9."""
    if token.isascii():
        return token
    return "".join(str(unicodedata.decimal(c)) if unicodedata.category(c) == "Nd" else c for c in token)


def scores(reference: str, answer: str) -> dict[str, float]:
    """The F-measure of every kind, 0 … 1."""
    expected, given = tokens(reference), tokens(answer)
    found = {f"rouge{n}": _ngrams(expected, given, n) for n in (1, 2)}
    found["rougeL"] = _f(_subsequence(expected, given), len(expected), len(given))
    found["rougeLsum"] = _summary(_sentences(reference), _sentences(answer))
    return found


def _sentences(text: str) -> list[list[str]]:
    """The lines of a text, as rouge-score takes them for sentences."""
    return [tokens(line) for line in text.split("\n") if line]


def _ngrams(expected: list[str], given: list[str], n: int) -> float:
    a, b = (Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1)) for words in (expected, given))
    return _f((a & b).total(), a.total(), b.total())


def _f(common: int, expected: int, given: int) -> float:
    return 2 * common / (expected + given) if common else 0.0


def _matches(a: list[str], b: list[str]) -> np.ndarray:
    numbers: dict[str, int] = {}
    x, y = (np.array([numbers.setdefault(word, len(numbers)) for word in words], np.int64) for words in (a, b))
    return x[:, None] == y[None, :]


def _lengths(equal: np.ndarray) -> np.ndarray:
    """Lengths of the longest common subsequences of all prefixes, (len(a) + 1, len(b) + 1)."""
    rows, columns = equal.shape
    table = np.zeros((rows + 1, columns + 1), np.int32)
    for i in range(rows):
        # a row from the one above: either a word more of b, or a match; running maxima carry the rest
        candidates = np.where(equal[i], table[i, :-1] + 1, table[i, 1:])
        table[i + 1, 1:] = np.maximum.accumulate(candidates)
    return table


def _subsequence(a: list[str], b: list[str]) -> int:
    return int(_lengths(_matches(a, b))[-1, -1]) if a and b else 0


def _picked(a: list[str], b: list[str]) -> set[int]:
    """Positions in `a` of one longest common subsequence; of equals the one that rouge-score finds."""
    if not a or not b:
        return set()
    equal = _matches(a, b)
    table = _lengths(equal)
    i, j, found = len(a), len(b), set()
    while i and j:
        if equal[i - 1, j - 1]:
            i, j = i - 1, j - 1
            found.add(i)
        elif table[i, j - 1] > table[i - 1, j]:
            j -= 1
        else:
            i -= 1
    return found


def _summary(expected: list[list[str]], given: list[list[str]]) -> float:
    """Union of the subsequences of each reference sentence with all sentences of the answer (Lin 2004, section 3.2)."""
    sizes = sum(map(len, expected)), sum(map(len, given))
    left = Counter(word for sentence in expected for word in sentence)
    free = Counter(word for sentence in given for word in sentence)
    hits = 0
    for sentence in expected:
        union: set[int] = set().union(*(_picked(sentence, other) for other in given)) if given else set()
        for i in sorted(union):
            word = sentence[i]
            if left[word] > 0 and free[word] > 0:
                hits += 1
                left[word] -= 1
                free[word] -= 1
    return _f(hits, *sizes)
