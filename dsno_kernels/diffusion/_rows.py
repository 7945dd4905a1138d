"""The rows of a plan, one after the other: what `sample` runs.

A state is a flat tuple ``(base, point, x, *entries)``: x is the model's next input, entries the
history, newest first. So it passes through `torch.utils.checkpoint` as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dsno_kernels.diffusion._calls import Calls
from dsno_kernels.diffusion.plan import SolverPlan
from dsno_kernels.functional import exp_step, solver_step

State = tuple[Tensor, ...]
# States kept for the backward pass with `recompute`, at each of its log(evaluations) levels.
SEGMENTS = 8


@dataclass(frozen=True)
class Setting:
    """What stays the same in all rows.

    Args:
        dtype: of the state.
        model_dtype: of the model's input.
        noise: the caller's own, by row.
        seeds: int64, rows of two for the noise before the first row and of each row (`padded`);
            None for a plan without noise, or with the caller's.
        keep_entry: whether the newest history entry is wanted by somebody other than the solver.
        options: of `solver_step`, the same for every row.
    """

    plan: SolverPlan
    calls: Calls
    dtype: torch.dtype
    model_dtype: torch.dtype
    device: torch.device
    noise: Callable[[int], Tensor] | None
    seeds: Tensor | None
    keep_entry: bool
    options: dict[str, Any]

    @cached_property
    def scaled(self) -> bool:
        """Whether the model's input is not the point itself."""
        return self.model_dtype != self.dtype or self.plan.prediction == "edm"

    @cached_property
    def times(self) -> Tensor:
        """Of the model calls, float64 where the state is, else float32; on the device."""
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        return self.plan.model_times.to(self.device, wide)

    def noise_of(self, row: int) -> dict[str, Any]:
        """The noise of a row as arguments of `solver_step`; row -1 comes before the first."""
        if self.noise is not None:
            return {"noise": self.noise(row)}
        assert self.seeds is not None
        return {"seed": self.seeds[row + 1]}

    def begin(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """base before the first row, and the model's first input."""
        plan, x = self.plan, x.to(self.dtype)
        scale, s = plan.initial.unbind()
        a_b, amount, c_in = (of.item() for of in (scale, s, plan.initial_c_in))
        values = [0.0, 0.0, a_b, 0.0, amount, 1.0, 0.0, c_in]
        if plan.initial.requires_grad or plan.initial_c_in.requires_grad:
            zero, one = torch.zeros_like(s), torch.ones_like(s)
            columns = [zero, zero, scale, zero, s, one, zero, plan.initial_c_in]
            row: Any = torch.stack(columns).to(self.device)
        elif (a_b, amount, c_in) == (1.0, 0.0, 1.0) and not self.scaled:
            return x, x
        else:
            row = values
        new = solver_step(
            x,
            x,
            row,
            keep_entry=False,
            input_dtype=self.model_dtype if self.scaled else None,
            backend=self.options["backend"],
            **(self.noise_of(-1) if amount != 0 else {}),
        )
        return new.base, new.base if new.model_input is None else new.model_input


class Rows:
    """Rows with coefficients from the host; nothing is changed in place, so all is
    differentiable.
    """

    def __init__(self, setting: Setting, check_finite: bool) -> None:
        self.setting, self.calls = setting, setting.calls.joined_once()
        plan = setting.plan
        self.sizes: list[list[float]] = plan.table.tolist()
        self.s = plan.columns["s"].start
        self.table: Sequence[Any] = self.sizes
        if plan.table.requires_grad:
            self.table = plan.table.to(setting.device).unbind()
        self.ahead: list[bool] = plan.looks_ahead.tolist()
        self.kept = plan.history_length - 1
        options = setting.options
        converted = plan.prediction != plan.history or setting.calls.unconditional is not None
        changed = options["clip"] is not None or options["threshold"] is not None
        self.direct = plan.table.requires_grad and not converted and not changed
        self.check_finite = check_finite
        # Of what the denoiser returned, by row: not finite where one value is not.
        self._sums: dict[int, Tensor] = {}

    def begin(self, x: Tensor, history: Sequence[Tensor]) -> State:
        base, first = self.setting.begin(x)
        entries = list(history)[: self.kept]
        if self.table is not self.sizes:  # a row on a device is not looked at: give it all it names
            entries += [torch.zeros_like(base)] * (self.kept - len(entries))
        return (base, base, first, *entries)

    def step(
        self, i: int, *state: Tensor, out: Tensor | None = None
    ) -> tuple[State, Tensor | None]:
        """Row i: the new state, its base written into `out`, and the newest entry where it is
        kept.
        """
        base, point, x, *entries = state
        setting = self.setting
        output, unconditional = self.calls(x, setting.times[i], i)
        if self.check_finite:
            total = output.detach().sum(dtype=setting.dtype)
            if unconditional is not None:
                total = total + unconditional.detach().sum(dtype=setting.dtype)
            self._sums[i] = total
        last = i == len(self.sizes) - 1
        if self.direct and self.sizes[i][self.s] == 0 and out is None:
            return self._direct_step(i, base, output, entries)
        new = solver_step(
            point,
            output,
            self.table[i],
            entries,
            base=None if base is point else base,
            unconditional=unconditional,
            looks_ahead=self.ahead[i],
            keep_entry=self.kept > 0 or setting.keep_entry,
            entry_dtype=setting.dtype,
            input_dtype=setting.model_dtype if setting.scaled and not last else None,
            out=out,
            **(setting.noise_of(i) if self.sizes[i][self.s] != 0 else {}),
            **setting.options,
        )
        x = new.point if new.model_input is None else new.model_input
        if new.entry is not None:
            entries = [new.entry, *entries][: self.kept]
        return (new.base, new.point, x, *entries), new.entry

    def _direct_step(
        self, i: int, base: Tensor, output: Tensor, entries: list[Tensor]
    ) -> tuple[State, Tensor | None]:
        """`step` where h_0 is the model's output and a graph is recorded: one pass for each sum,
        and one for its gradients, instead of another of each for the entry.
        """
        row, columns = self.table[i], self.setting.plan.columns
        terms = [output.to(self.setting.dtype), *entries]

        def combined(x: Tensor, a: str, c: str) -> Tensor:
            coefficients = row[columns[a].start : columns[c].stop]  # which are neighbors
            return exp_step(x, terms, coefficients, backend=self.setting.options["backend"])

        base = point = combined(base, "a_b", "c_b")
        if self.ahead[i]:
            point = combined(base, "a_p", "c_p")
        kept = terms[: self.kept] if self.kept else []
        entry = terms[0] if self.kept or self.setting.keep_entry else None
        return (base, point, point.to(self.setting.model_dtype), *kept), entry

    def states(
        self, state: State, slot: Callable[[int], Tensor | None] = lambda row: None
    ) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """After each row its number, base, and the newest entry where it is kept; base lies in the
        row's `slot` where it has one.
        """
        for i in range(len(self.sizes)):
            state, entry = self.step(i, *state, out=slot(i))
            yield i, state[0], entry

    def states_recomputed(
        self, state: State, frames: Iterable[int]
    ) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """As `states`, of the rows in `frames` and the last; see `_recomputed`."""
        last = len(self.sizes) - 1
        wanted = sorted({*frames, last} - {-1})
        results = self._recomputed(0, last + 1, wanted, *state)
        for i, base in zip(wanted, results, strict=False):
            yield i, base, None

    def finite(self) -> Tensor:
        """Whether what the denoiser returned was finite, by row."""
        return torch.stack(list(self._sums.values())).isfinite()

    def _recomputed(
        self, begin: int, end: int, frames: Sequence[int], *state: Tensor
    ) -> tuple[Tensor, ...]:
        """Rows begin .. end - 1, whose insides are computed again in the backward pass: base after
        each row of `frames`, in their order, then the new state.

        At most `SEGMENTS` states are kept; a stretch between two of them is divided likewise once
        it is computed again.
        """
        size = -(-(end - begin) // SEGMENTS)
        found: list[Tensor] = []
        for lo in range(begin, end, size):
            hi = min(lo + size, end)
            inside = [row for row in frames if lo <= row < hi]
            run = self._one if size == 1 else self._recomputed
            results = checkpoint(run, lo, hi, inside, *state, use_reentrant=False)
            found += results[: len(inside)]
            state = results[len(inside) :]
        return (*found, *state)

    def _one(self, i: int, end: int, frames: Sequence[int], *state: Tensor) -> State:
        new, _ = self.step(i, *state)
        return (*new[:1], *new) if frames else new
