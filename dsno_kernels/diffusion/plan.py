r"""SolverPlan: a sampler as one table of coefficients, one row a model evaluation.

The state is `base`, what the solver integrates, and `point`, where the model is evaluated. At row i
the model is called at ``c_in * point`` and time ``model_times[i]`` and gives m. Then

.. math::
    h_0 &= A\, point + B\, m \\
    base' &= a_b\, base + \sum_j c_b[j]\, h_j + s \cdot noise \\
    point' &= a_p\, base' + \sum_j c_p[j]\, h_j

where h_1, h_2, .. are the entries of earlier rows, newest first. Plain multistep solvers have
a_p = 1, c_p = 0: point is base. Stages of Runge-Kutta methods leave base alone and move point;
UniPC corrects base and looks ahead to the next point.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from dsno_kernels.diffusion._table import (
    Settings,
    check_choices,
    check_seeds,
    columns_of,
    numbers,
)
from dsno_kernels.diffusion.grids import check_range, check_times, stacked
from dsno_kernels.diffusion.processes import Process, one_number, outside_inference_mode
from dsno_kernels.diffusion.solvers import find
from dsno_kernels.diffusion.solvers._problem import Churn

Denoiser = Callable[[Tensor, Tensor], Tensor]
Noise = Callable[[int], Tensor]


@dataclass(frozen=True, eq=False, repr=False)
class SolverPlan:
    """The table of a sampler; make it with `SolverPlan.build`.

    Attributes:
        table: float64, ``(evaluations, columns)``, on the CPU; differentiable in the grid if the
            grid requires gradients. Do not change it in place: plans are shared.
        history_length: K, the number of history entries that a row may use.
        grid: the N + 1 times.
        model_times: the time of each evaluation, ``(evaluations,)``.
        times: the time of base after each row, ``(evaluations,)``.
        initial: ``(2,)``: base starts as initial[0] * x + initial[1] * noise.
        initial_c_in: 0-d; scales the input of the first evaluation.
    """

    grid: Tensor
    table: Tensor
    model_times: Tensor
    times: Tensor
    initial: Tensor
    initial_c_in: Tensor
    history_length: int
    _settings: Settings
    _seeds: Tensor
    _given_model_times: bool

    @classmethod
    @outside_inference_mode  # a shared plan must not hold inference tensors
    def build(
        cls,
        process: Any,
        grid: Tensor | Sequence[float],
        solver: str = "tab3",
        order: int | None = None,
        history: str | None = None,
        start: str | Tensor | Sequence[float] = "warm_up",
        end: str = "full",
        denoiser_times: Tensor | Sequence[float] | None = None,
        prediction: str = "eps",
        eta: float | None = None,
        S_churn: float = 0.0,
        S_min: float = 0.0,
        S_max: float = torch.inf,
        S_noise: float = 1.0,
    ) -> SolverPlan:
        """The plan of a solver on a grid.

        Args:
            process: has alpha, sigma, log_snr and inverse; preconditioning too for "edm".
            grid: N + 1 decreasing times, from `time_grid` or your own. A tensor that requires
                gradients makes a differentiable table; no gradient flows to an end where sigma
                or alpha is 0.
            solver: a name of `dk.diffusion.solvers()`.
            order: the number in the solver's name, where the name leaves it out. With fewer
                history entries than that (the first steps, or N < order) the order is lower.
            history: what the solver combines, "eps", "x0" or "flow"; the solver's own by default.
            start: "warm_up" begins with order 1 and takes one more entry each step. Or the times
                of history entries that you have, newest first: before grid[0], decreasing from
                there outwards; the sampler then takes those entries.
            end: "full", "lower_order_final" (order at most the number of steps left) or
                "euler_at_final" (last step of order 1).
            denoiser_times: times of the model calls, one an evaluation, instead of the solver's
                (LD3, arXiv 2405.15506): the network and its conversion to the history type use
                these, the coefficients the grid.
            prediction: what the model returns: "eps", "x0", "v", "flow", "score" or "edm".
            eta: amount of noise of "ddim" (0 by default) and "sde_*" (1).
            S_churn, S_min, S_max, S_noise: noise before each step of "euler" and "heun" (EDM,
                algorithm 2), in units of rho = sigma / alpha.

        Returns:
            The plan; the same object for equal arguments, when neither times nor process need
            gradients and the process is compared by its values (:meth:`Process.plain`).

        Raises:
            TypeError: arguments of a wrong type. ValueError: times that are not finite, strictly
            decreasing and inside the process (names the index); unknown names (lists the known
            ones); a solver that does not work on this history; coefficients that do not exist,
            such as those of eps history where alpha = 0.

        Example:
            >>> process = dk.diffusion.VPLinear()
            >>> plan = dk.diffusion.SolverPlan.build(process, dk.diffusion.time_grid(process, 10))
            >>> plan.evaluations, plan.history_length
            (10, 4)
        """
        for name in ("alpha", "sigma", "log_snr", "inverse"):
            if not callable(getattr(process, name, None)):
                raise TypeError(f"process must have a method {name}, got {process!r}")
        times = check_times(process, grid)
        seeds: Tensor = times.new_empty(0)
        calls: Tensor | None = None
        if not isinstance(start, str):
            seeds = check_seeds(times, start)
        elif start != "warm_up":
            raise ValueError(f"start must be 'warm_up' or times before grid[0], got {start!r}")
        if denoiser_times is not None:
            calls = stacked("denoiser_times", denoiser_times)
            check_range(process, calls, "denoiser_times")
        found = find(solver, order)
        churn = Churn(
            one_number("S_churn", S_churn),
            one_number("S_min", S_min),
            one_number("S_max", S_max),
            one_number("S_noise", S_noise),
        )
        eta = None if eta is None else one_number("eta", eta)
        check_choices(found, process, history, end, prediction, eta, churn)
        settings = Settings(
            process=process,
            solver=found.name,
            history=history or found.histories[0],
            end=end,
            prediction=prediction,
            eta=eta,
            churn=churn,
        )
        return _built(settings, times, seeds, calls)

    @property
    def evaluations(self) -> int:
        """NFE: the number of rows."""
        return len(self.table)

    @cached_property
    def columns(self) -> dict[str, slice]:
        """Slices of the table by name: A, B, a_b, c_b, s, a_p, c_p, c_in, in this order. Row i's
        c_in scales the input of evaluation i + 1.
        """
        return columns_of(self.history_length)

    @property
    def solver(self) -> str:
        return self._settings.solver

    @property
    def process(self) -> Any:
        return self._settings.process

    @property
    def history(self) -> str:
        return self._settings.history

    @property
    def end(self) -> str:
        return self._settings.end

    @property
    def prediction(self) -> str:
        return self._settings.prediction

    def column(self, name: str) -> Tensor:
        """One column ``(R,)``, or the ``(R, K)`` of c_b and c_p."""
        if name not in self.columns:
            raise ValueError(f"unknown column {name!r}; known are {', '.join(self.columns)}")
        values = self.table[:, self.columns[name]]
        return values if name in ("c_b", "c_p") else values[:, 0]

    @cached_property
    def looks_ahead(self) -> Tensor:
        """Whether point' differs from base', ``(R,)`` bool."""
        moved = (self.column("c_p").detach() != 0).any(1)
        return moved | (self.column("a_p").detach() != 1)

    @cached_property
    def advances(self) -> Tensor:
        """Whether the row changes base, ``(R,)`` bool: not the stages of Runge-Kutta methods."""
        same = (self.column("c_b").detach() == 0).all(1) & (self.column("a_b").detach() == 1)
        return ~same | (self.column("s").detach() != 0)

    def stochastic(self) -> bool:
        """Whether noise is added anywhere."""
        noise = self.column("s").detach()
        return bool((noise != 0).any()) or float(self.initial[1].detach()) != 0

    @outside_inference_mode
    def reversed(self) -> SolverPlan:
        """The same solver from data to noise: the grid backwards.

        Raises:
            ValueError: the plan adds noise, has its own denoiser times or a seeded history.
        """
        if self.stochastic() or self._given_model_times or len(self._seeds):
            raise ValueError(
                "only a plan without noise, denoiser_times and seeded history can be reversed"
            )
        return _built(self._settings, self.grid.flip(0), self._seeds, None)

    def replay(
        self,
        denoiser: Denoiser,
        x: Tensor,
        history: Sequence[Tensor] = (),
        noise: Noise | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Sample with the table in plain PyTorch: what every other implementation must equal.

        Args:
            denoiser: ``denoiser(input, t)`` with a 0-d float64 t; returns what `prediction` says.
            x: the sample at ``grid[0]``, any shape and float dtype.
            history: entries before the first evaluation, newest first, as many as `start` had.
            noise: gives the noise of row i, and that of `initial` for i = -1; by default drawn
                from `generator`.

        Returns:
            The sample at ``grid[-1]``.
        """
        if len(history) != len(self._seeds):
            raise ValueError(
                f"the plan starts from {len(self._seeds)} history entries, got {len(history)}"
            )

        def draw(row: int) -> Tensor:
            if noise is not None:
                return noise(row)
            return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)

        scale, s = self.initial.unbind()
        base = scale * x if float(s.detach()) == 0 else scale * x + s * draw(-1)
        point, c_in, entries = base, self.initial_c_in, list(history)
        floats = self.table.tolist()
        rows = [row.unbind() for row in self.table] if self.table.requires_grad else floats
        c_b, c_p, K = self.columns["c_b"], self.columns["c_p"], self.history_length
        for i, (row, sizes) in enumerate(zip(rows, floats, strict=True)):
            A, B, a_b, s, a_p = (row[self.columns[k].start] for k in ("A", "B", "a_b", "s", "a_p"))
            m = denoiser(c_in * point, self.model_times[i])
            entries = [A * point + B * m, *entries][:K]
            base = a_b * base + _combined(row[c_b], sizes[c_b], entries)
            if sizes[c_b.stop] != 0:
                base = base + s * draw(i)
            point = a_p * base + _combined(row[c_p], sizes[c_p], entries)
            c_in = row[-1]
        return base

    def __repr__(self) -> str:
        return (
            f"SolverPlan({self.solver}, steps={len(self.grid) - 1}, evaluations={self.evaluations},"
            f" history={self.history}, prediction={self.prediction}, process={self.process!r})"
        )

    def __str__(self) -> str:
        names = ["row", "model time", "time after"]
        values = [self.model_times.tolist(), self.times.tolist()]
        idle = {"A": 0.0, "B": 1.0, "s": 0.0, "a_p": 1.0, "c_p": 0.0, "c_in": 1.0}
        for name in self.columns:
            block = self.table.detach()[:, self.columns[name]]
            if name in idle and bool((block == idle[name]).all()):
                continue  # a column that does nothing
            for j in range(block.shape[1]):
                names.append(f"{name}[{j}]" if name in ("c_b", "c_p") else name)
                values.append(block[:, j].tolist())
        cells = [
            [str(i), *(f"{column[i]:.6g}" for column in values)] for i in range(len(self.table))
        ]
        widths = [max(map(len, column)) for column in zip(names, *cells, strict=True)]
        lines = [
            "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
            for line in [names, *cells]
        ]
        return "\n".join([repr(self), *lines])


