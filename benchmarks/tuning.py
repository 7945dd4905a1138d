"""How a row of a launch table is chosen: what compiles, what scores best, and the table's file."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.metadata
import inspect
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.tuning_model import Gpu, Usage, row_seconds
from dsno_kernels.backends.triton import configs
from dsno_kernels.backends.triton.configs import Architecture, Config, RowKey
from tests import test_triton_aot, triton_aot
from tests.triton_aot import Launch, Report

NOISE = 0.02  # a gain below this leaves the old row

Score = Callable[[RowKey, Config, Usage], float]


class Rejected(Exception):
    """Why a candidate cannot be used, in one line."""


class Spills(Rejected):
    """Too few registers: larger tiles spill too, however deep they load ahead."""


class Overflows(Rejected):
    """Too little shared memory: larger tiles overflow too, if they load as far ahead."""


class Tried(NamedTuple):
    """A candidate: the model's guess before it was compiled, its score, and what is wrong."""

    config: Config
    guess: float
    seconds: float | None
    problem: str | None


class Choice(NamedTuple):
    """The outcome of a row; `new` is None where no candidate can be used."""

    key: RowKey
    old: Config
    new: Config | None
    tried: list[Tried]

    def seconds_of(self, config: Config | None) -> float | None:
        return next((one.seconds for one in self.tried if one.config == config), None)


class Gate:
    """Compiles the launches that a row serves in tests/test_triton_aot.py, for a GPU not needed.

    Reports are kept in the folder for temporary files, by kernel source, launch and version.
    """

    def __init__(self, table: Architecture, capability: tuple[int, int], gpu: Gpu) -> None:
        self.table, self.gpu = table, gpu
        self.capability = 10 * capability[0] + capability[1]
        self.pending: dict[Launch, Future[Report | str]] = {}
        self.users: dict[RowKey, list[Callable[[], object]]] = {}
        for call in test_triton_aot.calls():
            seen = self._rows_of(call)
            served = {pair for key in seen for pair in partners(key)}
            for key in served:
                self.users.setdefault(key, []).append(call)

    def _rows_of(self, call: Callable[[], object]) -> set[RowKey]:
        """The rows that a call looks up."""
        rows = test_triton_aot.Rows(self.table.rows)
        watched = dataclasses.replace(self.table, rows=rows)
        triton_aot.launches_of(watched, self.capability, call)
        return rows.seen

    def launches(self, key: RowKey, config: Config) -> list[Launch]:
        """The launches of the row's kernel with a configuration, the hardest first."""
        table = with_row(self.table, key, config)
        found: dict[Launch, None] = {}
        for call in self.users[key]:
            for one in triton_aot.launches_of(table, self.capability, call):
                if one.kernel == f"{key[0]}_kernel":
                    found[one] = None
        # Wide tiles read packed weights alone.
        wide = not key[2].endswith("narrow")
        fitting = [one for one in found if not wide or dict(one.constants).get("PACKED", True)]
        return sorted(fitting, key=_ease)

    def submit(self, key: RowKey, config: Config, pool: Executor) -> None:
        """Compile the hardest launch in the background."""
        one = self.launches(key, config)[0]
        if one not in self.pending:
            self.pending[one] = pool.submit(compiled, one)

    def check(self, key: RowKey, config: Config, every: bool) -> Usage:
        """What the hardest launch uses; `Rejected` if it, or with `every` any other, is unfit."""
        launches = self.launches(key, config)
        reports = []
        for one in launches if every else launches[:1]:
            report = self.pending[one].result() if one in self.pending else compiled(one)
            problem = report if isinstance(report, str) else self._problem(one, report)
            if problem is not None:
                raise self._kind(report)(problem)
            assert isinstance(report, Report)
            reports.append(report)
        return Usage(reports[0].registers, reports[0].shared, reports[0].async_copies > 0)

    def _kind(self, report: Report | str) -> type[Rejected]:
        if isinstance(report, str):
            return Rejected
        return (
            Spills if report.stack else Overflows if report.shared > self.gpu.shared else Rejected
        )

    def _problem(self, one: Launch, report: Report) -> str | None:
        if self.capability in test_triton_aot.SHARED:
            return test_triton_aot.problem_of(one, report)
        if report.stack:
            return f"spills: {report.stack} bytes of stack"
        if report.shared > self.gpu.shared:
            return f"{report.shared} bytes of shared memory, {self.gpu.shared} fit"
        return None


def with_row(table: Architecture, key: RowKey, config: Config) -> Architecture:
    """The table with a configuration in a row, and in its partners.

    So the row's kernel runs with it however many programs there are.
    """
    pair = partners(key)
    rows = {other: config if other in pair else own for other, own in table.rows.items()}
    return dataclasses.replace(table, rows=rows)


def partners(key: RowKey) -> set[RowKey]:
    """The wide and the narrow row of a class: which serves a call depends on their tiles."""
    kernel, method, kind = key
    wide = kind.removesuffix("narrow").strip()
    return {(kernel, method, wide), (kernel, method, f"{wide} narrow".strip())}


def _ease(one: Launch) -> tuple[int, int]:
    """Small for large tiles and for many optional operands: those launches spill first."""
    size = math.prod(value for name, value in one.constants if name.startswith("BLOCK"))
    return -size, sum(value is None for _, value in one.constants)


