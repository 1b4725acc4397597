"""The page itself: HTML without a script, a font or a picture from anywhere else; light, dark, on paper, on a phone."""

from __future__ import annotations

import base64
import datetime
import difflib
import json
import math
import re
from collections import Counter
from collections.abc import Collection
from html import escape
from importlib.resources import files
from typing import Any

from ftdist import rundir
from ftdist.evaluate import tables
from ftdist.report import compare
from ftdist.report.compare import Comparison
from ftdist.report.gather import Run, tasks
from ftdist.report.phases import OWN, PHASES
from ftdist.report.plots import MARKS, PAIRS, SERIES
from ftdist.tracking import duration

DARK = ("#58a6ff", "#f0883e", "#3fb950", "#bc8cff", "#ff7b72", "#d29922", "#39c5cf", "#f778ba")
LONG = 1500  # characters of an answer that are shown
COLUMNS = 6  # keys that stand in the table of results; more have a table of their own
EVENTS = 60  # shown, the last ones
JUDGED = {"early-stop": "Ended early: ", "overfitting": "WARNING: ", "best-restored": "", "best-missing": "WARNING: "}
DETAILS = ("grad_norm", "loss_by_rank")  # of events, which their text or the plots say
STYLE = files(__package__) / "style.css"


def of_run(run: Run, svgs: dict[str, str]) -> str:
    """The page of one run."""
    parts = [
        f"<h1>{escape(run.name)}</h1>",
        f'<p class="soft">{escape(_subtitle(run))}</p>',
        _verdict(run),
        _section("Evaluation", _evaluation(run), _plots(svgs, ("differences", "target_retention"))),
        _section("Answers", _samples(run)),
        _section(
            "Training",
            _plots(svgs, ("loss", "retention", "answers", "learning_rate", "gradient_norm", "throughput", "memory")),
            _planned(run),
        ),
        _section("Where the time went", _phases(run), _plots(svgs, ("step_seconds",))),
        _section("Preferences", _plots(svgs, [name.replace("/", "_") for name in PAIRS])),
        _section("Checkpoints, restarts, faults", _plots(svgs, ("time_line",)), _events(run)),
        _section("Spectrum", _selection(run)),
        _section("Configuration", _configuration(run)),
        _section("Data", _data(run)),
        _section("Export", _export(run)),
        _section("Again", _again(run)),
    ]
    return _document(run.name, parts)


def of_several(several: Comparison, svgs: dict[str, str]) -> str:
    """The page that compares runs."""
    runs = several.runs
    parts = [
        f"<h1>{escape(several.title)}</h1>",
        f'<p class="verdict">{escape(_best(several))}</p>',
        _section("Results", _results(several)),
        _section("Plots", _plots(svgs, list(svgs))),
        _section("What differs", _differing(several)),
        _section("The best again", f"<pre>{escape(several.again)}</pre>" if several.again else ""),
        _section("Runs", "".join(f"<p><b>{escape(run.name)}</b>: {escape(_words(run))}</p>" for run in runs)),
    ]
    return _document(several.title, parts)


def _document(title: str, parts: list[str]) -> str:
    light = " ".join(f"--c{i}: {pair[0]};" for i, pair in enumerate(SERIES))
    dark = " ".join(f"--c{i}: {colour};" for i, colour in enumerate(DARK))
    style = STYLE.read_text(encoding="utf-8").replace("%light%", light).replace("%dark%", dark)
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{escape(title)} · ftdist</title><style>{style}</style></head>\n'
        f"<body>\n{body}\n</body></html>\n"
    )


def _section(title: str, *contents: str) -> str:
    inside = "\n".join(content for content in contents if content)
    return f"<h2>{title}</h2>\n{inside}" if inside else ""


def _plots(svgs: dict[str, str], names: Any) -> str:
    chosen = [f"<figure>{svgs[name]}</figure>" for name in names if name in svgs]
    return f'<div class="plots">{"".join(chosen)}</div>' if chosen else ""


# --- words ----------------------------------------------------------------------------------------


