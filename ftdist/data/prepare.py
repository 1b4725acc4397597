"""A user's data → the prepared data set of a run: read, clean, decide, tokenise, pack, report. Start
reading here."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

import numpy as np
from pydantic import Field
from typing_extensions import TypedDict

from ftdist.data import cache, report
from ftdist.data import replay as replaying
from ftdist.data.assemble import encode, trained_on, write_parts
from ftdist.data.clean import Cleaned, Rules, clean_block, json_line
from ftdist.data.clean import columns as columns_of_rows
from ftdist.data.column import Columns
from ftdist.data.decide import Rows, decide, drawn
from ftdist.data.encode import TRAIN, Laying
from ftdist.data.formats import COLUMNS
from ftdist.data.pool import Pool, Progress, cores, pool
from ftdist.data.reading import blocks
from ftdist.data.sources import KINDS, Source, chosen
from ftdist.data.text import SCRIPTS
from ftdist.errors import UserError

_SMALL = 8 << 20  # bytes of input below which processes cost more than they save

Share = Annotated[float, Field(ge=0, lt=1)]
Format = Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "question_answer", "text", "preference"]


class Part(TypedDict):
    """One of several sources: `weight` is how often an epoch holds each of its rows (0.5: a fixed half of
    them)."""

    __pydantic_config__ = {"extra": "forbid"}  # type: ignore[misc]  # noqa: RUF012  (pydantic reads it)
    path: str
    name: NotRequired[str]
    weight: NotRequired[Annotated[float, Field(gt=0, le=100)]]
    format: NotRequired[Format]
    columns: NotRequired[dict[str, str]]


class General(TypedDict):
    """One of several sources of general data."""

    __pydantic_config__ = {"extra": "forbid"}  # type: ignore[misc]  # noqa: RUF012  (pydantic reads it)
    path: str
    name: NotRequired[str]
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
    replay: str | list[str | General] | None,
    replay_share: Annotated[float, Field(gt=0, lt=1)] | None,
    replay_repeats: Annotated[int, Field(ge=1)],
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
    """The folder of the prepared data set: `train/` and `validation/` (Arrow, as datasets.load_from_disk
    reads it), `validation_rows.jsonl`, `rejects.jsonl`, `dropped.jsonl`, `data_report.json`,
    `chat_template.jinja`.

    Columns for task=sft: input_ids, labels (not shifted, -100 where not trained on), lengths (of the
    sequences packed into the row), sources (of each sequence); for task=dpo: prompt_ids, chosen_ids,
    rejected_ids. The folder's name is a hash of all that decides its content; if it exists, nothing is done.
    UserError for every mistake of the user.
    """
    options = {k: v for k, v in locals().items() if k not in ("workers", "cache_dir", "tokenizer_path")}
    _check(columns, scripts, overlong, task)
    _check_replay(replay, replay_share, task)
    sources, aside = chosen(
        path,
        format=format,
        columns=columns,
        validation=validation,
        against=against,
        replay=replay,
        cache_dir=cache_dir,
        seed=seed,
        task=task,
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
    options |= dict.fromkeys(("path", "validation", "against", "replay"))  # the files' content counts, not their place
    key = cache.key(options, files)
    final = cache_dir / key
    if (final / "data_report.json").is_file():
        return final

    lsh = lsh_bands(near_threshold, near_permutations) if near_duplicates != "off" else (0, 0)
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
        bands=lsh[0],
        band_rows=lsh[1],
        ngram=contamination_ngram if decontaminate else None,
    )
    size = sum(
        f.stat().st_size * (4 if f.suffix in (".gz", ".zst", ".parquet") else 1) for s in sources for f in s.files
    )
    count = workers or cores()
    made = cache.workplace(final)
    work = made / "work"
    work.mkdir()
    try:
        with pool(1 if size < _SMALL else count) as processes, ThreadPoolExecutor(1) as beside:
            # importing transformers takes seconds in which this process has little else to do
            loading = beside.submit(
                _freeze,
                tokenizer_path,
                revision=revision,
                trust_remote_code=trust_remote_code,
                chat_template=chat_template,
                keywords=template_keywords,
                to=work / "tokenizer",
            )
            cleaned, numbers = _clean(rules, work, made, processes, loading)
            frozen = loading.result()
            rows = Rows(cleaned, numbers.mapped(), sources)
            _check_renamed(sources, cleaned)
            _too_many_rejects(rows.rejected, rows.seen, max_rejects, made, final, sources)
            held_out = [s.name for s in sources if s.kind == "validation"]
            if held_out and not (rows.kind == KINDS.index("validation")).any():
                raise UserError(
                    f"data.validation={', '.join(held_out)}: holds no row that can be used; give one that does, or "
                    "leave it out: data.validation_share holds rows out"
                )
            found = decide(
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
            encoded = encode(rows, found, laying, work, made, processes)
            _too_many_rejects(rows.rejected, rows.seen, max_rejects, made, final, sources)
            if not (encoded.side == TRAIN).any():
                raise UserError(
                    f"data.mask={mask}: no supervised token in the whole training set; see data.mask, "
                    f"data.overlong={overlong} and train.max_length={max_length}"
                )
            training, replayed = trained_on(found.times, encoded), None
            if replay_share is not None:
                draw = drawn(rows.keys, seed + 2, work)
                replayed = replaying.choose(encoded, training, draw, share=replay_share, repeats=replay_repeats)
                training = np.concatenate([training, replayed.sequences])
            sizes = write_parts(rows, training, encoded, laying, packing, seed, key, work, made, processes)
        (made / "chat_template.jinja").write_text(frozen["template"], encoding="utf-8")
        summary = report.summarise(
            rows=rows,
            found=found,
            encoded=encoded,
            sizes=sizes,
            training=training,
            replayed=replayed,
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


# --- what was asked for ---------------------------------------------------------------------------


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


def _check_renamed(sources: list[Source], cleaned: list[Cleaned]) -> None:
    """A column that the user names is there, in some row at least."""
    found = {name for block in cleaned for name in block.renamed}
    for source in sources:
        for ours, theirs in source.columns.items():
            if theirs not in found:
                has = ", ".join(next((b.first for b in cleaned if sources[b.source] is source), ())) or "none"
                raise UserError(
                    f"data.columns.{ours}={theirs}: no row has such a column; those of {source.name}: {has} "
                    "(our name: yours)"
                )


def _check_replay(replay: Any, share: float | None, task: str) -> None:
    if replay is None and share is not None:
        raise UserError(f"data.replay_share={share}: of which data? set data.replay=FILE, or leave it out")
    if replay is not None and share is None:
        raise UserError(
            f"data.replay={replay}: which share of the tokens? set data.replay_share, e.g. 0.05, or leave it out"
        )
    if replay is not None and task != "sft":
        raise UserError("data.replay: general data can be mixed in for task=sft alone; leave it out")


def lsh_bands(threshold: float, permutations: int) -> tuple[int, int]:
    """(bands, rows a band) of the LSH: as many rows as leave a pair at the threshold a chance of 99.5 % to be found.

    Candidates are verified, so bands that let too many through cost time, not correctness.
    """
    found = 0.995
    for rows in range(permutations, 1, -1):
        bands = permutations // rows
        if 1 - (1 - threshold**rows) ** bands >= found:
            return bands, rows
    return permutations, 1


# --- first pass -----------------------------------------------------------------------------------


def _freeze(path: str, **options: Any) -> dict[str, Any]:
    from ftdist.data.tokens import freeze_tokenizer

    return freeze_tokenizer(path, **options)


def _clean(
    rules: Rules, work: Path, made: Path, processes: Pool, loading: Future[dict[str, Any]]
) -> tuple[list[Cleaned], Columns]:
    """The first pass: the blocks without their numbers, and these. It stops as soon as the tokenizer turns out to be
    unusable."""
    progress = Progress("read and clean", "rows")
    result, numbers, none = [], columns_of_rows(work), np.zeros(0)
    with (made / "rejects.jsonl").open("w", encoding="utf-8") as rejects:
        for cleaned in processes.map(clean_block, ((rules, work, b) for b in blocks(list(rules.sources)))):
            for reject in cleaned.rejects:
                rejects.write(json_line(reject))
            reasons = [r["reason"] for r in cleaned.rejects]
            example = cleaned.rejects[:1]
            for shown in example:
                shown["row"] = None
            arrays = {name: getattr(cleaned, name) for name in ("lines", "status", "keys", "ids")}
            numbers.append(**arrays)
            result.append(
                replace(cleaned, rejects=example, reject_reasons=reasons, **dict.fromkeys(arrays, none))  # type: ignore[arg-type]
            )
            progress.add(cleaned.seen)
            if loading.done():
                loading.result()
    progress.done()
    return result, numbers


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
    detail = f" ({_short(example['detail'])})" if example["detail"] else ""
    raise UserError(
        f"data.max_rejects={most}: {total:,} of {seen:,} rows can't be used ({reasons}); the first is "
        f"{example['file']} line {example['line']}: {example['reason']}{detail}; all: {kept}"
    )


def _short(text: str, most: int = 300) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"
