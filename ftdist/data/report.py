"""What happened to the data: data_report.json, and the same in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ftdist.data.clean import FILTERS, json_line, load_rows, row_texts
from ftdist.data.encode import REPLAY, TRAIN, VALIDATION
from ftdist.data.text import SCRIPTS

_EXAMPLES = 5
_SHOWN = 400  # characters of an example


def summarise(
    *,
    rows: Any,
    found: Any,
    encoded: Any,
    sizes: dict[str, Any],
    training: np.ndarray,
    replayed: Any,
    sources: list[Any],
    work: Path,
    folder: Path,
    template: dict[str, Any],
    laying: Any,
    left_aside: list[str],
    key: str,
) -> dict[str, Any]:
    """data_report.json, and dropped.jsonl beside it."""
    final_train, final_validation = (encoded.rows_of(side, len(rows)) for side in (TRAIN, VALIDATION))
    unused = encoded.rows_of(REPLAY, len(rows))  # of the general rows, once those that are used are taken out of it
    final_train[encoded.row[training]] = True
    unused &= ~final_train
    ours = rows.kind != 0
    ids = rows.ids[ours & (rows.ids != 0)]
    train, validation = sizes["train"], sizes["validation"]
    scripts = sum((c.scripts for c in rows.cleaned), np.zeros(len(SCRIPTS), np.int64))
    letters = max(int(scripts[1:].sum()), 1)
    _write_dropped(rows, found, encoded, sources, folder / "dropped.jsonl")
    shown = _shown(found, rows, sources, work)
    summary: dict[str, Any] = {
        "rows_in": rows.seen,
        "rejected": sum(rows.rejected.values()),
        "filtered": sum(found.filtered.values()),
        "duplicates_exact": len(found.exact.later),
        "duplicates_near": len(found.near.later),
        "contaminated": len(found.contaminated.later),
        "overlong_dropped": int(encoded.overlong["dropped"]),
        "train": int(final_train.sum()),
        "validation": int(final_validation.sum()),
        "tokens": train["tokens"],
        "supervised_tokens": train["supervised"],
        "supervised_share": round(train["supervised"] / max(train["tokens"], 1), 4),
        "validation_tokens": validation["tokens"],
        "validation_supervised_tokens": validation["supervised"],
        "train_rows": train["rows"],
        "validation_rows": validation["rows"],
        "train_sequences": train["sequences"],
        "fill": round(train["tokens"] / max(train["rows"] * laying.max_length, 1), 4),
        "max_length": laying.max_length,
        "token_lengths": _quantiles(train["lengths"]),
        "rejects": dict(rows.rejected.most_common()),
        "filters": found.filtered,
        "overlong": dict(encoded.overlong),
        "duplicated_ids": int(len(ids) - len(np.unique(ids))),
        "scripts": {
            SCRIPTS[i]: round(int(scripts[i]) / letters, 4) for i in np.argsort(-scripts[1:]) + 1 if scripts[i]
        },
        "sources": _sources(rows, sources, final_train, final_validation, sizes["train"]["by_source"]),
        "template": {"origin": template["origin"], "keywords": template["keywords"]},
        "mask": laying.mask,
        "left_aside": left_aside,
        "ignored_columns": sorted(set().union(*(c.ignored for c in rows.cleaned)))[:20],
        "notes": found.notes,
        "examples": {
            "duplicates_exact": _examples(found.exact, shown),
            "duplicates_near": _examples(found.near, shown),
            "contaminated": _examples(found.contaminated, shown),
        },
        "fingerprint": key,
    }
    if replayed is not None:
        summary["replay"] = {
            **replayed.facts,
            "rows": int((final_train & (rows.kind == 3)).sum()),
            "rows_unused": int(unused.sum()),
        }
    if laying.task == "dpo":
        summary["preference"] = _preference(encoded)
    return summary


def _quantiles(lengths: np.ndarray) -> dict[str, int]:
    if not len(lengths):
        return {}
    points = np.percentile(lengths, [0, 25, 50, 75, 95, 99, 100], method="nearest")
    return dict(zip(("min", "q25", "median", "q75", "q95", "q99", "max"), map(int, points), strict=True))


def _sources(
    rows: Any, sources: list[Any], train: np.ndarray, validation: np.ndarray, by_source: list[tuple[int, int]]
) -> list[dict[str, Any]]:
    """Tokens are those of an epoch of training."""
    result = []
    for number, source in enumerate(sources):
        result.append(
            {
                "name": source.name,
                "kind": source.kind,
                "weight": source.weight,
                "files": [str(f) for f in source.files],
                "rows_in": sum(c.seen for c in rows.cleaned if c.source == number),
                "train": int((train & (rows.source == number)).sum()),
                "validation": int((validation & (rows.source == number)).sum()),
                "tokens": by_source[number][0],
                "supervised_tokens": by_source[number][1],
            }
        )
    return result


def _preference(encoded: Any) -> dict[str, Any]:
    """Length bias: a model can learn to write more instead of better."""
    parts = encoded.parts[encoded.side == TRAIN]
    chosen, rejected = parts[:, 1].astype(float), parts[:, 2].astype(float)
    return {
        "chosen_tokens_mean": round(float(chosen.mean()), 1),
        "rejected_tokens_mean": round(float(rejected.mean()), 1),
        "chosen_longer_share": round(float((chosen > rejected).mean()), 4),
        "rejected_longer_share": round(float((chosen < rejected).mean()), 4),
    }


def _examples(twins: Any, shown: dict[int, dict[str, str]]) -> list[dict[str, Any]]:
    return [
        {"overlap": round(float(overlap), 3), "row": shown[int(later)], "like": shown[int(earlier)]}
        for later, earlier, overlap in zip(*(part[:_EXAMPLES] for part in twins), strict=True)
    ]


def _shown(found: Any, rows: Any, sources: list[Any], work: Path) -> dict[int, dict[str, str]]:
    """Place and text of every row that is an example; each block is read once."""
    wanted = [part[:_EXAMPLES] for twins in (found.exact, found.near, found.contaminated) for part in twins[:2]]
    result: dict[int, dict[str, str]] = {}
    block = -1
    loaded: list[dict[str, Any]] = []
    lines: list[int] = []
    for row in np.unique(np.concatenate(wanted)).tolist():
        number, inside = rows.place(row)
        cleaned = rows.cleaned[number]
        if cleaned.block != block:
            block = cleaned.block
            loaded, lines = load_rows(work, block)
        text = "\n".join(part for part in row_texts(loaded[inside]) if part)
        where = f"{sources[cleaned.source].files[cleaned.file]}:{lines[inside]}"
        result[row] = {"where": where, "text": text if len(text) <= _SHOWN else text[:_SHOWN] + "…"}
    return result


def _write_dropped(rows: Any, found: Any, encoded: Any, sources: list[Any], path: Path) -> None:
    """A line for each usable row that was left out, with the reason and the row that it repeats."""
    parts: list[tuple[Any, ...]] = []
    reasons = ["duplicate", "near-duplicate", "contaminated", "overlong", *FILTERS]
    for code, twins in enumerate((found.exact, found.near, found.contaminated)):
        if twins is not found.near or found.near_removed:
            parts.append((twins.later, np.full(len(twins.later), code), twins.earlier, twins.overlap))
    filtered = np.flatnonzero(rows.status)
    for which, codes in ((encoded.dropped, 3), (filtered, rows.status[filtered].astype(int) + 3)):
        parts.append((which, np.zeros(len(which), int) + codes, np.full(len(which), -1), np.zeros(len(which))))
    out, why, likes, overlaps = (np.concatenate(columns) for columns in zip(*parts, strict=True))

    def where(row: int) -> dict[str, Any]:
        cleaned = rows.cleaned[rows.place(row)[0]]
        return {"file": str(sources[cleaned.source].files[cleaned.file]), "line": int(rows.lines[row])}

    with path.open("w", encoding="utf-8") as file:
        for i in np.argsort(out, kind="stable"):
            entry = {**where(int(out[i])), "reason": reasons[why[i]]}
            if likes[i] >= 0:
                entry |= {"like": where(int(likes[i])), "overlap": round(float(overlaps[i]), 4)}
            file.write(json_line(entry))


def words(prepared: Path) -> str:
    """The report of a prepared data set in a dozen lines."""
    r = json.loads((prepared / "data_report.json").read_text(encoding="utf-8"))
    out = [
        f"rows in             {r['rows_in']:>12,}",
        f"  rejected          {r['rejected']:>12,}  {_list(r['rejects'])}",
        f"  filtered          {r['filtered']:>12,}  {_list(r['filters'])}",
        f"  exact duplicates  {r['duplicates_exact']:>12,}",
        f"  near-duplicates   {r['duplicates_near']:>12,}",
        f"  contaminated      {r['contaminated']:>12,}",
        f"  too long          {r['overlong_dropped']:>12,}  {_list(r['overlong'])}",
        f"train               {r['train']:>12,}  {r['tokens']:,} tokens, {r['supervised_share']:.1%} trained on",
        f"validation          {r['validation']:>12,}  {r['validation_tokens']:,} tokens",
        f"pairs               {r['train_rows']:>12,}  of two answers, {r['max_length']:,} tokens each at most"
        if "preference" in r
        else f"packed rows         {r['train_rows']:>12,}  of {r['max_length']:,} tokens, {r['fill']:.1%} full",
        f"tokens a sequence   {_list(r['token_lengths'])}",
        f"template            {r['template']['origin']}; mask {r['mask']}",
        f"scripts             {', '.join(f'{k} {v:.1%}' for k, v in list(r['scripts'].items())[:5])}",
    ]
    if "replay" in r:
        general = r["replay"]
        trained = general["supervised_tokens"] / max(r["supervised_tokens"], 1)
        times = f", each {general['passes']:.3g} times" if general["passes"] > 1 else ""
        out.append(
            f"general rows        {general['rows']:>12,}  {general['tokens']:,} tokens, {general['share']:.2%} of all "
            f"(asked: {general['share_asked']:.2%}), {trained:.2%} of what is trained on{times}; "
            f"{general['rows_unused']:,} rows are not needed"
        )
    if "preference" in r:
        out.append(f"preference          {_list(r['preference'])}")
    if r["ignored_columns"]:
        out.append(f"columns not read    {', '.join(r['ignored_columns'])}")
    out += [f"left aside          {name} (a test or held-out file)" for name in r["left_aside"]]
    out += [f"note                {note}" for note in r["notes"]]
    return "\n".join(out)


def _list(counts: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v:,}" for k, v in counts.items() if v)
