"""Near-duplicates: recall, precision and time on planted ones, beside text-dedup's MinHash (pip install text-dedup).

    python tests/bench/data_duplicates.py --rows 50000

Texts of 40 to 120 words from a vocabulary of 5,000; to each of a tenth of them a copy with some words replaced is
added. The truth is the Jaccard index of the sets of word 5-grams (0.7 or more: text-dedup's threshold), computed for
each planted pair; texts that were not copied from one another share nothing. text-dedup runs with its defaults
(5-grams, 256 permutations, threshold 0.7) and again with our 128 permutations.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

THRESHOLD = 0.7


def grams(words: list[str]) -> set[tuple[str, ...]]:
    return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}


def plant(rows: int, path: Path) -> tuple[set[int], set[int], dict[int, int]]:
    """Writes the rows; returns the copies at or above the threshold, those below it, and {original: copy}."""
    rng = random.Random(1)
    vocabulary = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(5000)]
    copies = rows // 11
    originals = [rng.choices(vocabulary, k=rng.randint(40, 120)) for _ in range(rows - copies)]
    texts = [" ".join(words) for words in originals]
    above, below, source_of = set(), set(), {}
    for source in rng.sample(range(len(originals)), copies):
        words = list(originals[source])
        source_of[source] = len(texts)
        for _ in range(rng.choice((1, 1, 2, 3, 4))):
            words[rng.randrange(len(words))] = rng.choice(vocabulary)
        a, b = grams(originals[source]), grams(words)
        (above if len(a & b) / len(a | b) >= THRESHOLD else below).add(len(texts))
        texts.append(" ".join(words))
    with path.open("w", encoding="utf-8") as file:
        for number, text in enumerate(texts):
            file.write(json.dumps({"text": text, "number": number}) + "\n")
    return above, below, source_of


def line(
    name: str, seconds: float, removed: set[int], above: set[int], below: set[int], copy_of: dict[int, int]
) -> None:
    removed = {copy_of.get(row, row) for row in removed}  # which one of a pair goes is a matter of taste
    hits = len(removed & above)
    recall, precision = hits / max(len(above), 1), hits / max(len(removed), 1)
    other = len(removed - above - below)
    print(
        f"{name:34} {seconds:7.1f} s  removed {len(removed):6,}  recall {recall:.4f}  precision {precision:.4f}"
        f"  (of the wrong ones {len(removed & below)} are copies below the threshold, {other} no copies)",
        flush=True,
    )


def ours(path: Path, scratch: Path, permutations: int) -> tuple[float, set[int]]:
    """The first pass and the search as `prepare` runs them, without tokenisation. Line n of the file is row n - 1."""
    import numpy as np

    from ftdist.data import duplicates
    from ftdist.data.clean import Rules, clean_block
    from ftdist.data.decide import Rows
    from ftdist.data.pool import cores, pool
    from ftdist.data.prepare import lsh_bands
    from ftdist.data.reading import blocks
    from ftdist.data.sources import Source

    source = Source("bench", "train", (path,), 1.0, "auto", {})
    work = scratch / f"work-{permutations}"
    work.mkdir()
    started = time.monotonic()
    bands, band_rows = lsh_bands(THRESHOLD, permutations)
    rules = Rules(
        task="sft",
        sources=(source,),
        seed=1,
        min_answer=None,
        max_answer=None,
        max_repetition=None,
        max_markup=None,
        scripts=None,
        min_script_share=0.5,
        shingle=5,
        bands=bands,
        band_rows=band_rows,
        ngram=None,
    )
    with pool(cores()) as processes:
        cleaned = list(processes.map(clean_block, ((rules, work, b) for b in blocks([source]))))
        rows = Rows(cleaned, [source])
        alive = np.ones(len(rows), bool)
        twins = duplicates.near(work, rows.blocks, rows.bases, alive, bands=bands, threshold=THRESHOLD, pool=processes)
        out = duplicates.greedy(twins, len(rows), alive)
    return time.monotonic() - started, set(out.later.tolist())


def text_dedup(path: Path, scratch: Path, permutations: int) -> tuple[float, set[int]]:
    import datasets

    output = scratch / f"text-dedup-{permutations}"
    command = [sys.executable, "-m", "text_dedup.minhash", "--path", "json", "--data_files", str(path)]
    command += ["--split", "train", "--cache_dir", str(scratch / f"hf-{permutations}"), "--output", str(output)]
    command += ["--column", "text", "--threshold", str(THRESHOLD), "--num_perm", str(permutations)]
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.monotonic() - started
    if done.returncode:
        raise SystemExit(f"text-dedup failed:\n{done.stderr[-2000:]}")
    rows = sum(1 for _ in path.open(encoding="utf-8"))
    kept = {row["number"] for row in datasets.load_from_disk(str(output))}
    return seconds, set(range(rows)) - kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        path = scratch / "rows.jsonl"
        above, below, copy_of = plant(options.rows, path)
        load = os.getloadavg()[0]
        print(
            f"{options.rows:,} rows, planted: {len(above):,} copies at {THRESHOLD} or more, "
            f"{len(below):,} below; load {load:.1f}"
        )
        line("ftdist, 128 permutations", *ours(path, scratch, 128), above, below, copy_of)
        if find_spec("text_dedup") is None:
            print("text-dedup is not installed: pip install text-dedup")
            return
        for permutations in (256, 128):
            line(
                f"text-dedup, {permutations} permutations",
                *text_dedup(path, scratch, permutations),
                above,
                below,
                copy_of,
            )


if __name__ == "__main__":
    main()
