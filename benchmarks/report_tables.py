"""The tables of README, each from the results of one kind of device."""

from __future__ import annotations

import functools
from collections.abc import Callable

from benchmarks import (
    report_denoising,
    report_digits,
    report_fdm,
    report_ld3,
    report_steps,
    report_training,
    shapes,
    targets,
)
from benchmarks.report_data import (
    BASELINE,
    NOT_MEASURED,
    PASS_TITLES,
    PRECISIONS,
    Entry,
    Result,
    caption,
    cases,
    milliseconds,
    ours,
    table,
)

OURS = "dsno_kernels"  # how the names of this library's own entries begin
OVERHEAD = ("overhead", "truncated_rfft", "truncated_irfft")
MODEL = ("model", "temporal_layers")


def spectral_conv_cpu(results: list[Result]) -> str:
    """Speed-up over the eager layer, with the aims, the share of this machine's limits, memory and
    error.
    """
    head = (
        "shape",
        "precision",
        "pass",
        "eager",
        "this library",
        "speed-up",
        "aim",
        "GFLOP/s (of GEMM)",
        "GB/s (of copy)",
        "kept for backward / x",
        "error",
    )
    parts = []
    for result in results:
        rows = []
        for shape, precision, direction in cases(result):
            entry = ours(result.conv(shape.name, precision, direction))
            base = result.conv(shape.name, "fp32", direction).get(BASELINE)
            if entry is None or base is None:
                continue
            aim = shape.targets.get((precision, direction))
            rows.append(
                (
                    shape.title,
                    precision,
                    PASS_TITLES[direction],
                    milliseconds(entry["baseline_seconds"]),
                    milliseconds(entry["seconds"]),
                    f"**{entry['ratio']:.2f}x**",
                    f"{aim:g}x" if aim else "",
                    f"{entry['gflops']:.0f} ({entry['share_of_gemm']:.0%})",
                    f"{entry['gbytes']:.0f} ({entry['share_of_copy']:.0%})",
                    f"{entry['saved_in_x']:.2f} (eager {base['saved_in_x']:.2f})",
                    f"{max(entry['errors'].values()):.1e}",
                )
            )
        parts.append(f"{caption(result, 'spectral_conv')}\n\n{table(head, rows)}")
    parts.append(
        "Medians over rounds in which the eager layer and this library take turns, checked against"
        " float64 just before. `error` is the largest relative RMS error of y, dx and dW. GFLOP/s"
        " counts the real products that reach y, GB/s the bytes that must move; their shares are of"
        " this machine's own matrix product and copy in the same run. Aim for memory at shape"
        f" {shapes.SAVED_TARGET[0]}: at most {shapes.SAVED_TARGET[1]} tensors of x's size, weight"
        " included."
    )
    return "\n\n".join(parts)


def peers(results: list[Result]) -> str:
    """Every implementation in its own column."""
    parts = []
    for result in results:
        names = list(dict.fromkeys(entry["peer"] for entry in result.select(op="spectral_conv")))
        rows = []
        for shape, precision, direction in cases(result):
            found = result.conv(shape.name, precision, direction)
            cells = [
                ""
                if name not in found
                else milliseconds(found[name]["seconds"])
                + (f" ({found[name]['ratio']:.2f}x)" if name != BASELINE else "")
                for name in names
            ]
            if any(name in found for name in names if not name.startswith((BASELINE, OURS))):
                rows.append((shape.title, PRECISIONS[precision], PASS_TITLES[direction], *cells))
        head = ("shape", "precision", "pass", *names)
        parts.append(f"{caption(result, 'spectral_conv')}\n\n{table(head, rows)}")
    parts.append("In brackets the speed-up over the eager float32 layer, timed in turns with it.")
    return "\n\n".join(parts)


def overhead(results: list[Result]) -> str:
    """Host time of a call without work, and the truncated transforms."""
    parts = []
    for result in results:
        calls = {
            (e["peer"], e["direction"]): milliseconds(e["seconds"])
            for e in result.select(op="overhead")
        }
        names = list(dict.fromkeys(peer for peer, _ in calls))
        rows = [
            [name, *(calls.get((name, direction), "") for direction in shapes.PASSES)]
            for name in names
        ]
        parts.append(
            f"{caption(result, *OVERHEAD)}\n\n"
            + table(("one call at a tiny shape", *PASS_TITLES.values()), rows)
        )
        transforms = [e for op in OVERHEAD[1:] for e in result.select(op=op)]
        rows = [
            [
                f"`{e['op']}`",
                " x ".join(map(str, e["size"])),
                str(e["dim"]),
                str(e["modes"]),
                milliseconds(e["baseline_seconds"]),
                milliseconds(e["seconds"]),
                f"**{e['ratio']:.2f}x**",
            ]
            for e in transforms
        ]
        parts.append(
            table(
                ("transform", "signal", "axis", "K", "torch.fft", "this library", "speed-up"), rows
            )
        )
    return "\n\n".join(parts)