def _subtitle(run: Run) -> str:
    plan = run.plan
    parts = [str(plan.get("model", "")).rstrip("/").rpartition("/")[2], plan.get("task"), plan.get("strategy"),
             plan.get("engine"), plan.get("precision")]  # fmt: skip
    return " · ".join(str(part) for part in parts if part)


def _verdict(run: Run) -> str:
    shared = run.metrics.get("overlap") or {}
    bad = bool(shared.get("rows")) or not run.finished
    return f'<p class="verdict{" warning" if bad else ""}">{escape(_words(run))}</p>'


def _words(run: Run) -> str:
    """What came out, in one paragraph."""
    plan, metrics = run.plan, run.metrics
    trained = plan.get("trainable_parameters")
    said = []
    steps = run.steps[-1]["step"] if run.steps else 0
    what = f"{steps:,} steps" + (
        f" over {run.steps[-1]['tokens']:,} tokens" if run.steps and run.steps[-1].get("tokens") else ""
    )
    if run.finished:
        said.append(
            f"Finished: {what}, {trained:,} of {plan['total_parameters']:,} parameters trained."
            if trained
            else f"Finished: {what}."
        )
    else:
        last = run.events[-1] if run.events else {}
        why = f" Rank {run.errors[0].get('rank')} failed: {run.errors[0].get('message')}." if run.errors else ""
        if last.get("event") == "failed":  # which names the first; the others only miss it
            why = f" It failed: {last.get('reason')}."
        said.append(f"Not finished; so far {what}.{why}")
    held = [row["eval_loss"] for row in run.held_out if row.get("eval_loss") is not None]
    base, tuned = metrics.get("base", {}), metrics.get("tuned", {})
    if base.get("loss") is not None and tuned.get("loss") is not None:
        said.append(
            f"Held-out loss {base['loss']:.4g} → {tuned['loss']:.4g} (perplexity {base['perplexity']:.4g} → "
            f"{tuned['perplexity']:.4g})."
        )
    elif held:
        said.append(f"Held-out loss at the end {held[-1]:.4g}.")
    for name in ("extracted_match", "exact_match", "g_eval", "rougeL"):
        d = metrics.get("difference", {}).get(name)
        if d and d["difference"] is not None and base.get(name) is not None and tuned.get(name) is not None:
            sure = "no interval was computed"
            if d.get("low") is not None:
                low, high = (tables.number(name, d[end]) for end in ("low", "high"))
                sure = f"95 % interval of the difference {low} to {high}"
                clear = d["low"] > 0 or d["high"] < 0
                sure += "" if clear else ", so no difference is shown"
            gain = d["difference"]
            better = "better" if gain > 0 else "worse" if gain < 0 else "the same"
            said.append(
                f"On {tuned['rows']} held-out prompts the tuned model is {better} by {name.replace('_', ' ')}: "
                f"{tables.number(name, base[name])} → {tables.number(name, tuned[name])} ({sure})."
            )
            break
    for event in run.events:
        if event.get("event") in JUDGED:
            said.append(f"{JUDGED[event['event']]}{event.get('text') or event.get('reason')}.")
    names = [name for name in tuned if name.startswith("retention") and name.endswith("_loss")]
    for name in names[:-1] if len(names) > 1 else names:  # the last of several is their mean
        if None not in (tuned[name], base.get(name)):
            change = tuned[name] - base[name]
            which = name.removeprefix("retention_").removesuffix("_loss") if len(names) > 1 else ""
            data = f"retention data {which}".strip()
            said.append(f"On the {data} its loss {'rose' if change > 0 else 'fell'} by {abs(change):.3g}.")
    shared = metrics.get("overlap") or {}
    if shared.get("rows"):
        said.append(
            f"WARNING: {len(shared['rows'])} of {shared['of']} evaluation rows overlap with the training data; the "
            "numbers flatter."
        )
    if tuned.get("empty"):
        said.append(f"{tuned['empty']} answers are empty.")
    again = sum(event.get("event") == "resume" for event in run.events)
    faults = [str(event.get("event")) for event in run.events if event.get("event") not in MARKS]
    if again:
        said.append(f"Went on from a checkpoint {again} time{'s' if again > 1 else ''}.")
    if faults:
        said.append(f"On the way: {', '.join(dict.fromkeys(faults))}.")
    return " ".join(said)


