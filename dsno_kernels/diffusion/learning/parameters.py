r"""Times of steps and of model calls as smooth functions of unconstrained numbers.

With u the log-SNR (mode "log_snr") or -t (mode "time"), which grow from noise to data, and U its
range between the ends of the grid,

.. math::
    u_i &= u_0 + U \sum_{j \le i} \operatorname{softmax}(p)_j \\
    u^{call}_i &= u_i + \tanh(q_i)\, \tfrac{1}{2} \min(u_i - u_{i-1},\, u_{i+1} - u_i)

with p the logits of the N gaps and q the offsets of the calls, so that times stay in order and a
call stays nearer to its own time than to any other of the grid, whatever the numbers are; the own
time of a stage may lie between two of the grid. Calls at the ends of the grid stay there. LD3
clamps all offsets to half of the smallest gap, which stops their gradient, takes the bound from the
graph, and in its log-SNR mode takes the gaps of the logits in place of those of the log-SNR;
`official_times` does the same.

Source: LD3 (arXiv 2405.15506), section 4, and its official code.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from dsno_kernels.diffusion.discrete import DiscreteVP
from dsno_kernels.diffusion.learned_grid import corrected
from dsno_kernels.diffusion.plan import SolverPlan

MODES = ("auto", "log_snr", "time")
# Logits lie within +-8: no gap is so small that its times coincide in float64.
_LOGITS = 8.0
_HALF = 0.5  # of a gap: how far a call may be from its time
# Of the range of u: times that are nearer to each other than that are the same, but for rounding.
_ROUNDING = 1e-10

# (times, denoiser_times or None) to the plan.
Build = Callable[[Tensor, Tensor | None], SolverPlan]


class TimeParameters:
    """The numbers that are learned, and the plan that they make.

    Args:
        process: has the ends of the grid in its range.
        grid: the N + 1 times to begin with; its ends stay.
        build: makes a plan of times.
        mode: one of `MODES`; "auto" is "log_snr" where that is finite at both ends.
        decoupled: whether the model's calls have times of their own.
        still: whether the calls stay at the times of the first grid, whatever the steps do.
        coefficients: whether corrections of the table's coefficients are learned.
        official: LD3's own parametrization, as its code has it.

    Attributes:
        numbers: float64 leaves: logits, then offsets and corrections where they are learned.

    Raises:
        ValueError: an unknown mode; "log_snr" where it is infinite at an end.
    """

    def __init__(
        self,
        process: Any,
        grid: Tensor,
        build: Build,
        *,
        mode: str = "auto",
        decoupled: bool = True,
        still: bool = False,
        coefficients: bool = False,
        official: bool = False,
    ) -> None:
        self.process, self.build, self.official = process, build, official
        self.decoupled = decoupled and not still
        self.ends = grid.detach()[[0, -1]]
        self.mode = _mode(process, self.ends, mode)
        plan = build(grid.detach(), None)
        self.steps = len(grid) - 1
        calls = plan.model_times
        self._calls = calls if still else None
        self._fixed = (calls == self.ends[0]) | (calls == self.ends[1])
        # Where each step calls the model once, at its time, one plan makes both.
        self._own = len(calls) == self.steps and calls.equal(plan.grid[:-1])
        if official and not self._own:
            raise ValueError(
                f"match_official is for solvers with one call a step, which {plan.solver} is not"
            )
        self._free = _free_coefficients(plan) if coefficients else None
        self._size = plan.table.detach().abs()
        count = self.steps + 1 if official else 0
        logits = torch.ones(count).double() if official else _logits(self._u(grid.detach()))
        self.numbers = [logits]
        if self.decoupled:
            self.numbers.append(torch.zeros(count or len(calls), dtype=torch.float64))
        if self._free is not None:
            self.numbers.append(torch.zeros(int(self._free.sum()), dtype=torch.float64))
        for number in self.numbers:
            number.requires_grad_()

    def plan(self) -> SolverPlan:
        """The plan that the numbers make now, differentiable in them."""
        if self.official:
            t1, t2 = official_times(
                self.process,
                self.numbers[0],
                self.numbers[1] if self.decoupled else torch.zeros_like(self.numbers[0]),
                mode=self.mode,
                ends=self.ends,
            )
            plan = self.build(t1, t2[:-1] if self.decoupled else self._calls)
        else:
            plan = self._plan()
        added = self.corrections()
        return plan if added is None else corrected(plan, added)

    def corrections(self) -> Tensor | None:
        """What is added to the plan's table: shares of the coefficients of the first grid. None:
        nothing.
        """
        if self._free is None:
            return None
        added = torch.zeros_like(self._size).masked_scatter(self._free, self.numbers[-1])
        return added * self._size

    def values(self) -> list[Tensor]:
        """A copy of the numbers."""
        return [number.detach().clone() for number in self.numbers]

    @torch.no_grad()
    def restore(self, values: list[Tensor]) -> None:
        for number, value in zip(self.numbers, values, strict=True):
            number.copy_(value)

    @contextlib.contextmanager
    def at(self, values: list[Tensor]) -> Iterator[None]:
        """Within it the numbers are others."""
        before = self.values()
        self.restore(values)
        try:
            yield
        finally:
            self.restore(before)

    def _plan(self) -> SolverPlan:
        gaps = torch.softmax(_LOGITS * torch.tanh(self.numbers[0] / _LOGITS), 0)
        low, high = self._u(self.ends)
        u = low + (high - low) * gaps[:-1].cumsum(0)
        grid = torch.cat([self.ends[:1], self._t(u), self.ends[1:]])
        if not self.decoupled:
            return self.build(grid, self._calls)
        own = grid[:-1] if self._own else self.build(grid, None).model_times
        center = self._u(own)
        away = (center[:, None] - torch.cat([low[None], u, high[None]])).abs()
        others = away.masked_fill(away <= _ROUNDING * (high - low), torch.inf)
        moved = self._t(center + _HALF * others.amin(1) * torch.tanh(self.numbers[1]))
        return self.build(grid, torch.where(self._fixed, own, moved))

    def _u(self, t: Tensor) -> Tensor:
        log_snr: Tensor = self.process.log_snr(t) if self.mode == "log_snr" else -t
        return log_snr

    def _t(self, u: Tensor) -> Tensor:
        times: Tensor = self.process.inverse(u) if self.mode == "log_snr" else -u
        return times


def official_times(
    process: Any, logits: Tensor, offsets: Tensor, *, mode: str, ends: Tensor
) -> tuple[Tensor, Tensor]:
    """Times of steps and calls of LD3's official code, ``(N + 1,)`` each.

    Args:
        logits, offsets: ``(N + 1,)``; the first logit has no effect. In mode "time" the logits are
            in reversed order.
        mode: "time" or "log_snr".
        ends: first and last time.
    """
    shares = torch.softmax(logits, 0)[1:]
    total = torch.cat([shares.new_zeros(1), shares.cumsum(0)]) / shares.sum()
    inside = torch.ones_like(offsets)
    inside[[0, -1]] = 0.0
    if mode == "time":
        t1 = (ends[1] + total * (ends[0] - ends[1])).flip(0)
        # The official times of a discrete model of n times are ours over n.
        unit = len(process.alphas_cumprod) if isinstance(process, DiscreteVP) else 1
        bound = _HALF * float(t1.detach().diff().abs().min()) / unit
        return t1, t1 + unit * offsets.clamp(-bound, bound) * inside
    low, high = process.log_snr(ends)
    u = low + total * (high - low)
    bound = _HALF * float(logits.detach().diff().abs().min())  # of the logits, as it stands there
    shifted = u + offsets.clamp(-bound, bound) * inside
    t1, t2 = (torch.cat([ends[:1], process.inverse(v[1:-1]), ends[1:]]) for v in (u, shifted))
    return t1, t2


def finite_log_snr(process: Any, times: Tensor) -> bool:
    """Whether alpha and sigma are there at all these times."""
    return bool(torch.isfinite(process.log_snr(times)).all())


def _mode(process: Any, ends: Tensor, mode: str) -> str:
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}; known are {', '.join(MODES)}")
    finite = finite_log_snr(process, ends)
    if mode == "log_snr" and not finite:
        raise ValueError(
            f"mode 'log_snr' needs alpha > 0 and sigma > 0 at both ends of the grid, t ="
            f" {ends.tolist()}; take mode 'time', or move the ends inwards"
        )
    if mode == "auto":
        return "log_snr" if finite else "time"
    return mode


def _logits(u: Tensor) -> Tensor:
    """Of the gaps of u, as `_plan` takes them."""
    logits = u.diff().log()
    logits = (logits - logits.mean()).clamp(-0.99 * _LOGITS, 0.99 * _LOGITS)
    return _LOGITS * torch.atanh(logits / _LOGITS)


def _free_coefficients(plan: SolverPlan) -> Tensor:
    """Which entries of the table can be corrected, bool: the coefficients a and c_j of the state,
    and where a row looks ahead those of the point; not those that are 0.
    """
    free = torch.zeros_like(plan.table, dtype=torch.bool)
    for name in ("a_b", "c_b"):
        free[:, plan.columns[name]] = True
    for name in ("a_p", "c_p"):
        free[:, plan.columns[name]] = plan.looks_ahead[:, None]
    # A row that leaves base alone is a stage: it goes on doing so.
    free[:, plan.columns["a_b"]] &= plan.advances[:, None]
    return free & (plan.table.detach() != 0)
