"""Words, shingles, near-duplicates and packing against plain implementations."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from data_help import WORDS, sentence
from hypothesis import given, settings
from hypothesis import strategies as st

from ftdist.data import text
from ftdist.data.duplicates import Twins, components, exact, greedy, verify
from ftdist.data.order import epoch_order
from ftdist.data.pack import best_fit_decreasing


def plain_words(string: str) -> list[str]:
    """One letter after another, the slow way."""
    kind, _ = text._tables()
    result, current = [], ""
    for letter in string.casefold():
        k = kind[ord(letter)]
        if k != 1 and current:
            result.append(current)
            current = ""
        if k == 1:
            current += letter
        elif k == 2:
            result.append(letter)
    return result + [current] * bool(current)


_texts = st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30), max_size=6)


@settings(max_examples=200, deadline=None)
@given(_texts, st.integers(1, 4))
def test_words_and_ngrams_are_those_of_the_plain_way(texts: list[str], n: int) -> None:
    found = text.words(texts)
    plain = [plain_words(t) for t in texts]
    assert np.diff(found.bounds).tolist() == [len(p) for p in plain]
    names: dict[int, str] = {}
    for t, words in enumerate(plain):
        for h, w in zip(found.hashes[found.bounds[t] : found.bounds[t + 1]].tolist(), words, strict=True):
            assert names.setdefault(h, w) == w  # equal words and only they have equal hashes
    assert len(names) == len({w for p in plain for w in p})
    hashes, owner = text.ngrams(found, n, short=False)
    assert np.bincount(owner, minlength=len(texts)).tolist() == [max(len(p) - n + 1, 0) for p in plain]
    grams = [tuple(p[i : i + n]) for p in plain for i in range(len(p) - n + 1)]
    assert len(set(hashes.tolist())) == len(set(grams))
    sets = text.shingles(found, n)
    want = [len({tuple(p[i : i + n]) for i in range(max(len(p) - n + 1, 1))}) if p else 0 for p in plain]
    assert np.diff(sets.bounds).tolist() == want


def test_words_know_persian_chinese_and_marks() -> None:
    assert plain_words("می\u200cخواهم بروم") == ["می\u200cخواهم", "بروم"]
    assert plain_words("我喜欢x1 ไทย") == ["我", "喜", "欢", "x1", "ไ", "ท", "ย"]
    assert plain_words("नमस्ते foo_bar, x+1") == ["नमस्ते", "foo_bar", "x", "1"]
    counted = text.words(["سلام", "привет мир", "abc"]).scripts
    assert [text.SCRIPTS[i] for i in counted[:, 1:].argmax(1) + 1] == ["Arabic", "Cyrillic", "Latin"]


def test_signatures_estimate_the_overlap_without_bias() -> None:
    rng = random.Random(1)
    errors = []
    for _ in range(150):
        a = [rng.choice(WORDS) + str(rng.randrange(50)) for _ in range(120)]
        b = [w if rng.random() > 0.03 else "new" for w in a]
        sets = text.shingles(text.words([" ".join(a), " ".join(b)]), 5)
        first, second = (set(sets.hashes[sets.bounds[i] : sets.bounds[i + 1]].tolist()) for i in (0, 1))
        signature = text.signatures(sets, 128)
        errors.append((signature[:, 0] == signature[:, 1]).mean() - len(first & second) / len(first | second))
    assert abs(np.mean(errors)) < 0.012  # 3.5 standard errors of 150 estimates
    assert np.std(errors) < 0.055  # √(0.25/128) = 0.044 at most


def test_verified_overlap_is_the_jaccard_index(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sets = [np.unique(rng.integers(0, 40, rng.integers(0, 30)).astype(np.uint32)) for _ in range(20)]
    np.save(tmp_path / "shingle_bounds.npy", np.concatenate([[0], np.cumsum([len(s) for s in sets])]))
    np.concatenate(sets).tofile(tmp_path / "shingles.bin")
    pairs = [(j, i) for j in range(20) for i in range(j)]
    got = verify((tmp_path, np.array([(j << 32) | i for j, i in pairs], np.uint64)))
    for (j, i), value in zip(pairs, got, strict=True):
        a, b = set(sets[j].tolist()), set(sets[i].tolist())
        assert value == pytest.approx(len(a & b) / max(len(a | b), 1))


def test_exact_keeps_the_first_of_each_group(tmp_path: Path) -> None:
    keys = np.array([[5, 1], [7, 1], [5, 1], [5, 2], [7, 1], [5, 1]], np.uint64)
    alive = np.array([True, False, True, True, True, True])
    twins = exact(keys, alive, tmp_path)
    assert sorted(zip(twins.later.tolist(), twins.earlier.tolist(), strict=True)) == [(2, 0), (5, 0)]


def test_a_row_goes_only_for_a_twin_that_stays() -> None:
    chain = Twins(np.array([1, 2, 3]), np.array([0, 1, 2]), np.ones(3))  # 0~1~2~3, but not 0~2
    out = greedy(chain, 4, np.ones(4, bool))
    assert out.later.tolist() == [1, 3] and out.earlier.tolist() == [0, 2]
    assert greedy(chain, 4, np.array([True, False, True, True])).later.tolist() == [2]
    assert components(chain, 5).tolist() == [0, 0, 0, 0, 4]


# --- packing -----------------------------------------------------------------------------------------------------


def plain_best_fit(lengths: list[int], capacity: int) -> int:
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=lambda i: rooms[i])] -= length
        else:
            rooms.append(capacity - length)
    return len(rooms)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 40).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c), max_size=60))))
def test_packing_is_best_fit_decreasing(case: tuple[int, list[int]]) -> None:
    capacity, lengths = case
    bin_of, bins = best_fit_decreasing(np.array(lengths, np.int32), capacity)
    assert bins == plain_best_fit(lengths, capacity)
    assert sorted(set(bin_of.tolist())) == list(range(bins))
    assert np.bincount(bin_of, weights=lengths, minlength=bins).max(initial=0) <= capacity


def test_order_of_an_epoch_is_a_function_of_seed_and_epoch() -> None:
    first = epoch_order(1000, seed=1, epoch=0)
    assert sorted(first.tolist()) == list(range(1000))
    assert (first == epoch_order(1000, seed=1, epoch=0)).all()
    assert (first != epoch_order(1000, seed=1, epoch=1)).any() and (first != epoch_order(1000, seed=2, epoch=0)).any()
    assert first[:3].tolist() == [705, 649, 543]  # the same on every machine and version


def test_sentences_of_the_tests_differ() -> None:
    assert len({sentence(i, 8) for i in range(2000)}) == 2000