def _best(several: Comparison) -> str:
    ranked = [run for run in several.runs if several.values.get(run.name) is not None]
    members = several.members or [{"state": "finished" if run.finished else "not finished"} for run in several.runs]
    counts = Counter(member["state"] for member in members)
    count = ", ".join(f"{number} {state}" for state, number in counts.items())
    if len(tasks(several.runs)) > 1:
        learnt = " and ".join(tasks(several.runs))
        return f"Runs of {learnt}, in their order: not ranked, since they learn other things. {count}."
    if not ranked:
        return f"{count}. No run has {several.objective} yet."
    value = _number_of(several.objective, several.values[ranked[0].name])
    which = "Lowest" if several.direction == "minimize" else "Highest"
    return f"{which} {_called(several.objective)} of {len(ranked)} runs: {ranked[0].name} ({value}). {count}."


def _called(objective: str) -> str:
    names = {"eval_loss": "held-out loss", "tuned.loss": "loss after training"}
    return names.get(objective, objective.removeprefix("tuned.").replace("_", " "))


def _number_of(objective: str, value: float | None) -> str:
    return tables.number(objective.removeprefix("tuned."), value) if objective != "eval_loss" else _quantity("", value)


# --- parts of one run -----------------------------------------------------------------------------


def _evaluation(run: Run) -> str:
    metrics = run.metrics
    if "tuned" not in metrics:
        return '<p class="soft">Not evaluated: <code>ftdist eval RUN</code>.</p>'
    sides = [side for side in ("base", "tuned") if side in metrics]
    rows = []
    for name in metrics["tuned"]:
        if name in ("rows", "empty"):
            continue
        d = metrics.get("difference", {}).get(name)
        cells = [escape(name), *(tables.number(name, metrics[side].get(name)) for side in sides)]
        if d:
            lower = name.endswith(("loss", "perplexity"))
            gain = (d["difference"] or 0) * (-1 if lower else 1)
            clear = d.get("low") is not None and (d["low"] > 0 or d["high"] < 0)
            kind = ("good" if gain > 0 else "bad") if clear else ""
            interval = (
                "" if d.get("low") is None else f"{tables.number(name, d['low'])} … {tables.number(name, d['high'])}"
            )
            cells += [f'<span class="{kind}">{tables.number(name, d["difference"])}</span>', interval,
                      f"{d['wins']} / {d['ties']} / {d['losses']}"]  # fmt: skip
        rows.append(cells)
    head = ["", *sides]
    if "difference" in metrics:
        head += ["difference", "95 % interval", "wins / ties / losses"]
    notes = "".join(f"<li>{escape(line)}</li>" for line in tables.remarks(metrics))
    return _table(head, rows, numbers=True) + f'<ul class="soft">{notes}</ul>'


def _samples(run: Run) -> str:
    found = []
    for row in run.samples:
        said = [m for m in row.get("messages") or () if isinstance(m.get("content"), str)]
        question = "\n\n".join(m["content"] for m in said) or row.get("prompt", "")
        base, tuned = row.get("base"), row.get("tuned")
        if tuned is None:
            continue
        marked = _marked(base, tuned) if base is not None else (None, escape(_cut(tuned)))
        sides = [("base", marked[0]), ("tuned", marked[1]), ("reference", escape(_cut(row.get("reference", ""))))]
        cells = "".join(
            f'<div><h3>{side}{_scores(row, side)}</h3><p class="text" dir="auto">{text or "<i>(empty)</i>"}</p></div>'
            for side, text in sides
            if text is not None
        )
        warning = ' <span class="bad">in the training data</span>' if row.get("in_training") else ""
        found.append(
            f'<div class="sample"><p class="text soft" dir="auto">{escape(_cut(question))}{warning}</p>'
            f'<div class="pair">{cells}</div></div>'
        )
    return "".join(found)