def _combined(c: Sequence[Any], sizes: list[float], entries: Sequence[Tensor]) -> Tensor | float:
    """The sum of c_j h_j; a zero coefficient reads nothing."""
    terms = [c_j * h for c_j, size, h in zip(c, sizes, entries, strict=False) if size != 0]
    return sum(terms[1:], terms[0]) if terms else 0.0


def _built(
    settings: Settings, grid: Tensor, seeds: Tensor, model_times: Tensor | None
) -> SolverPlan:
    given = [grid, seeds] if model_times is None else [grid, seeds, model_times]
    plain = isinstance(settings.process, Process) and settings.process.plain()
    if not plain or any(times.requires_grad for times in given):
        return _computed(settings, grid, seeds, model_times)
    return _cached(settings, *(tuple(times.tolist()) for times in given))


@lru_cache(maxsize=64)
def _cached(settings: Settings, *given: tuple[float, ...]) -> SolverPlan:
    grid, seeds, *calls = (torch.tensor(t, dtype=torch.float64, device="cpu") for t in given)
    return _computed(settings, grid, seeds, calls[0] if calls else None)


def _computed(
    settings: Settings, grid: Tensor, seeds: Tensor, model_times: Tensor | None
) -> SolverPlan:
    with torch.device("cpu"):  # whatever the default device is
        made = numbers(settings, grid, seeds, model_times)
    return SolverPlan(
        grid=grid,
        **made._asdict(),
        _settings=settings,
        _seeds=seeds,
        _given_model_times=model_times is not None,
    )
