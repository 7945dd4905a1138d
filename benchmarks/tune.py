"""Choose launch parameters: try the candidates of every row of a launch table, write the best.

    python benchmarks/tune.py                        # on a GPU: measure, and write its table
    python benchmarks/tune.py --arch 90 --dry-run    # without a GPU: compile and model, for sm_90

The tables are dsno_kernels/backends/triton/tables/*.json; a row is written as soon as it is chosen,
so an interrupted run keeps what it has found. Candidates are tried in the order of the model in
tuning_model.py and only what compiles without spills is timed. What was tried stands in
benchmarks/results/tune-GPU.jsonl, a line a row.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import datetime
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the script runs from a checkout, installed or not

import torch  # noqa: E402

from benchmarks import journal, machine  # noqa: E402
from benchmarks.tuning import Choice, Gate, Score, TableFile, choose, modeled  # noqa: E402
from benchmarks.tuning_clock import Stopwatch, gpu_of  # noqa: E402
from benchmarks.tuning_model import GPUS, Gpu, candidates, row_seconds, shapes_of  # noqa: E402
from dsno_kernels.backends import triton  # noqa: E402
from dsno_kernels.backends.triton.configs import TABLES, Config, RowKey  # noqa: E402


class TuneError(Exception):
    """Why nothing can be tuned, in one line."""


def select(keys: Sequence[RowKey], options: argparse.Namespace) -> list[RowKey]:
    """The rows that --kernels, --methods and --classes name; all where one is not given."""
    chosen = list(keys)
    for place, name in enumerate(("kernels", "methods", "classes")):
        wanted = getattr(options, name)
        if wanted is None:
            continue
        known = list(dict.fromkeys(key[place] for key in keys))
        for value in wanted:
            if value not in known:
                raise TuneError(f"--{name} {value!r} is in no row; rows have {known}")
        chosen = [key for key in chosen if key[place] in wanted]
    if not chosen:
        raise TuneError("no row has these kernels, methods and classes together")
    return chosen


def tune(
    file: TableFile,
    keys: Sequence[RowKey],
    gpu: Gpu,
    *,
    gate: Gate,
    score: Score,
    source: Callable[[RowKey, float], str],
    report: Callable[[Choice], None],
    bounded: bool,
    most: int,
    row_budget: float = math.inf,
    budget: float = math.inf,
    write: bool = True,
    pool: concurrent.futures.Executor | None = None,
    now: Callable[[], float] = time.monotonic,
) -> list[Choice]:
    """Choose rows one after the other, writing each at once, until `budget` seconds are over.

    `bounded` says that the scores are the model's; a modeled choice never replaces a measured row.
    """
    begin = now()
    table = file.architecture()
    orders = {key: candidates(key, gpu) for key in keys}
    if pool is not None:
        for key in keys:
            for config in (table.rows[key], *orders[key][:most]):
                gate.submit(key, config, pool)
    choices = []
    for key in keys:
        if now() - begin > budget:
            break

        def guess(config: Config, key: RowKey = key) -> float:
            return row_seconds(key, config, gpu)

        choice = choose(
            key,
            table.rows[key],
            orders[key],
            guess=guess,
            check=gate.check,
            score=score,
            bounded=bounded,
            most=most,
            seconds=row_budget,
            now=now,
        )
        kept = bounded and file.row(key)["source"].startswith("measured")
        if write and not kept and choice.new is not None:
            time_of_new = choice.seconds_of(choice.new)
            assert time_of_new is not None
            file.update(key, choice.new, source(key, time_of_new))
        choices.append(choice)
        report(choice)
    return choices


def describe(config: Config | None) -> str:
    if config is None:
        return "none fits"
    return (
        f"{'x'.join(map(str, config.tile))}, {config.num_warps} warps, {config.num_stages} stages"
    )


def microseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e6:.1f}"


def summary(choices: Sequence[Choice]) -> str:
    """A row each: old and new configuration, times in microseconds, speed-up."""
    lines = [("row", "old", "us", "new", "us", "speed-up")]
    for choice in choices:
        old, new = choice.seconds_of(choice.old), choice.seconds_of(choice.new)
        gain = "" if old is None or new is None else f"{old / new:.2f}x"
        same = choice.new == choice.old
        lines.append(
            (
                " ".join(choice.key).strip(),
                describe(choice.old),
                microseconds(old),
                "same" if same else describe(choice.new),
                microseconds(new),
                gain,
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def record(choice: Choice) -> dict[str, Any]:
    """A choice as JSON: everything that was tried, times in seconds."""
    return {
        "row": list(choice.key),
        "old": choice.old._asdict(),
        "new": choice.new and choice.new._asdict(),
        "shapes": [shape.name for shape in shapes_of(choice.key)],
        "tried": [
            {**one.config._asdict(), "guess": one.guess, "seconds": one.seconds}
            | {"problem": one.problem}
            for one in choice.tried
        ],
    }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernels", nargs="+", metavar="KERNEL", help="rows of these kernels only")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="rows of these methods only")
    parser.add_argument(
        "--classes", nargs="+", metavar="CLASS", help="rows of these classes only, as '3 narrow'"
    )
    parser.add_argument("--seconds-per-row", type=float, default=4.0, help="of timing (default 4)")
    parser.add_argument("--budget", type=float, default=300.0, help="seconds in all (default 300)")
    parser.add_argument("--most", type=int, default=8, help="candidates a row (default 8)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compiling processes")
    parser.add_argument("--dry-run", action="store_true", help="model the time; needs no GPU")
    parser.add_argument("--write", action="store_true", help="with --dry-run: change the table")
    parser.add_argument("--arch", type=int, help="with --dry-run: 80, 86 or 90")
    parser.add_argument("--tables", type=Path, default=TABLES, help="folder of the tables")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args(argv)
    if options.dry_run != (options.arch is not None):
        raise TuneError("--dry-run and --arch belong together: give both, or on a GPU neither")
    if options.write and not options.dry_run:
        raise TuneError("--write belongs to --dry-run: a run on a GPU always writes")
    if min(options.seconds_per_row, options.budget, options.most, options.jobs) <= 0:
        raise TuneError("--seconds-per-row, --budget, --most and --jobs have to be positive")
    if not options.tables.is_dir():
        raise TuneError(f"--tables {options.tables} is no folder")
    return options


def modeled_source(key: RowKey, seconds: float) -> str:
    return f"modeled: {seconds * 1e6:.1f} us, geometric mean of {names(key)}"


def names(key: RowKey) -> str:
    return ", ".join(shape.name for shape in shapes_of(key))


def dry_run(options: argparse.Namespace) -> list[Choice]:
    capability = divmod(options.arch, 10)
    if capability not in GPUS:
        known = ", ".join(f"{10 * major + minor}" for major, minor in GPUS)
        raise TuneError(f"--arch {options.arch}: the model has the constants of {known}")
    gpu = GPUS[capability]
    file = TableFile.open(options.tables, capability, gpu)
    table = file.architecture()
    return tune(
        file,
        select(list(table.rows), options),
        gpu,
        gate=Gate(table, capability, gpu),
        score=modeled(gpu),
        source=modeled_source,
        report=lambda choice: print(summary([choice]).splitlines()[1], flush=True),
        bounded=True,
        most=options.most,
        budget=options.budget,
        write=options.write,
    )


def workers(jobs: int) -> concurrent.futures.Executor:
    """Processes that compile; forked ones could not use CUDA, which this process has set up."""
    return concurrent.futures.ProcessPoolExecutor(
        jobs, mp_context=multiprocessing.get_context("spawn")
    )


def measure_all(options: argparse.Namespace) -> list[Choice]:
    if not torch.cuda.is_available():
        raise TuneError("PyTorch sees no CUDA device; --arch 90 --dry-run models one")
    device = torch.device("cuda", torch.cuda.current_device())
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        raise TuneError("the Triton kernels need compute capability 8.0 or newer")
    gpu = gpu_of(device, capability)
    file = TableFile.open(options.tables, capability, gpu)
    table = file.architecture()
    keys = select(list(table.rows), options)
    info = machine.describe(device)
    today = datetime.date.today().isoformat()
    path = options.results / f"tune-{machine.slug(device)}.jsonl"
    path.parent.mkdir(exist_ok=True)
    journal.append(path, {"machine_info": info, "commit_info": journal.commit(), "date": today})

    def source(key: RowKey, seconds: float) -> str:
        where = f"{info['gpu']}, {today}, triton {info['triton']}"
        return f"measured: {seconds * 1e6:.1f} us, geometric mean of {names(key)}; {where}"

    def report(choice: Choice) -> None:
        journal.append(path, record(choice))
        print(summary([choice]).splitlines()[1], flush=True)

    pool = workers(options.jobs)
    try:
        return tune(
            file,
            keys,
            gpu,
            gate=Gate(table, capability, gpu),
            score=Stopwatch(table, device, triton),
            source=source,
            report=report,
            bounded=False,
            most=options.most,
            row_budget=options.seconds_per_row,
            budget=options.budget,
            pool=pool,
        )
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def main(argv: Sequence[str] | None = None) -> int:
    try:
        options = parse(argv)
        choices = (dry_run if options.dry_run else measure_all)(options)
    except (TuneError, ValueError, OSError) as error:
        print(f"tune: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("tune: interrupted; the rows above are written", file=sys.stderr)
        return 130
    print(f"\n{summary(choices)}")
    unusable = [choice for choice in choices if choice.new is None]
    for choice in unusable:
        print(f"tune: {' '.join(choice.key).strip()}: {choice.tried[0].problem}", file=sys.stderr)
    return int(bool(unusable))


if __name__ == "__main__":
    sys.exit(main())