def compiled(one: Launch) -> Report | str:
    """The report of a launch, from the disk if it was compiled before; or why it fails."""
    module = importlib.import_module(one.module)
    sources = getattr(module, one.kernel).cache_key, inspect.getsource(triton_aot)
    version = importlib.metadata.version("triton")
    name = hashlib.sha256(repr((sources, version, one)).encode()).hexdigest()
    path = Path(tempfile.gettempdir()) / f"dsno_kernels_tune_{os.getuid()}" / f"{name}.json"
    if path.exists():
        kept = json.loads(path.read_text())
        return kept if isinstance(kept, str) else Report(**kept)
    report: Report | str
    try:
        report = triton_aot.compile_launch(one)
    except Exception as error:  # the compiler raises errors of many kinds
        lines = str(error).strip().splitlines() or [""]
        report = f"does not compile: {type(error).__name__}: {lines[0]}"
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, json.dumps(report if isinstance(report, str) else report._asdict()))
    return report


def choose(
    key: RowKey,
    old: Config,
    order: Sequence[Config],
    *,
    guess: Callable[[Config], float],
    check: Callable[[RowKey, Config, bool], Usage],
    score: Score,
    bounded: bool,
    most: int,
    seconds: float = math.inf,
    now: Callable[[], float] = time.monotonic,
) -> Choice:
    """Try the old configuration, then at most `most` candidates in order, for `seconds`.

    `guess` is the model before compilation. Where it bounds the score from below (`bounded`), the
    search ends at the first candidate that cannot win; only what passes the whole gate is scored
    then, or what cannot be used would end it. Otherwise the winner passes the whole gate.
    """
    tried: list[Tried] = []
    unfit: list[tuple[Config, Rejected]] = []
    begin = now()
    for config in (old, *(one for one in order if one != old)):
        best = min((one.seconds for one in tried if one.seconds is not None), default=math.inf)
        if config != old and (
            len(tried) > most or now() - begin > seconds or (bounded and guess(config) >= best)
        ):
            break
        if any(_needs_more(config, *one) for one in unfit):
            continue
        try:
            usage = check(key, config, bounded)
        except Rejected as error:
            unfit.append((config, error))
            tried.append(Tried(config, guess(config), None, str(error)))
            continue
        try:
            tried.append(Tried(config, guess(config), score(key, config, usage), None))
        except Rejected as error:
            tried.append(Tried(config, guess(config), None, str(error)))
    return Choice(key, old, _winner(key, old, tried, check), tried)


def _winner(
    key: RowKey, old: Config, tried: list[Tried], check: Callable[[RowKey, Config, bool], Usage]
) -> Config | None:
    """The best that passes the whole gate; the old one unless it is beaten by more than noise.

    What the whole gate says against a candidate is added to `tried`.
    """

    def fit(place: int) -> bool:
        try:
            check(key, tried[place].config, True)
        except Rejected as error:
            tried[place] = tried[place]._replace(problem=str(error))
            return False
        return True

    scores = {place: one.seconds for place, one in enumerate(tried) if one.seconds is not None}
    keeps = 0 in scores and fit(0)
    threshold = scores[0] * (1 - NOISE) if keeps else math.inf
    for place in sorted(scores, key=scores.__getitem__):
        if scores[place] >= threshold:
            break
        if place != 0 and fit(place):
            return tried[place].config
    return old if keeps else None


def _needs_more(config: Config, unfit: Config, reason: Rejected) -> bool:
    """Whether a configuration must fail for the reason for which another one failed."""
    larger = all(a >= b for a, b in zip(config.tile, unfit.tile, strict=True))
    ahead = config.num_stages >= unfit.num_stages
    return (
        larger
        and config.num_warps == unfit.num_warps
        and (isinstance(reason, Spills) or (isinstance(reason, Overflows) and ahead))
    )


def modeled(gpu: Gpu) -> Score:
    """The model's time with what the compiler reports."""
    return lambda key, config, usage: row_seconds(key, config, gpu, usage)


class TableFile:
    """The data of one architecture, and the file that holds it."""

    def __init__(self, path: Path, data: dict[str, Any]) -> None:
        self.path, self.data = path, data

    @classmethod
    def open(cls, folder: Path, capability: tuple[int, int], gpu: Gpu) -> TableFile:
        """The file of an architecture; where there is none, the rows of the safe one."""
        path = configs.table_path(capability, folder)
        own = path.is_file()
        source = path if own else configs.table_path((8, 6))
        data = json.loads(source.read_text(encoding="utf-8"))
        configs.parse(data, source.name)
        if not own:
            data |= {"architecture": path.stem, "multiprocessors": gpu.multiprocessors}
            data["rows"] = [{**row, "source": "compiled"} for row in data["rows"]]
        return cls(path, data)

    def architecture(self) -> Architecture:
        return configs.parse(self.data, self.path.name)

    def row(self, key: RowKey) -> dict[str, Any]:
        for row in self.data["rows"]:
            if (row["kernel"], row["method"], row["class"]) == key:
                return row
        raise KeyError(key)

    def update(self, key: RowKey, config: Config, source: str) -> None:
        """Change one row, in memory and on the disk."""
        self.row(key).update(
            tile=list(config.tile),
            warps=config.num_warps,
            stages=config.num_stages,
            source=source,
        )
        self.architecture()
        write_atomically(self.path, self.text())

    def text(self) -> str:
        """JSON with a row on a line, so that a change of one row is one changed line."""
        head = [
            f"  {json.dumps(field)}: {json.dumps(value)},"
            for field, value in self.data.items()
            if field != "rows"
        ]
        rows = ",\n".join(f"    {json.dumps(row)}" for row in self.data["rows"])
        return "\n".join(["{", *head, '  "rows": [', rows, "  ]", "}", ""])


def write_atomically(path: Path, text: str) -> None:
    """Whoever reads `path` finds the old text or the new one, never a part."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
