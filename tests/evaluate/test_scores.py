"""Metrics against their reference implementations, scripts that these get wrong, and the bootstrap."""

import json
import math
import random
import subprocess
import sys

import numpy as np
import pytest

from ftdist.evaluate import overlap, rouge, scores

WORDS = ["a", "the", "cat", "sat", "on", "mat", "it's", "12", "x_y", "Hello", "hello,", "end."]


def texts(count, seed):
    chance = random.Random(seed)
    return [
        "".join(chance.choice(WORDS) + chance.choice([" ", " ", "\n", ", "]) for _ in range(chance.randint(0, 25)))
        for _ in range(count)
    ]


def test_rouge_is_rouge_scores_on_ascii():
    from rouge_score import rouge_scorer

    reference = rouge_scorer.RougeScorer(list(rouge.KINDS))
    for a, b in zip(texts(400, 1), texts(400, 2), strict=True):
        expected = {kind: score.fmeasure for kind, score in reference.score(a, b).items()}
        assert rouge.scores(a, b) == pytest.approx(expected), (a, b)


def test_rouge_of_files_is_the_command_lines(tmp_path):
    lines = [[" ".join(text.split()) or "empty" for text in texts(30, seed)] for seed in (3, 4)]
    for name, content in zip(("references", "answers"), lines, strict=True):
        (tmp_path / name).write_text("\n".join(content) + "\n")
    subprocess.run(
        [sys.executable, "-m", "rouge_score.rouge", f"--target_filepattern={tmp_path}/references", "--noaggregate",
            "--rouge_types=rouge1,rouge2,rougeL,rougeLsum",
         f"--prediction_filepattern={tmp_path}/answers", f"--output_filename={tmp_path}/scores.csv"],
        check=True, capture_output=True,
    )  # fmt: skip
    rows = (tmp_path / "scores.csv").read_text().splitlines()
    names = rows[0].split(",")
    for row, reference, answer in zip(rows[1:], *lines, strict=True):
        found, expected = rouge.scores(reference, answer), dict(zip(names, row.split(","), strict=True))
        for kind in ("rouge1", "rouge2", "rougeL", "rougeLsum"):
            assert found[kind] == pytest.approx(float(expected[f"{kind}-F"]), abs=1e-5)


@pytest.mark.parametrize(
    ("reference", "answer", "rouge1", "rouge2", "rouge_l"),
    [
        ("من به خانه رفتم", "من به خانه رفتم", 1, 1, 1),
        ("من به خانه رفتم", "من به مدرسه رفتم", 3 / 4, 1 / 3, 3 / 4),
        ("من می‌روم", "من می روم", 2 / 5, 0, 2 / 5),  # a word with ZWNJ is one word
        ("كتاب علي", "کتاب علی", 1, 1, 1),  # Arabic and Persian keyboards
        ("سال ۱۴۰۲", "سال 1402", 1, 1, 1),
        ("كِتَابٌ", "كتاب", 1, 0, 1),  # vowel signs are optional
        ("我爱北京", "我在北京", 3 / 4, 1 / 3, 3 / 4),
        ("ภาษาไทย", "ภาษาไทย", 1, 1, 1),
        ("Größe naïve", "größe NAÏVE", 1, 1, 1),
        ("", "word", 0, 0, 0),
        ("word", "", 0, 0, 0),
    ],
)
def test_rouge_in_other_scripts(reference, answer, rouge1, rouge2, rouge_l):
    found = rouge.scores(reference, answer)
    assert (found["rouge1"], found["rouge2"], found["rougeL"]) == pytest.approx((rouge1, rouge2, rouge_l))
    assert found["rougeLsum"] == pytest.approx(found["rougeL"])