def _scores(row: dict[str, Any], side: str) -> str:
    scores = (row.get("scores") or {}).get(side) or {}
    shown = [
        f"{n.replace('_', ' ')} {scores[n]:.3g}"
        for n in ("extracted_match", "exact_match", "g_eval", "rougeL")
        if scores.get(n) is not None
    ]
    return f' <span class="soft">{escape(", ".join(shown[:2]))}</span>' if shown else ""


def _marked(base: str, tuned: str) -> tuple[str, str]:
    """Both texts as HTML: words that only the base's has struck out, those that only the tuned one's has marked."""
    a, b = (re.findall(r"\s+|[^\s]+", _cut(text)) for text in (base, tuned))
    left, right = [], []
    for kind, i, j, k, m in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        old, new = escape("".join(a[i:j])), escape("".join(b[k:m]))
        left.append(old if kind == "equal" or not old else f"<del>{old}</del>")
        right.append(new if kind == "equal" or not new else f"<ins>{new}</ins>")
    return "".join(left), "".join(right)


def _planned(run: Run) -> str:
    """What the plan said beside what was measured."""
    plan, measured = run.plan, run.plan.get("measured") or {}
    seen = [row["tokens_per_second"] for row in run.steps if row.get("tokens_per_second")]
    if seen:
        measured = {"tokens_per_second": sorted(seen)[len(seen) // 2], **measured}
    keys = [k for k in ("device_peak_bytes", "host_peak_bytes_per_node", "checkpoint_bytes", "tokens_per_second",
                        "tokens_per_step", "trainable_parameters") if k in plan or k in measured]  # fmt: skip
    keys += [k for k in measured if k not in keys and isinstance(measured[k], int | float)]
    rows = [[escape(k.replace("_", " ")), _quantity(k, plan.get(k)), _quantity(k, measured.get(k))] for k in keys]
    return _table(["", "planned", "measured"], rows, numbers=True) if rows else ""


def _phases(run: Run) -> str:
    """Seconds by phase, over the ranks; the slowest one named."""
    if not run.profile:
        return ""
    ranks = run.profile["ranks"]
    total = sum(sum(seconds.values()) for seconds in ranks.values())
    rows = []
    for name in PHASES:
        each = [seconds[name] for seconds in ranks.values()]
        spread = [f"{min(each):,.1f}", f"{max(each):,.1f}"] if len(each) > 1 else []
        rows.append([name, f"{sum(each) / len(each):,.1f}", *spread, f"{sum(each) / total:.1%}"])
    head = ["phase", "seconds", *(["least", "most"] if len(ranks) > 1 else []), "share"]
    said = ""
    if slowest := run.profile.get("slowest"):
        said = (
            f"<p>Slowest: rank {slowest['rank']}, {slowest['share']:.1%} more time than the fastest in what no rank "
            f"waits for another in ({', '.join(OWN)}).</p>"
        )
    return _table(head, rows, numbers=True) + said


def _quantity(key: str, value: Any) -> str:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return "–"
    if "bytes" in key:
        return f"{value / 2**30:,.2f} GiB" if value >= 2**28 else f"{value / 2**20:,.1f} MiB"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.4g}"


def _events(run: Run) -> str:
    rows = []
    told = [event for event in run.events if event.get("event") != "checkpoint"]  # the plot and the last line have them
    for event in told[-EVENTS:]:
        facts = {key: value for key, value in event.items() if key not in ("time", "event", "step", *DETAILS)}
        text = facts.pop("text", None) or facts.pop("reason", None)
        more = [str(text)] if text else []
        more += [f"{key.replace('_', ' ')} {_value(v)}" for key, v in facts.items() if v is not None]
        step = "" if event.get("step") is None else str(event["step"])
        words = escape(", ".join(more)[:300])
        name = f'<span class="kind">{escape(str(event.get("event")))}</span>'
        rows.append([_when(event["time"]), name, escape(step), words])
    if len(told) > EVENTS:
        rows.insert(0, ["", "", "", f"{len(told) - EVENTS} earlier ones: events.jsonl"])
    for error in run.errors:
        message = escape(f"rank {error.get('rank')}: {error.get('message')}")
        rows.append([_when(error.get("time")), '<span class="bad">rank failed</span>', "", message])
    kept = ", ".join(f"{c['name']} ({c['bytes'] / 2**20:,.1f} MiB)" for c in run.checkpoints)
    made = sum(event.get("event") == "checkpoint" for event in run.events)
    said = f"{made} checkpoints were made. Kept: {escape(kept) or 'none'}."
    return _table(["UTC", "event", "step", ""], rows) + (f'<p class="soft">{said}</p>' if made or kept else "")


def _when(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")


def _selection(run: Run) -> str:
    if run.selection is None:
        return ""
    data = base64.b64encode(run.selection.read_bytes()).decode()
    return (
        '<figure><img alt="signal-to-noise ratio by layer and module type, the trained ones framed" '
        f'src="data:image/png;base64,{data}">'
        "<figcaption>SNR of every module; what is trained is framed in red</figcaption></figure>"
    )


def _configuration(run: Run) -> str:
    if not run.deltas:
        return ""
    rows = [
        [f"<code>{escape(key)}</code>", escape(_value(default)), escape(_value(value))]
        for key, default, value in run.deltas
    ]
    return '<p class="soft">What is not the default of the choices made; all of it: config.yaml.</p>' + _table(
        ["key", "default", "here"], rows
    )


def _data(run: Run) -> str:
    data = run.data
    if not data:
        return ""
    keys = ("rows_in", "rejected", "filtered", "duplicates_exact", "duplicates_near", "contaminated", "train",
            "validation", "tokens", "supervised_tokens", "max_length", "fill")  # fmt: skip
    rows = [[key.replace("_", " "), f"{data[key]:,}"] for key in keys if isinstance(data.get(key), int | float)]
    lengths = ", ".join(f"{k}: {v}" for k, v in (data.get("token_lengths") or {}).items())
    scripts = ", ".join(f"{k} {v:.1%}" for k, v in (data.get("scripts") or {}).items())
    extra = [f"Token lengths: {lengths}." if lengths else "", f"Scripts: {scripts}." if scripts else "",
             *(str(note) for note in data.get("notes") or ())]  # fmt: skip
    return _table(["", ""], rows, numbers=True) + "".join(
        f'<p class="soft">{escape(line)}</p>' for line in extra if line
    )


def _export(run: Run) -> str:
    found = run.export.get("parity")
    if not run.export:
        return ""
    if not found:
        return f"<p>Exported ({escape(run.export['kind'])}); parity was not checked.</p>"
    rows = [
        [
            escape(name.replace("_", " ")),
            f"{v['max_difference']:.3g}",
            f"{v['kl_mean']:.3g}",
            f"{v['same_best_token']:.0%}",
        ]
        for name, v in found.items()
        if isinstance(v, dict) and "kl_mean" in v
    ]
    return _table(
        ["parity", "largest difference of a logit", "mean KL, nats a token", "same best token"], rows, numbers=True
    )


def _again(run: Run) -> str:
    environment = run.environment
    if not environment:
        return '<p class="soft">env.json is not there: command and versions are not known.</p>'
    versions = ", ".join(f"{name} {version}" for name, version in environment.get("versions", {}).items())
    facts = (
        f"Python {environment.get('python')}; {versions}; {environment.get('platform')}; commit "
        f"{environment.get('commit') or 'not known'}; seed {run.config.get('seed')}."
    )
    return f'<pre>{escape(rundir.again(environment))}</pre><p class="soft">{escape(facts)}</p>'


# --- several runs ---------------------------------------------------------------------------------


def _results(several: Comparison) -> str:
    """A row a run, best first: what is its own in the configuration, what came out, what it took."""
    runs, objective = several.runs, several.objective
    tuned = {run.name: run.metrics.get("tuned", {}) for run in runs}
    shown = objective.removeprefix("tuned.") if objective != "eval_loss" else None
    names = [n for n in dict.fromkeys(n for each in tuned.values() for n in each) if n not in ("rows", "empty", shown)]
    keys = _own_keys(several)
    keys = keys if len(keys) <= COLUMNS else []
    members = {member["name"]: member for member in several.members}
    costs = {run.name: compare.took(run, members.get(run.name, {}).get("seconds")) for run in runs}
    priced = any(cost["cost"] is not None for cost in costs.values())
    alike = len(tasks(runs)) == 1
    rows = []
    for place, run in enumerate(runs, 1):
        cost, value = costs[run.name], several.values.get(run.name)
        state = members.get(run.name, {}).get("state") or ("finished" if run.finished else "not finished")
        held = run.held_out[-1].get("eval_loss") if run.held_out else None
        row = [f"{'' if value is None else f'{place}. '}{escape(run.name)}", _number_of(objective, value)]
        row[1:] = row[1:] if alike else [_quantity("", held)]
        row += [_kept(_value(several.own[run.name].get(key))) for key in keys]
        row += [] if objective == "eval_loss" else [_quantity("", held)]
        row += [tables.number(name, tuned[run.name].get(name)) for name in names]
        row += [str(run.steps[-1]["step"]) if run.steps else "–", _quantity("", cost["tokens_per_second"])]
        row += [_quantity("bytes", cost["device_peak_bytes"])]
        row += ["–" if cost["seconds"] is None else duration(cost["seconds"])]
        row += [("–" if cost["cost"] is None else f"{cost['cost']:,.2f}")] if priced else []
        rows.append([*row, _kept(state)])
    head = ["run", escape(_called(objective)), *(_short(key, keys) for key in keys)]
    head += [] if objective == "eval_loss" else ["held-out loss"]
    head += [*(escape(name.replace("_", " ")) for name in names), "steps", "tokens/s", "peak memory", "time"]
    head += ["cost"] if priced else []
    told = [m for m in several.members if m["reason"] or m["name"] not in tuned]
    said = "".join(f"<li>{escape(m['name'])}: {escape(m['state'])}{escape(_because(m))}</li>" for m in told)
    words = [0, *range(2, 2 + len(keys)), len(head)]
    return _table([*head, ""], rows, numbers=True, words=words) + (f"<ul>{said}</ul>" if said else "")


def _short(key: str, keys: list[str]) -> str:
    """The last part of a key where it is enough."""
    last = key.rpartition(".")[2]
    alone = sum(other.rpartition(".")[2] == last for other in keys) == 1
    return f'<code title="{escape(key)}">{escape(last if alone else key)}</code>'


def _kept(text: str) -> str:
    """On one line, if it is short."""
    return f'<span class="kind">{escape(text)}</span>' if len(text) < 30 else escape(text)


def _own_keys(several: Comparison) -> list[str]:
    return list(dict.fromkeys(key for own in several.own.values() for key in own))


def _because(member: dict[str, Any]) -> str:
    return f" ({member['reason']})" if member["reason"] else ""


def _differing(several: Comparison) -> str:
    keys = _own_keys(several)
    if not keys:
        return "<p>Nothing: the configurations are the same.</p>"
    if len(keys) <= COLUMNS:
        return ""  # the results have them
    own = several.own.values()
    rows = [[f"<code>{escape(key)}</code>", *(escape(_value(each.get(key))) for each in own)] for key in keys]
    return _table(["key", *(escape(name) for name in several.own)], rows)


# --- small ----------------------------------------------------------------------------------------


def _table(head: list[str], rows: list[list[str]], numbers: bool = False, words: Collection[int] = (0,)) -> str:
    """Cells are HTML already. numbers: all columns but `words` stand right."""
    if not rows:
        return ""

    def cell(tag: str, i: int, text: str) -> str:
        return f"<{tag}{' class=n' if numbers and i not in words else ''}>{text}</{tag}>"

    top = "".join(cell("th", i, text) for i, text in enumerate(head)) if any(head) else ""
    body = "".join(f"<tr>{''.join(cell('td', i, text) for i, text in enumerate(row))}</tr>" for row in rows)
    return (
        f'<div class="wide"><table>{f"<thead><tr>{top}</tr></thead>" if top else ""}<tbody>{body}</tbody></table></div>'
    )


def _value(value: Any) -> str:
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _cut(text: str) -> str:
    return text if len(text) <= LONG else text[: LONG - 1] + "…"
