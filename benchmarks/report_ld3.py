"""The table and the picture of learned time grids against hand-made ones."""

from __future__ import annotations

from pathlib import Path

from benchmarks.report_data import Entry, Result, caption, milliseconds, table

LEARNED = "learned"
TITLES = {"exact": "exact denoiser", "network": "trained teacher"}
OFFICIAL_SECONDS, OFFICIAL_ERROR = 43.1, 0.0120  # LD3's trainer on the toy, on two CPU cores
STEP_AIM, STEP_AT = 8.0, [64, 3, 32, 32]  # speed-up over LD3's eager lines on a CPU


def tables(results: list[Result]) -> str:
    """The loss of every grid on held-out noises, the least of a row in bold, and who wins."""
    parts = []
    for result in results:
        entries = result.select(op="ld3")
        names = list(entries[0]["losses"])
        head = ("teacher", "solver", "evaluations", *names, "hand-made / learned")
        seconds = sum({(e["teacher"], e["solver"]): e["seconds"] for e in entries}.values())
        parts += [
            caption(result, "ld3"),
            table(head, [_row(entry, names) for entry in entries]),
            f"Mean squared error of the pixels from those of the teacher's 50 steps of UniPC-3, on"
            f" held-out noises. All grids, their learning and their judgment took"
            f" {seconds / 60:.0f} minutes. {verdict(entries)}",
        ]
    return "\n\n".join(parts)


def _row(entry: Entry, names: list[str]) -> list[str]:
    losses = entry["losses"]
    least = min(losses.values())
    cells = [_cell(losses[name], losses[name] == least) for name in names]
    ratio = best_hand_made(entry) / losses[LEARNED]
    where = (TITLES[entry["teacher"]], f"`{entry['solver']}`", str(entry["evaluations"]))
    return [*where, *cells, f"{ratio:.2f}x"]


def _cell(loss: float, least: bool) -> str:
    return f"**{loss:.2g}**" if least else f"{loss:.2g}"


def best_hand_made(entry: Entry) -> float:
    """The least loss of any grid that is not learned."""
    return min(loss for name, loss in entry["losses"].items() if name != LEARNED)


def verdict(entries: list[Entry]) -> str:
    """In how many of the cases the learned grid has the least loss, ties not counted."""
    lost = [e for e in entries if e["losses"][LEARNED] >= best_hand_made(e)]
    text = f"The learned grid is better than every hand-made one in {len(entries) - len(lost)} of"
    text += f" {len(entries)} cases"
    if not lost:
        return f"{text}."
    named = (f"{TITLES[e['teacher']]}, `{e['solver']}`, {e['evaluations']}" for e in lost)
    return f"{text}; not in: {'; '.join(named)}."


def steps(results: list[Result]) -> str:
    """A learned step, forward and backward, beside LD3's lines."""
    parts = []
    for result in results:
        on_gpu = result.machine["device"] == "cuda"
        rows = [
            [
                " x ".join(map(str, entry["shape"])),
                *([] if on_gpu else [str(entry["threads"])]),
                entry["peer"],
                milliseconds(entry["baseline_seconds"]),
                milliseconds(entry["seconds"]),
                f"**{entry['ratio']:.2f}x**{_aim(entry, on_gpu)}",
                f"{entry['share_of_copy']:.0%}",
            ]
            for entry in result.select(op="ld3_step")
        ]
        threads = [] if on_gpu else ["threads"]
        gain = "speed-up" if on_gpu else f"speed-up (≥ {STEP_AIM:g}x)"
        head = ["shape", *threads, "peer", "its time", "this library", gain, "of copy"]
        parts += [caption(result, "ld3_step"), table(head, rows)]
        parts += [_toy(entry) for entry in result.select(op="ld3_toy")]
    parts.append(
        "A step of DPM-Solver++(3M), forward and backward, with gradients of the state, the history"
        " and the coefficients; `of copy` is the share of the rate of a copy in the same run."
    )
    return "\n\n".join(parts)


def _toy(entry: Entry) -> str:
    return (
        f"The grid of the toy of LD3's golden values (50 pairs of 12 numbers, DPM-Solver++(3M), 5"
        f" evaluations) is learned in {entry['seconds']:.1f} s on {entry['threads']} threads, to a"
        f" held-out mean squared error of {entry['held_out']:.4f}; LD3's own trainer took"
        f" {OFFICIAL_SECONDS:g} s to {OFFICIAL_ERROR} on another day, on a machine like it."
    )


def _aim(entry: Entry, on_gpu: bool) -> str:
    if on_gpu or entry["shape"] != STEP_AT or entry["peer"].startswith("torch.compile"):
        return ""
    return ", met" if entry["ratio"] >= STEP_AIM else ", missed"


def draw(results: list[Result], path: Path) -> None:
    """Loss against evaluations, a panel for each teacher and solver."""
    from matplotlib.figure import Figure

    from dsno_kernels.time_grids.plots import draw_losses

    cases: dict[tuple[int, str], list[tuple[str, list[Entry]]]] = {}
    for i, result in enumerate(results):
        for entry in result.select(op="ld3"):
            row = cases.setdefault((i, entry["teacher"]), [])
            if not row or row[-1][0] != entry["solver"]:
                row.append((entry["solver"], []))
            row[-1][1].append(entry)
    columns = max(len(row) for row in cases.values())
    figure = Figure(figsize=(4 * columns, 3.4 * len(cases)), layout="constrained")
    axes = figure.subplots(len(cases), columns, squeeze=False)
    for ((_, teacher), row), line in zip(cases.items(), axes, strict=True):
        for ax in line[len(row) :]:
            ax.remove()
        for (solver, entries), ax in zip(row, line, strict=False):
            losses = {
                name: {e["evaluations"]: e["losses"][name] for e in entries}
                for name in entries[0]["losses"]
            }
            draw_losses(ax, losses)
            ax.set_title(f"{TITLES[teacher]}, {solver}", fontsize=9)
    figure.savefig(path, dpi=110, metadata={"Software": None})