def test_bleu_and_chrf_are_sacrebleus_command_line(tmp_path):
    lines = [[" ".join(text.split()) or "empty" for text in texts(40, seed)] for seed in (5, 6)]
    references, answers = lines
    (tmp_path / "references").write_text("\n".join(references) + "\n")
    (tmp_path / "answers").write_text("\n".join(answers) + "\n")
    done = subprocess.run(
        [sys.executable, "-m", "sacrebleu", str(tmp_path / "references"), "-i", str(tmp_path / "answers"),
         "-m", "bleu", "chrf", "-w", "6"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    by_name = {entry["name"].lower().rstrip("2"): entry for entry in json.loads(done.stdout)}
    found = scores.of_answers(answers, references, ["bleu", "chrf"], None, "13a")
    for name in ("bleu", "chrf"):
        assert found[name].total == pytest.approx(by_name[name]["score"], abs=1e-5)
        assert found[name].signature == by_name[name]["signature"]


def test_answers_are_extracted():
    pattern = r"####\s*(-?\$?[\d.,]*\d)"
    assert scores.same_answer("it is 2 #### 1,200.", "so\n#### 1200", pattern)
    assert scores.same_answer("#### 5 no #### 7", "#### 7.0", pattern)  # the last one counts
    assert not scores.same_answer("no answer", "no answer", pattern)
    assert not scores.same_answer("#### 71", "#### 7", pattern)


def test_a_corpus_metric_is_resampled_as_a_whole():
    """The interval of BLEU's difference comes from BLEU of resampled corpora, not from means of sentences."""
    import sacrebleu

    references = [text or "x" for text in texts(12, 7)]
    found = [scores.of_answers(texts(12, seed), references, ["bleu"], None, "13a")["bleu"] for seed in (8, 9)]
    picks = np.random.Generator(np.random.PCG64(3)).integers(0, 12, 12)
    for metric, seed in zip(found, (8, 9), strict=True):
        answers = texts(12, seed)
        expected = sacrebleu.corpus_bleu([answers[i] for i in picks], [[references[i] for i in picks]]).score
        assert metric.value(metric.statistics[picks].sum(0)) == pytest.approx(expected)
    result = scores.compared(*found, 200, 0)
    assert result["low"] <= result["difference"] <= result["high"]
    assert result["wins"] + result["ties"] + result["losses"] == 12


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    chance = np.random.Generator(np.random.PCG64(1))
    inside = 0
    for trial in range(100):
        base = chance.normal(0, 1, 60)
        tuned = base + chance.normal(0.3, 0.5, 60)  # paired: most of the noise is shared
        result = scores.compared(scores.mean(base), scores.mean(tuned), 300, trial)
        inside += result["low"] <= 0.3 <= result["high"]
        assert result["high"] - result["low"] < 0.5  # unpaired it would be about 0.75
    assert 88 <= inside <= 99


def test_losses_weigh_tokens_and_fall_when_better():
    base = scores.loss(np.array([10.0, 1.0]), np.array([10, 1]))
    tuned = scores.loss(np.array([5.0, 2.0]), np.array([10, 1]))
    assert base.total == pytest.approx(1.0) and tuned.total == pytest.approx(7 / 11)
    assert scores.perplexity(tuned).total == pytest.approx(math.exp(7 / 11))
    found = scores.compared(base, tuned, 50, 0)
    assert (found["wins"], found["losses"]) == (1, 1)


def test_a_row_without_a_score_is_no_zero():
    found = scores.mean([4.0, math.nan, 2.0])
    assert found.total == 3.0
    assert scores.compared(found, scores.mean([5.0, 5.0, math.nan]), 10, 0)["difference"] == 1.0
    assert math.isnan(scores.mean([math.nan]).total)


class Characters:
    """A tokenizer of characters."""

    def batch_decode(self, batch, skip_special_tokens):
        return ["".join(map(chr, ids)) for ids in batch]


def row(question, answer):
    return {"messages": [{"role": "user", "content": question}], "reference": answer}


def test_overlap_with_the_training_data_is_found(tmp_path):
    import datasets

    long = " ".join(f"word{i}" for i in range(20))
    common = " ".join(f"template{i}" for i in range(14))
    trained = [f"system {common} user {long} assistant yes", f"{common} What is the capital of Iran? Tehran.",
               *(f"{common} filler number {i}" for i in range(20))]  # fmt: skip
    packed = [{"input_ids": [ord(c) for c in text], "lengths": [len(text)]} for text in trained]
    datasets.Dataset.from_list(packed).save_to_disk(tmp_path / "train")
    rows = [
        row(f"please {long}", "no"),  # 13 words in a row
        row(common, "no"),  # boilerplate of every training row
        row("What is the capital of Iran?", "Tehran"),  # short, but question and answer are there
        row("What is the capital of Iran?", "Shiraz"),  # another answer
        row("Something else entirely, unseen until now?", "Tehran"),
    ]
    assert overlap.found(tmp_path, Characters(), rows)["rows"] == [0, 2]
    assert overlap.found(tmp_path / "gone", Characters(), rows) is None
