"""The plan as people read it."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Any

from ftdist.plan import Plan


def render(plan: Plan) -> str:
    """Every number of the plan with where it comes from; commands that can be pasted."""
    total, trained = plan["total_parameters"], plan["trainable_parameters"]
    world = f"{plan['processes']} process" + ("es" if plan["processes"] > 1 else "")
    if plan["nodes"] > 1:
        world += f" on each of {plan['nodes']} nodes"
    entries = [
        ("model", [f"{plan['model']}  {total:,} parameters ({plan['model_source']})"]),
        ("data", plan["data"]),
        ("task", [plan["task"]]),
        (
            "strategy",
            [f"{plan['strategy']}  trains {trained:,} parameters, {_percent(trained, total)} of the model"],
        ),
        ("", _table(plan["trainable_by_type"])),
        ("forgetting", [plan["forgetting"]] if "forgetting" in plan else []),
        ("engine", [f"{plan['engine']}, {world}"]),
        ("devices", [plan["devices"]]),
        ("precision", [plan["precision"]]),
        ("choices", plan.get("choices", [])),
        ("batch", plan["arithmetic"]),
        *_forecast(plan),
        ("writes", _files(plan["files"])),
        ("runs", [shlex.join(command) for command in plan["command"]]),
        ("advice", plan["advice"]),
    ]
    return "\n".join(_entry(title, lines) for title, lines in entries if lines)


def _forecast(plan: Plan) -> list[tuple[str, list[str]]]:
    """Memory, disk, time and the answers, as far as the plan has them."""
    if "device_peak_bytes" not in plan:
        return []
    phases, hosts, hardware = plan["phases"], plan["host_phases"], plan["hardware"]
    worst = max(phases, key=lambda name: sum(phases[name].values()))
    highest = max((name for name in hosts if name != "export"), key=lambda name: sum(hosts[name].values()))
    of = f" of {gigabytes(hardware['memory'])}" if hardware["memory"] else ""
    verdict = {True: "fits", False: "DOES NOT FIT", None: "no memory known to compare with"}[plan["fits"]]
    if plan["fits"] is not None:
        spare = plan["margin_bytes"] or 0
        verdict += f", {gigabytes(abs(spare))} {'to spare' if spare >= 0 else 'too much'}"
        verdict += "" if plan["certain"] else " (within the plan's error)"
    memory = [
        f"{gigabytes(plan['device_peak_bytes'])} ± {gigabytes(plan['band_bytes'])} a rank at the peak ({worst})"
        f"{of}, {hardware['name']}: {verdict}",
        "  " + ", ".join(f"{name} {gigabytes(sum(kinds.values()))}" for name, kinds in phases.items()),
        f"  {worst}: " + _kinds(phases[worst]),
        f"host: {gigabytes(plan['host_peak_bytes_per_node'])} a node at the peak ({highest}): {_kinds(hosts[highest])}",
    ]
    if "export" in hosts:
        memory.append(f"  export afterwards: {gigabytes(sum(hosts['export'].values()))} of host memory")
    parts = {name: size for name, size in plan["disk_bytes"].items() if size}
    listed = ", ".join(f"{name} {gigabytes(size)}" for name, size in parts.items())
    disk = [f"{gigabytes(sum(parts.values()))} in all: {listed}"]
    if plan["checkpoint_bytes"]:
        disk.append(f"{gigabytes(plan['checkpoint_bytes'])} a checkpoint")
    known = "by its order" if hardware["name"] == "cpu" else "within a third"
    band = "" if plan["time_calibrated"] else f" ({known}: not calibrated on this machine)"
    real, most = plan["real_tokens_per_step"], plan["tokens_per_step"]
    room = f"{most:,} tokens" if real == most else f"about {real:,} tokens and their padding"
    time = [
        f"{seconds(plan['seconds_per_step'])} a step of {room}, {plan['tokens_per_second']:,.0f} tokens/s, "
        f"MFU {plan['mfu']:.0%}, bound by {plan['step_bound_by']}{band}"
    ]
    if "total_seconds" in plan:
        about = "about " if plan.get("steps_are_a_guess") else ""
        saves = f", checkpoints: {plan['checkpoints']:,}" if plan.get("checkpoints") else ""
        time.append(f"{about}{plan['total_steps']:,} steps: {seconds(plan['total_seconds'])}{saves}")
        if plan.get("evaluations"):
            time.append(f"{plan['evaluations']:,} evaluations: {seconds(plan['evaluation_seconds'])} on top")
        end = datetime.now() + timedelta(seconds=plan["total_seconds"] + plan.get("evaluation_seconds", 0))
        time.append(f"started now it ends at {end:%Y-%m-%d %H:%M}")
    if "asks" in plan:
        asks = ", ".join(f"cluster.{key}={value}" for key, value in plan["asks"].items())
        memory.append(f"  asked of SLURM, unless keys say otherwise: {asks}")
    if "cost" in plan:
        time.append(f"cost: {plan['cost']:,.2f} for {hardware['devices']} device" + "s" * (hardware["devices"] > 1))
    if plan["hardware"]["host_memory"] is None and plan["hardware"]["name"] != "cpu":
        memory.append("  host memory is not known here: compare it, or set hardware.host_memory=BYTES")
    if plan.get("largest_top_percent", 99) != 99:  # at 99, any percentage fits
        memory.append(f"largest strategy.top_percent that fits: {plan['largest_top_percent']}")
    fixes = [
        f"{' '.join(fix['overrides'])}   {fix['says']}: {gigabytes(fix['device_peak_bytes'])}, host "
        f"{gigabytes(fix['host_peak_bytes_per_node'])} a node, {seconds(fix['seconds_per_step'])} a step"
        for fix in plan.get("fixes", [])
    ]
    if plan.get("fixes") == []:
        fixes = ["nothing that is tried here: devices with more memory, or a smaller model"]
    return [("memory", memory), ("disk", disk), ("time", time), ("not sure", plan["notes"]),
            ("fits with", fixes)]  # fmt: skip


def scaling(rows: Iterable[dict[str, Any]]) -> str:
    """The table of `--sizes`."""
    lines = [f"{'devices':>8} {'nodes':>6} {'fits':>5} {'peak':>10} {'tokens/step':>12} {'tokens/s':>12} {'MFU':>5} "
             f"{'a step':>10}  overrides"]  # fmt: skip
    for row in rows:
        fits = {True: "yes", False: "no", None: "?"}[row["fits"]]
        lines.append(
            f"{row['devices']:>8,} {row['nodes']:>6,} {fits:>5} {gigabytes(row['device_peak_bytes']):>10} "
            f"{row['tokens_per_step']:>12,} {row['tokens_per_second']:>12,.0f} {row['mfu']:>5.0%} "
            f"{seconds(row['seconds_per_step']):>10}  {' '.join(row['overrides'])}".rstrip()
            + ("" if row["same_batch"] else f"   another global batch: {row['sequences_per_step']:,} sequences a step")
        )
    return "\n".join(lines)


def _kinds(phase: dict[str, int]) -> str:
    found = sorted(((size, kind) for kind, size in phase.items() if size), reverse=True)
    return ", ".join(f"{kind.replace('_', ' ')} {gigabytes(size)}" for size, kind in found)


def gigabytes(size: float) -> str:
    """Decimal, three significant figures."""
    return f"{size / 1e9:.3g} GB" if size >= 1e7 else f"{size / 1e6:.3g} MB"


def seconds(count: float) -> str:
    """As people say it."""
    if count < 60:
        return f"{count:.3g} s"
    if count < 3600:
        return f"{count / 60:.3g} min"
    return f"{count / 3600:.3g} h" if count < 48 * 3600 else f"{count / 86400:.3g} days"


def _entry(title: str, lines: Iterable[str]) -> str:
    return "\n".join(f"{title if first else '':<10} {line}".rstrip() for first, line in _firsts(lines))


def _firsts(lines: Iterable[str]) -> Iterable[tuple[bool, str]]:
    return ((number == 0, line) for number, line in enumerate(lines))


def _percent(part: int, whole: int) -> str:
    share = 100 * part / whole
    return f"{share:.1f} %" if share >= 1 else f"{share:.2g} %"


def _table(counts: dict[str, int]) -> list[str]:
    """Type of module and its trained parameters, aligned."""
    width = max((len(kind) for kind in counts), default=0)
    return [f"  {kind:<{width}}  {count:>17,}" for kind, count in counts.items()]


def _files(files: dict[str, str]) -> list[str]:
    width = max((len(name) for name in files), default=0)
    return [f"{name:<{width}}  {meaning}".rstrip() for name, meaning in files.items()]