def spectral_conv_gpu(results: list[Result]) -> str:
    """Speed-up over the eager layer and share of the limit, with what launches and memory cost."""
    head = (
        "shape",
        "precision",
        "pass",
        "eager",
        "eager, TF32",
        "this library",
        "speed-up",
        "aim",
        "share of the limit",
        "host, a call",
        "CUDA graph",
        "peak memory / eager",
        "error",
    )
    parts = []
    for result in results:
        rows = []
        for shape, precision, direction in cases(result):
            entry = ours(result.conv(shape.name, precision, direction))
            if entry is None:
                continue
            tf32 = result.conv(shape.name, "tf32", direction).get(BASELINE)
            aim = shape.targets.get((precision, direction))
            bound = "memory" if entry["share_of_copy"] >= entry["share_of_gemm"] else "arithmetic"
            rows.append(
                (
                    shape.title,
                    PRECISIONS[precision],
                    PASS_TITLES[direction],
                    milliseconds(entry["baseline_seconds"]),
                    milliseconds(tf32["seconds"]) if tf32 else "",
                    milliseconds(entry["seconds"]),
                    f"**{entry['ratio']:.2f}x**",
                    f"{aim:g}x" if aim else "",
                    f"{entry['share_of_limit']:.0%} ({bound})",
                    milliseconds(entry["host_seconds"]),
                    milliseconds(entry["graph_seconds"]) if "graph_seconds" in entry else "",
                    f"{entry['peak_ratio']:.2f}",
                    f"{max(entry['errors'].values()):.1e}",
                )
            )
        parts.append(f"{caption(result, 'spectral_conv')}\n\n{table(head, rows)}")
    parts.append(
        "Device time by CUDA events, medians over rounds in which the eager float32 layer and this"
        " library take turns, each with a cold L2 cache, checked against float64 just before. The"
        " limit is the larger of least bytes over the rate of a copy and of least operations over"
        " that of a matrix product in that precision, both of the same run. `host` is the time"
        " until a call returns, `CUDA graph` the device time of a replay where a call is short;"
        " `peak memory` counts what a call allocates, its inputs aside; `error` is the largest"
        " relative RMS error of y, dx and dW."
    )
    return "\n\n".join(parts)


def _target_value(result: Result, target: targets.Target) -> float | None:
    """The number that a target bounds, where it was measured."""
    found = result.select(**target.where)
    if target.where["op"] == "spectral_conv":
        entry = ours({entry["peer"]: entry for entry in found})
        found = [entry] if entry else []
    return found[0].get(target.metric) if found else None


def targets_gpu(results: list[Result]) -> str:
    """What this library sets out to reach, what was measured, and whether that meets it."""
    head = ("what", "precision", "pass", "number", "aim", *(r.machine["gpu"] for r in results))
    rows = []
    for target in targets.TARGETS:
        what, larger = targets.METRICS[target.metric]
        shape = shapes.find(target.title)
        sign = "≥" if larger else "≤"
        cells = []
        for result in results:
            value = _target_value(result, target)
            state = "" if value is None else ("met" if target.met(value) else "**missed**")
            number = NOT_MEASURED if value is None else targets.text(target.metric, value)
            cells.append(f"{number}, {state}" if state else number)
        rows.append(
            (
                shape.title if shape else target.title,
                PRECISIONS.get(target.where.get("precision", ""), ""),
                PASS_TITLES.get(target.where.get("direction", ""), ""),
                what,
                f"{sign} {targets.text(target.metric, target.bound)}",
                *(cells or [NOT_MEASURED]),
            )
        )
    return table(head if results else (*head, "measured"), rows)


def _waiting(entry: Entry, whose: str = "") -> str:
    """A time, and whether calls in a row take the longer time of the host."""
    time = milliseconds(entry[f"{whose}seconds"])
    if not entry.get(f"{whose}host_bound"):
        return time
    return f"{time} (host-bound: {milliseconds(entry[f'{whose}host_seconds'])})"


def model(results: list[Result]) -> str:
    """Whole models, and their temporal layers alone, beside the form of the official project."""
    parts = []
    for result in results:
        rows = [
            (
                f"{entry['shape']}, B={entry['batch']}",
                entry["peer"],
                entry["precision"],
                PASS_TITLES[entry["direction"]],
                _waiting(entry, "baseline_"),
                _waiting(entry),
                f"**{entry['ratio']:.2f}x**",
            )
            for op in MODEL
            for entry in result.select(op=op)
        ]
        head = ("model", "form", "precision", "pass", "official form", "time", "speed-up")
        parts.append(f"{caption(result, *MODEL)}\n\n{table(head, rows)}")
    return "\n\n".join(parts)


def not_measured() -> str:
    return f"{NOT_MEASURED.capitalize()}."


def tables(results: list[Result]) -> dict[str, Callable[[], str]]:
    """Every table README can ask for, of the results that hold what it shows."""
    made: dict[str, Callable[[], str]] = {}
    for kind, device in (("cpu", "cpu"), ("gpu", "cuda")):
        some = [result for result in results if result.machine["device"] == device]
        conv = spectral_conv_cpu if kind == "cpu" else spectral_conv_gpu
        kinds: dict[str, tuple[Callable[[list[Result]], str], tuple[str, ...]]] = {
            "spectral_conv": (conv, ("spectral_conv",)),
            "peers": (peers, ("spectral_conv",)),
            "overhead": (overhead, OVERHEAD),
            "model": (model, MODEL),
            "student": (report_training.student, ("student",)),
            "digits": (report_digits.distances, ("digits",)),
            "fdm": (report_fdm.tables, ("fdm",)),
            "ld3": (report_ld3.tables, ("ld3",)),
            "ld3_step": (report_ld3.steps, ("ld3_step",)),
            "exp_step": (report_steps.exp_step, ("exp_step", "exp_step_overhead")),
            "schedulers": (
                report_steps.schedulers,
                ("scheduler", "scheduler_loop", "scheduler_overhead"),
            ),
            "denoising": (report_denoising.denoising, report_denoising.OPS),
        }
        for name, (make, ops) in kinds.items():
            holding = [r for r in some if any(entry.get("op") in ops for entry in r.entries)]
            made[f"{name}_{kind}"] = functools.partial(make, holding) if holding else not_measured
    gpu = [result for result in results if result.machine["device"] == "cuda"]
    made["targets_gpu"] = lambda: targets_gpu(gpu)
    made["digits_commands"] = report_digits.commands
    return made
