"""General data among the special ones: the share of tokens, the choice of rows, what is refused."""

import datasets
import numpy as np
import pytest
from data_help import pair, read_jsonl, read_report, sentence, write_jsonl

from ftdist.errors import UserError


@pytest.fixture
def files(tmp_path):
    """120 chats and 400 paragraphs of very different length, one of which repeats a chat."""
    special = write_jsonl(tmp_path / "special.jsonl", [pair(i, 10 + i % 20) for i in range(120)])
    texts = [{"text": sentence(10_000 + i, 5 + (i * 7) % 60)} for i in range(400)]
    return special, write_jsonl(tmp_path / "general.jsonl", texts)


def tokens_by_source(prepared):
    """Counted from the rows themselves."""
    found = {}
    for row in datasets.load_from_disk(str(prepared / "train")):
        assert len(row["sources"]) == len(row["lengths"])
        for source, length in zip(row["sources"], row["lengths"], strict=True):
            found[source] = found.get(source, 0) + length
    return found


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("share", [0.01, 0.05, 0.25, 0.5])
def test_the_share_is_of_tokens(run_prepare, files, share, packing):
    special, general = files
    prepared = run_prepare(special, replay=str(general), replay_share=share, packing=packing)
    report, plain = read_report(prepared), read_report(run_prepare(special, packing=packing))
    counted = tokens_by_source(prepared)
    assert [source["kind"] for source in report["sources"]] == ["train", "replay"]
    assert [source["tokens"] for source in report["sources"]] == [counted[0], counted[1]]
    assert counted[0] == plain["tokens"] == report["replay"]["target_tokens"]
    reached = counted[1] / (counted[0] + counted[1])
    longest = 200  # tokens of a row
    assert reached == pytest.approx(share, abs=longest / (counted[0] + counted[1]))
    assert report["replay"]["share"] == pytest.approx(reached, abs=1e-6)
    assert report["tokens"] == sum(counted.values())
    assert report["validation"] == plain["validation"]  # general data are never held out
    rows_in = report["rows_in"]
    left = ("rejected", "filtered", "duplicates_exact", "duplicates_near", "contaminated", "overlong_dropped")
    assert rows_in == sum(report[k] for k in (*left, "train", "validation")) + report["replay"]["rows_unused"]


def test_the_choice_is_the_seeds_and_part_of_the_key(run_prepare, files, tmp_path):
    special, general = files

    def rows(prepared):
        return [row["input_ids"] for row in datasets.load_from_disk(str(prepared / "train"))]

    five = run_prepare(special, replay=str(general), replay_share=0.05)
    assert run_prepare(special, replay=str(general), replay_share=0.05) == five
    again = run_prepare(special, replay=str(general), replay_share=0.05, cache_dir=tmp_path / "other")
    assert rows(again) == rows(five)
    other = run_prepare(special, replay=str(general), replay_share=0.05, seed=43)
    assert rows(other) != rows(five)
    more = run_prepare(special, replay=str(general), replay_share=0.25)
    assert len({run_prepare(special), five, other, more}) == 4

    def general_texts(prepared):
        return {
            tuple(row["input_ids"]) for row in datasets.load_from_disk(str(prepared / "train")) if 1 in row["sources"]
        }

    few, many = (run_prepare(special, replay=str(general), replay_share=share, packing=False) for share in (0.05, 0.25))
    assert general_texts(few) < general_texts(many)  # a larger share adds rows and changes none


def test_too_few_general_data(run_prepare, files):
    special, general = files
    with pytest.raises(UserError, match=r"data\.replay_share=0\.9: .* data\.replay_share=0\.\d+ at most, or "
                                        r"data\.replay_repeats=\d+"):  # fmt: skip
        run_prepare(special, replay=str(general), replay_share=0.9)
    prepared = run_prepare(special, replay=str(general), replay_share=0.9, replay_repeats=20, packing=False)
    facts = read_report(prepared)["replay"]
    assert facts["share"] == pytest.approx(0.9, abs=1e-3) and facts["passes"] > 1
    seen = {}
    for row in datasets.load_from_disk(str(prepared / "train")):
        if row["sources"] == [1]:
            seen[tuple(row["input_ids"])] = seen.get(tuple(row["input_ids"]), 0) + 1
    assert set(np.diff(sorted(set(seen.values())))) <= {1}  # no row more than once more than another
    assert max(seen.values()) == np.ceil(facts["passes"])


def test_general_rows_are_cleared_of_held_out_text(run_prepare, files, tmp_path):
    special, general = files
    plain = run_prepare(special)
    held_out = read_jsonl(plain / "validation_rows.jsonl")
    leaks = [{"text": f"{sentence(90_000 + i, 20)} {row['reference']} and so on"} for i, row in enumerate(held_out)]
    leaks = [leak for leak, row in zip(leaks, held_out, strict=True) if len(row["reference"].split()) >= 15]
    with_leaks = write_jsonl(tmp_path / "leaks.jsonl", [*read_jsonl(general), *leaks])
    report = read_report(run_prepare(special, replay=str(with_leaks), replay_share=0.3))
    assert len(leaks) > 3 and report["contaminated"] == len(leaks)
    assert read_report(run_prepare(special, replay=str(general), replay_share=0.3))["contaminated"] == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"replay_share": 0.1}, r"data\.replay_share=0\.1: of which data\?"),
        ({"replay": "general.jsonl"}, r"data\.replay=general\.jsonl: which share"),
        ({"replay": "nowhere.jsonl", "replay_share": 0.1}, r"data\.replay=nowhere\.jsonl: no such file"),
        ({"replay": [{"path": "general.jsonl", "weight": 2}], "replay_share": 0.1}, r"data\.replay: .* must be a path"),
        ({"replay": "special.jsonl", "replay_share": 0.1}, "is named twice"),
        ({"replay": "broken.jsonl", "replay_share": 0.1}, r"data\.max_rejects=0\.01: .*broken\.jsonl line 1"),
    ],
)
def test_refused(run_prepare, files, tmp_path, monkeypatch, changes, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.jsonl").write_text("{nothing\n" * 20)
    with pytest.raises(UserError, match=words):
        run_prepare("special.jsonl", **changes)
