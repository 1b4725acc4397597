"""A user's data → the prepared data set of a run: read, clean, decide, tokenise, pack, report. Start reading here."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field
from typing_extensions import NotRequired, TypedDict

from ftdist.data import arrow, cache, duplicates, pack, report
from ftdist.data.clean import FILTERS, KEPT, Cleaned, Rules, clean_block, kind_of
from ftdist.data.encode import DPO_COLUMNS, SFT_COLUMNS, TRAIN, VALIDATION, Encoded, Laying, Shard, encode_block, write
from ftdist.data.formats import COLUMNS, FORMATS
from ftdist.data.pool import Pool, Progress, cores, pool
from ftdist.data.sources import Source, blocks, find
from ftdist.data.text import SCRIPTS
from ftdist.errors import UserError

U64 = np.uint64
_SMALL = 8 << 20  # bytes of input below which processes cost more than they save

Share = Annotated[float, Field(ge=0, lt=1)]
Format = Literal[
    "auto", "messages", "sharegpt", "alpaca", "prompt_completion", "question_answer", "text", "preference"
]


class Part(TypedDict):
    """One of several sources: `weight` is how often an epoch holds each of its rows (0.5: a fixed half of them)."""

    __pydantic_config__ = {"extra": "forbid"}  # type: ignore[misc]  # noqa: RUF012
    path: str
    name: NotRequired[str]
    weight: NotRequired[Annotated[float, Field(gt=0, le=100)]]
    format: NotRequired[Format]
    columns: NotRequired[dict[str, str]]


def prepare(
    *,
    path: str | list[str | Part],
    format: Format,
    columns: dict[str, str],
    workers: Annotated[int, Field(ge=1)] | None,
    max_rejects: Annotated[float, Field(ge=0, le=1)],
    exact_duplicates: Literal["remove", "keep"],
    near_duplicates: Literal["remove", "keep", "off"],
    near_threshold: Annotated[float, Field(gt=0, le=1)],
    near_permutations: Annotated[int, Field(ge=16, le=1024)],
    near_shingle: Annotated[int, Field(ge=1, le=32)],
    min_answer: Annotated[int, Field(ge=1)] | None,
    max_answer: Annotated[int, Field(ge=1)] | None,
    max_repetition: Share | None,
    max_markup: Share | None,
    scripts: list[str] | None,
    min_script_share: Annotated[float, Field(gt=0, le=1)],
    validation: str | list[str] | None,
    validation_share: Share,
    stratify: bool,
    decontaminate: bool,
    against: str | list[str] | None,
    contamination_ngram: Annotated[int, Field(ge=3, le=64)],
    boilerplate_rows: Annotated[int, Field(ge=2)],
    chat_template: str,
    template_keywords: dict[str, Any],
    mask: Literal["auto", "assistant", "completion", "last", "all"],
    overlong: Literal["truncate", "drop", "split"],
    tokenizer_path: str,
    revision: str | None,
    trust_remote_code: bool,
    max_length: int,
    packing: bool,
    task: str,
    seed: int,
    cache_dir: Path,
) -> Path:
    """The folder of the prepared data set: `train/` and `validation/` (Arrow, as datasets.load_from_disk reads it),
    `validation_rows.jsonl`, `rejects.jsonl`, `dropped.jsonl`, `data_report.json`, `chat_template.jinja`.

    Columns for task=sft: input_ids, labels (not shifted, -100 where not trained on), lengths (of the sequences packed
    into the row), sources (of each sequence); for task=dpo: prompt_ids, chosen_ids, rejected_ids. The folder's name is
    a hash of all that decides its content; if it exists, nothing is done. UserError for every mistake of the user.
    """
    options = {k: v for k, v in locals().items() if k not in ("workers", "cache_dir", "tokenizer_path")}
    _check(columns, scripts, overlong, task)
    sources, aside = _sources(
        path, format=format, columns=columns, validation=validation, against=against, cache_dir=cache_dir, seed=seed
    )
    tokenizer = Path(tokenizer_path).expanduser()
    hashes = cache.FileHashes(cache_dir / "file_hashes.json")
    files = [
        (f"{s.kind} {s.name} {s.weight} {s.format} {sorted(s.columns.items())} {f.name}", hashes.of(f))
        for s in sources
        for f in s.files
    ]
    if tokenizer.is_dir():
        files += [(f"tokenizer {p.relative_to(tokenizer)}", hashes.of(p)) for p in cache.tokenizer_files(tokenizer)]
    else:
        options["tokenizer"] = tokenizer_path
    template_file = Path(chat_template).expanduser()
    if template_file.is_file():
        files.append(("template", hashes.of(template_file)))
    hashes.save()
    options["path"] = options["validation"] = options["against"] = None  # the files' content counts, not their place
    key = cache.key(options, files)
    final = cache_dir / key
    if (final / "data_report.json").is_file():
        return final

    lsh = _bands(near_threshold, near_permutations) if near_duplicates != "off" else (0, 0)
    rules = Rules(
        task=task,
        sources=tuple(sources),
        seed=seed,
        min_answer=min_answer,
        max_answer=max_answer,
        max_repetition=max_repetition,
        max_markup=max_markup,
        scripts=tuple(scripts) if scripts is not None else None,
        min_script_share=min_script_share,
        shingle=near_shingle if near_duplicates != "off" else None,
        permutations=near_permutations,
        bands=lsh[0],
        band_rows=lsh[1],
        ngram=contamination_ngram if decontaminate else None,
    )
    size = sum(f.stat().st_size * (4 if f.suffix in (".gz", ".zst", ".parquet") else 1) for s in sources for f in s.files)
    count = workers or cores()
    made = cache.workplace(final)
    work = made / "work"
    work.mkdir()
    try:
        from ftdist.data.tokens import freeze_tokenizer

        frozen = freeze_tokenizer(
            tokenizer_path,
            revision=revision,
            trust_remote_code=trust_remote_code,
            chat_template=chat_template,
            keywords=template_keywords,
            to=work / "tokenizer",
        )
        with pool(1 if size < _SMALL else count) as processes:
            cleaned = _clean(rules, work, made, processes)
            rows = Rows(cleaned, sources)
            _too_many_rejects(rows.rejected, rows.seen, max_rejects, made, final, sources)
            found = _decide(
                rows,
                rules,
                work,
                processes,
                exact_duplicates=exact_duplicates,
                near_duplicates=near_duplicates,
                near_threshold=near_threshold,
                validation_share=validation_share,
                explicit=validation is not None or any(s.kind == "validation" for s in sources),
                stratify=stratify,
                boilerplate=boilerplate_rows,
            )
            laying = Laying(task, mask, max_length, overlong)
            encoded = _encode(rows, found, laying, work, made, processes)
            _too_many_rejects(rows.rejected, rows.seen, max_rejects, made, final, sources)
            sizes = _write(rows, found.times, encoded, laying, packing, seed, key, work, made, processes)
        (made / "chat_template.jinja").write_text(frozen["template"], encoding="utf-8")
        summary = report.summarise(
            rows=rows,
            found=found,
            encoded=encoded,
            sizes=sizes,
            sources=sources,
            work=work,
            folder=made,
            template=frozen,
            laying=laying,
            left_aside=aside,
            key=key,
        )
        (made / "data_report.json").write_text(json.dumps(summary, indent=1, ensure_ascii=False), encoding="utf-8")
        shutil.rmtree(work)
        cache.publish(made, final)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return final


# --- what was asked for ------------------------------------------------------------------------------------------


def _check(columns: dict[str, str], scripts: list[str] | None, overlong: str, task: str) -> None:
    for name in columns:
        if name not in COLUMNS:
            raise UserError(f"data.columns.{name}: no such column; known: {', '.join(COLUMNS)} (our name: yours)")
    for name in scripts or ():
        if name not in SCRIPTS[2:]:
            raise UserError(f"data.scripts={name}: no such script; known: {', '.join(SCRIPTS[2:])}")
    if task == "dpo" and overlong == "split":
        raise UserError("data.overlong=split: a preference row can't be split; use truncate or drop")
    if task not in ("sft", "dpo"):
        raise UserError(f"task={task}: data can be prepared for sft and dpo")


def _sources(
    path: str | list[str | Part],
    *,
    format: str,
    columns: dict[str, str],
    validation: str | list[str] | None,
    against: str | list[str] | None,
    cache_dir: Path,
    seed: int,
) -> tuple[list[Source], list[str]]:
    """(all sources, files that were left aside)."""
    parts: list[Any] = path if isinstance(path, list) else [path]
    if not parts:
        raise UserError("data.path=[]: names no data; give a file, a folder, a glob or a hub id")
    sources: list[Source] = []
    aside: list[str] = []
    held_out: list[Source] = []
    for part in parts:
        said: dict[str, Any] = {"path": part} if isinstance(part, str) else dict(part)
        unknown = set(said) - {"path", "name", "weight", "format", "columns"}
        if unknown or not isinstance(said.get("path"), str):
            raise UserError(f"data.path: {part} must be a path or have path, weight, format, columns, name and no more")
        if said.get("format", "auto") not in ("auto", *FORMATS):
            raise UserError(f"data.path: format={said['format']}: no such format; known: auto, {', '.join(FORMATS)}")
        named = said["path"]
        if named == "demo":
            from ftdist.demo import dataset

            named = str(dataset(cache_dir.parent / "demo", seed))
        files, kept_out, tests = find(named, key="data.path")
        source = Source(
            str(said.get("name") or said["path"]),
            "train",
            tuple(files),
            float(said.get("weight", 1.0)),
            said.get("format", format),
            said.get("columns", columns),
        )
        sources.append(source)
        if kept_out and validation is None:
            held_out.append(replace(source, kind="validation", files=tuple(kept_out), weight=1.0))
        else:
            aside += map(str, kept_out)
        aside += map(str, tests)
    sources += held_out
    for kind, named_files in (("validation", validation), ("against", against)):
        for named in [named_files] if isinstance(named_files, str) else named_files or ():
            files, more, tests = find(named, key=f"data.{kind}")
            own = columns if kind == "validation" else {}
            how = format if kind == "validation" else "auto"
            sources.append(Source(named, kind, tuple(files + more + tests), 1.0, how, own))
    names = Counter(s.name for s in sources if s.kind == "train")
    double = [name for name, n in names.items() if n > 1]
    if double:
        raise UserError(f"data.path: {double[0]} is named twice; for more weight use {{path: {double[0]}, weight: 2}}")
    return sources, aside


def _bands(threshold: float, permutations: int) -> tuple[int, int]:
    """(bands, rows a band) of the LSH. Candidates are verified, so recall weighs more than precision here."""
    from datasketch import MinHashLSH

    lsh = MinHashLSH(threshold=threshold, num_perm=permutations, weights=(0.1, 0.9))
    return int(lsh.b), int(lsh.r)


# --- first pass --------------------------------------------------------------------------------------------------


class Rows:
    """All rows that could be read, as arrays; a row is a number. Some 40 bytes each, the texts stay on disk."""

    def __init__(self, cleaned: list[Cleaned], sources: list[Source]) -> None:
        self.cleaned = cleaned
        self.sources = sources
        self.blocks = [c.block for c in cleaned]
        counts = [len(c.status) for c in cleaned]
        self.bases = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self.source = np.repeat(np.array([c.source for c in cleaned], np.int16), counts)
        kinds = np.array([kind_of(s) for s in sources], np.int8)
        self.kind = kinds[self.source]
        self.keys = np.concatenate([c.keys for c in cleaned]) if cleaned else np.zeros((0, 2), U64)
        self.status = np.concatenate([c.status for c in cleaned]) if cleaned else np.zeros(0, np.uint8)
        self.ids = np.concatenate([c.ids for c in cleaned]) if cleaned else np.zeros(0, U64)
        ours = [c for c in cleaned if sources[c.source].kind != "against"]
        self.seen = sum(c.seen for c in ours)
        self.rejected: Counter[str] = Counter(r for c in ours for r in c.reject_reasons)

    def __len__(self) -> int:
        return len(self.status)

    def place(self, row: int) -> tuple[int, int]:
        """(number of the block in `blocks`, row in it)."""
        number = int(np.searchsorted(self.bases, row, "right")) - 1
        return number, row - int(self.bases[number])


def _clean(rules: Rules, work: Path, made: Path, processes: Pool) -> list[Cleaned]:
    progress = Progress("read and clean", "rows")
    result = []
    with (made / "rejects.jsonl").open("w", encoding="utf-8") as rejects:
        for cleaned in processes.map(clean_block, ((rules, work, b) for b in blocks(list(rules.sources)))):
            for reject in cleaned.rejects:
                _write_reject(rejects, reject)
            reasons = [r["reason"] for r in cleaned.rejects]
            example = cleaned.rejects[:1]
            for shown in example:
                shown["row"] = None
            result.append(replace(cleaned, rejects=example, reject_reasons=reasons))
            progress.add(cleaned.seen)
    progress.done()
    return result


def _write_reject(file: Any, reject: dict[str, Any]) -> None:
    line = json.dumps(reject, ensure_ascii=False, default=str)
    file.write(line.encode("utf-8", "replace").decode() + "\n")


def _too_many_rejects(
    rejected: Counter[str], seen: int, most: float, made: Path, final: Path, sources: list[Source]
) -> None:
    total = sum(rejected.values())
    if not seen:
        named = ", ".join(s.name for s in sources if s.kind == "train")
        raise UserError(f"data.path={named}: the data set is empty; give a file with at least one row")
    if total <= most * seen:
        return
    kept = final.parent / f"rejects-{final.name[:12]}.jsonl"
    shutil.copyfile(made / "rejects.jsonl", kept)
    with kept.open(encoding="utf-8") as file:
        example = json.loads(file.readline())
    reasons = ", ".join(f"{reason} {n:,}" for reason, n in rejected.most_common(3))
    raise UserError(
        f"data.max_rejects={most}: {total:,} of {seen:,} rows can't be used ({reasons}); the first: "
        f"{example['file']} line {example['line']}: {example['reason']}: {_short(example['detail'])}; all: {kept}"
    )


def _short(text: str, most: int = 300) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"


# --- decisions ---------------------------------------------------------------------------------------------------


class Found:
    """What was decided of each row: `side` is 0 (out), TRAIN or VALIDATION; with the evidence for the report."""

    def __init__(self, rows: int) -> None:
        nothing = duplicates.Twins(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))
        self.side = np.zeros(rows, np.uint8)
        self.exact = nothing
        self.near = nothing
        self.near_removed = False
        self.contaminated = nothing
        self.filtered: dict[str, int] = {}
        self.times = np.ones(rows, np.int16)
        self.notes: list[str] = []


def _decide(
    rows: Rows,
    rules: Rules,
    work: Path,
    processes: Pool,
    *,
    exact_duplicates: str,
    near_duplicates: str,
    near_threshold: float,
    validation_share: float,
    explicit: bool,
    stratify: bool,
    boilerplate: int,
) -> Found:
    found = Found(len(rows))
    alive = rows.status == KEPT
    train = rows.kind == 2
    found.filtered = {name: int((rows.status == 1 + i).sum()) for i, name in enumerate(FILTERS)}
    twice: list[duplicates.Twins] = []

    progress = Progress("duplicates", "rows")
    if exact_duplicates == "remove":
        twins = duplicates.exact(rows.keys, alive)
        twins = _pick(twins, train[twins.later])
        from_tests = rows.kind[twins.earlier] == 0
        found.exact = _pick(twins, ~from_tests)
        twice.append(_pick(twins, from_tests))
        alive[twins.later] = False
    root = np.arange(len(rows))
    if near_duplicates != "off":
        twins = duplicates.near(
            work, rows.blocks, rows.bases, alive, bands=rules.bands, threshold=near_threshold, pool=processes
        )
        if near_duplicates == "keep":
            from_tests = (rows.kind[twins.earlier] == 0) & train[twins.later]
            root = duplicates.components(_pick(twins, rows.kind[twins.earlier] == 2), len(rows))
        else:
            twins = duplicates.greedy(twins, len(rows), train)
            found.near_removed = True
            alive[twins.later] = False
            from_tests = rows.kind[twins.earlier] == 0
            twice.append(_pick(twins, from_tests))
        found.near = _pick(twins, ~from_tests)
    progress.add(len(rows))

    mine = np.flatnonzero(alive & train)
    found.side[mine] = TRAIN
    if explicit:
        found.side[alive & (rows.kind == 1)] = VALIDATION
    elif validation_share and len(mine):
        draw = _draw(rows.keys[root], rules.seed)
        held = np.zeros(len(rows), bool)
        if stratify:
            for source in np.unique(rows.source[mine]):
                own = mine[rows.source[mine] == source]
                count = round(validation_share * len(own))
                held[own[np.argsort(draw[own], kind="stable")[:count]]] = True
            held = held[root] & alive & train
        else:
            held[mine] = draw[mine] < validation_share
        if not held.any() and len(mine) > 1:
            held[mine[np.argmin(draw[mine])]] = True
            found.notes.append("the share would leave no validation row; one is held out all the same")
        if held[mine].all() and len(mine) > 1:
            held[mine[np.argmax(draw[mine])]] = False
            found.notes.append("the share would leave no training row; one is kept all the same")
        found.side[held] = VALIDATION

    if rules.ngram:
        side = np.zeros(len(rows), np.uint8)
        side[(rows.kind == 0) | (found.side == VALIDATION)] = 1
        side[found.side == TRAIN] = 2
        if (side == 1).any():
            bad, because = duplicates.contaminated(
                work, rows.blocks, rows.bases, side, boilerplate=boilerplate, pool=processes
            )
            twice.append(duplicates.Twins(bad, because, np.zeros(len(bad))))
            found.side[bad] = 0
    if twice:
        found.contaminated = duplicates.Twins(*(np.concatenate(parts) for parts in zip(*twice, strict=True)))
    weights = np.array([s.weight for s in rules.sources])[rows.source]
    whole = np.floor(weights)
    found.times = (whole + (_draw(rows.keys, rules.seed + 1) < weights - whole)).astype(np.int16)
    progress.done()
    if not (found.side == TRAIN).any():
        left = "" if not len(mine) else " (all that was left shares text with the validation rows)"
        raise UserError(f"data.path: no training row is left after cleaning{left}; see data.* filters and duplicates")
    return found


def _pick(twins: duplicates.Twins, which: np.ndarray) -> duplicates.Twins:
    return duplicates.Twins(*(part[which] for part in twins))


def _draw(keys: np.ndarray, seed: int) -> np.ndarray:
    """A number in [0, 1) for each row: a function of its content and the seed alone."""
    x = keys[:, 0] ^ (keys[:, 1] + U64((0x9E3779B97F4A7C15 * (seed + 1)) % (1 << 64)))
    for factor in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB):
        x = (x ^ (x >> U64(31))) * U64(factor)
    return (x >> U64(11)).astype(np.float64) / (1 << 53)


# --- second pass -------------------------------------------------------------------------------------------------


class Sequences:
    """All encoded sequences in the order of the rows, as arrays."""

    def __init__(self, encoded: list[Encoded], bases: np.ndarray) -> None:
        empty = np.zeros(0, np.int32)
        self.lengths = np.concatenate([e.lengths for e in encoded] or [empty])
        self.side = np.concatenate([e.side for e in encoded] or [empty])
        self.trained = np.concatenate([e.trained for e in encoded] or [empty])
        self.parts = np.concatenate([e.parts for e in encoded] or [empty.reshape(0, 3)])
        self.row = np.concatenate([e.rows + bases[i] for i, e in enumerate(encoded)] or [empty]).astype(np.int64)
        self.offsets = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])[:-1]
        self.overlong: Counter[str] = Counter()
        for e in encoded:
            self.overlong.update(e.overlong)
        self.dropped = np.concatenate([e.dropped + bases[i] for i, e in enumerate(encoded)] or [empty]).astype(np.int64)


def _encode(rows: Rows, found: Found, laying: Laying, work: Path, made: Path, processes: Pool) -> Sequences:
    progress = Progress("tokenise", "rows")
    sources = [c.source for c in rows.cleaned]
    tasks = (
        (
            work,
            laying,
            rows.sources[sources[i]],
            rows.cleaned[i].file,
            block,
            found.side[rows.bases[i] : rows.bases[i + 1]],
        )
        for i, block in enumerate(rows.blocks)
    )
    done = []
    with (
        (made / "rejects.jsonl").open("a", encoding="utf-8") as rejects,
        (made / "validation_rows.jsonl").open("w", encoding="utf-8") as validation,
        (work / "ids.bin").open("wb") as ids,
        (work / "marks.bin").open("wb") as marks,
    ):
        for i, encoded in enumerate(processes.map(encode_block, tasks)):
            for reject in encoded.rejects:
                _write_reject(rejects, reject)
                rows.rejected[reject["reason"]] += 1
            validation.write(encoded.validation)
            for name, file in (("ids", ids), ("marks", marks)):
                piece = work / f"{name}-{encoded.block}.bin"
                with piece.open("rb") as part:
                    shutil.copyfileobj(part, file, 1 << 20)
                piece.unlink()
            done.append(replace(encoded, rejects=[], validation=""))
            progress.add(int(rows.bases[i + 1] - rows.bases[i]))
    progress.done()
    sequences = Sequences(done, rows.bases)
    if not (sequences.side == TRAIN).any():
        raise UserError(
            f"data.mask={laying.mask}: no supervised token in the whole training set; see data.mask, "
            f"data.overlong={laying.overlong} and train.max_length={laying.max_length}"
        )
    return sequences


def _write(
    rows: Rows,
    times: np.ndarray,
    sequences: Sequences,
    laying: Laying,
    packing: bool,
    seed: int,
    key: str,
    work: Path,
    made: Path,
    processes: Pool,
) -> dict[str, Any]:
    """Packs and writes both parts; returns their sizes."""
    progress = Progress("pack and write", "rows")
    sizes: dict[str, Any] = {}
    columns = DPO_COLUMNS if laying.task == "dpo" else SFT_COLUMNS
    for name, side in (("train", TRAIN), ("validation", VALIDATION)):
        chosen = np.flatnonzero(sequences.side == side)
        if side == TRAIN:
            chosen = np.repeat(chosen, times[sequences.row[chosen]])
        lengths = sequences.lengths[chosen]
        if packing and laying.task == "sft":
            bin_of, count = pack.best_fit_decreasing(lengths, laying.max_length)
            # bins come out longest sequence first; the order of rows must not depend on length
            shuffled = np.random.Generator(np.random.PCG64([seed, side])).permutation(count)
            bin_of = shuffled[bin_of]
            order = np.lexsort((np.arange(len(bin_of)), bin_of))
            per_row = np.bincount(bin_of, minlength=count)
        else:
            order, per_row = np.arange(len(chosen)), np.ones(len(chosen), np.int64)
        chosen = chosen[order]
        folder = made / name
        folder.mkdir()
        shards = _shards(folder, laying.task, sequences, rows, chosen, per_row)
        for written in processes.map(write, ((work, shard) for shard in shards)):
            progress.add(written)
        arrow.finish(folder, columns, [s.path.name for s in shards], fingerprint=f"{key[:30]}{name}")
        sizes[name] = {
            "rows": len(per_row),
            "sequences": len(chosen),
            "tokens": int(lengths.sum()),
            "supervised": int(sequences.trained[chosen].sum()),
            "lengths": lengths,
        }
    progress.done()
    return sizes


def _shards(
    folder: Path, task: str, sequences: Sequences, rows: Rows, chosen: np.ndarray, per_row: np.ndarray
) -> list[Shard]:
    """Cuts the rows into files of limited size."""
    first = np.concatenate([[0], np.cumsum(per_row)])
    tokens = np.concatenate([[0], np.cumsum(sequences.lengths[chosen], dtype=np.int64)])[first]
    cuts = [0]
    while cuts[-1] < len(per_row):
        limit = tokens[cuts[-1]] + arrow.SHARD_TOKENS
        cuts.append(max(cuts[-1] + 1, int(np.searchsorted(tokens, limit, "right")) - 1))
    if len(cuts) == 1:
        cuts.append(0)  # an empty part is one empty file
    result = []
    for number, (start, stop) in enumerate(zip(cuts, cuts[1:], strict=False)):
        which = chosen[first[start] : first[stop]]
        result.append(
            Shard(
                folder / f"data-{number:05d}-of-{len(cuts) - 1:05d}.arrow",
                task,
                sequences.offsets[which],
                sequences.lengths[which],
                rows.source[sequences.row[which]].astype(np.int32),
                sequences.parts[which],
                per_row[start:stop],
            )
        )
    return result
