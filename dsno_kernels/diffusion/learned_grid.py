"""`LearnedGrid`: times that were learned for one process, solver and number of steps, as a file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsno_kernels._files import write_json
from dsno_kernels.diffusion.discrete import DiscreteVP
from dsno_kernels.diffusion.plan import SolverPlan
from dsno_kernels.diffusion.process_files import check_process, described, rebuilt
from dsno_kernels.diffusion.processes import as_float64, outside_inference_mode
from dsno_kernels.diffusion.solvers import find

_KIND = "dsno_kernels time grid"
# Processes whose alpha and sigma at the times of a grid agree to this are the same.
_SAME = 1e-6


class GridFileError(ValueError):
    """Why a file cannot be used as a time grid, in one sentence."""


@dataclass(frozen=True)
class LearnedGrid:
    """The result of :func:`learn_time_grid`, and what its file holds.

    Attributes:
        process: the noising process whose times these are.
        solver: a full name of `dk.diffusion.solvers()`.
        history, prediction, end: as in :meth:`SolverPlan.build`.
        times: the N + 1 decreasing times of the steps.
        denoiser_times: the time of each call of the model.
        corrections: what is added to the plan's table, finite, a list for each row; None: nothing.
        loss: on the validation data; None where it was not measured.
        baselines: the same loss of other grids, by name.
        losses: of the training data, one an iteration.
        provenance: how it was learned: names and plain values.

    Example:
        >>> grid = dk.diffusion.LearnedGrid.load("grid.json")
        >>> images = dk.diffusion.sample(model, noise, grid.plan())
    """

    process: Any
    solver: str
    history: str
    prediction: str
    end: str
    times: tuple[float, ...]
    denoiser_times: tuple[float, ...]
    corrections: tuple[tuple[float, ...], ...] | None = None
    loss: float | None = None
    baselines: dict[str, float] = field(default_factory=dict)
    losses: tuple[float, ...] = ()
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("times", "denoiser_times", "losses"):
            object.__setattr__(self, name, tuple(map(float, getattr(self, name))))
        if self.corrections is not None:
            rows = tuple(tuple(map(float, row)) for row in self.corrections)
            if not all(math.isfinite(value) for row in rows for value in row):
                raise ValueError("corrections must be finite")
            object.__setattr__(self, "corrections", rows)
        if self.loss is not None:
            object.__setattr__(self, "loss", float(self.loss))
        baselines = {name: float(loss) for name, loss in dict(self.baselines).items()}
        object.__setattr__(self, "baselines", baselines)
        object.__setattr__(self, "provenance", dict(self.provenance))

    @classmethod
    def of_plan(cls, plan: SolverPlan, **more: Any) -> LearnedGrid:
        """The grid of a plan without corrections; `more` as in the attributes."""
        return cls(
            process=plan.process,
            solver=plan.solver,
            history=plan.history,
            prediction=plan.prediction,
            end=plan.end,
            times=tuple(plan.grid.tolist()),
            denoiser_times=tuple(plan.model_times.tolist()),
            **more,
        )

    @property
    def steps(self) -> int:
        return len(self.times) - 1

    @property
    def evaluations(self) -> int:
        """NFE: calls of the model."""
        return len(self.denoiser_times)

    def sigmas(self) -> list[float]:
        """sigma at the times: what flow-matching schedulers of diffusers take as `sigmas`."""
        values: list[float] = self.process.sigma(
            torch.tensor(self.times, dtype=torch.float64)
        ).tolist()
        return values

    def rhos(self) -> list[float]:
        """sigma / alpha at the times: what EDM, k-diffusion and the other schedulers of diffusers
        call sigmas.
        """
        alphas = self.process.alpha(torch.tensor(self.times, dtype=torch.float64)).tolist()
        return [s / a if a else math.inf for s, a in zip(self.sigmas(), alphas, strict=True)]

    @outside_inference_mode
    def plan(
        self,
        process: Any = None,
        *,
        solver: str | None = None,
        order: int | None = None,
        steps: int | None = None,
        prediction: str | None = None,
    ) -> SolverPlan:
        """The plan for :func:`sample`.

        Args:
            process, solver, order, steps: what the caller is going to use; None takes the grid's.
            prediction: what the model returns, where that is not what the grid was learned with.

        Raises:
            ValueError: the grid is of another process, solver, order or number of steps. TypeError:
            what was given as process is none.
        """
        if process is not None:
            check_process(process)
            _same_process(self.process, process, self.times)
        if solver is not None or order is not None:
            wanted = find(self.solver if solver is None else solver, order).name
            if wanted != self.solver:
                raise ValueError(
                    f"the grid was learned for solver {self.solver!r}, not for {wanted!r}: learn"
                    " one for it, a grid serves its own solver and order only"
                )
        if steps is not None and steps != self.steps:
            raise ValueError(f"the grid has {self.steps} steps, not {steps}: learn one of {steps}")
        plan = SolverPlan.build(
            self.process if process is None else process,
            self.times,
            self.solver,
            history=self.history,
            end=self.end,
            denoiser_times=self.denoiser_times,
            prediction=prediction or self.prediction,
        )
        return plan if self.corrections is None else corrected(plan, self.corrections)

    def save(self, path: str | Path) -> None:
        """Write a JSON file, which appears complete or not at all; its lists of times, sigmas and
        alphas can be pasted anywhere.

        Raises:
            OSError: the file cannot be written. One that was there is as it was.
        """
        content: dict[str, Any] = {"format": 1, "kind": _KIND, "steps": self.steps}
        content |= {f.name: getattr(self, f.name) for f in fields(self)}
        content["process"] = described(self.process)
        times = torch.tensor(self.times, dtype=torch.float64)
        content |= {"alphas": self.process.alpha(times).tolist(), "sigmas": self.sigmas()}
        write_json(path, content)

    @classmethod
    def load(cls, path: str | Path, process: Any = None) -> LearnedGrid:
        """The grid of a file that :meth:`save` wrote.

        Args:
            path: of the file.
            process: that of the grid, needed where the file cannot describe it: one of a class of
                your own.

        Raises:
            GridFileError: (a ValueError) no such file, no grid, a damaged one, or one of another
            process. TypeError: `process` is none.
        """
        if process is not None:
            check_process(process)
        content = _read(path)
        try:
            description = content.pop("process")
            points = (content.pop("alphas"), content.pop("sigmas"))
            made = rebuilt(description) if process is None else process
            steps = content.pop("steps")
            for name in ("format", "kind"):
                content.pop(name)
            grid = cls(process=made, **content)
            if steps != grid.steps:
                raise ValueError(f"steps is {steps!r}, and the times are those of {grid.steps}")
            _same_points(made, grid.times, points, str(description.get("kind")))
            grid.plan()  # checks all the rest
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise GridFileError(f"{path} is no whole grid ({error}); learn it again") from None
        except ValueError as error:
            raise GridFileError(f"{path}: {error}") from None
        return grid

    @classmethod
    def from_official(
        cls,
        path: str | Path,
        process: Any,
        solver: str,
        *,
        order: int | None = None,
        history: str | None = None,
        prediction: str = "eps",
        end: str = "lower_order_final",
    ) -> LearnedGrid:
        """The grid of a ``.pt`` file of the official LD3 code (``best_v2.pt``).

        Args:
            path: of the file, which is read with ``weights_only=True``.
            process: `EDM` for its variance-exploding models. Of a `DiscreteVP` of n times, the
                official time t is our n t - 1.
            solver, order, history, prediction, end: as in :meth:`SolverPlan.build`; the official
                DPM-Solver++ and UniPC lower the order at the end.

        Raises:
            GridFileError: (a ValueError) no such file, or not of that kind.
        """
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            both = as_float64("best_t_steps", content["best_t_steps"])
        except FileNotFoundError:
            raise GridFileError(f"{path} does not exist") from None
        except Exception as error:  # whatever torch.load meets in a foreign file
            first = str(error).partition("\n")[0]
            raise GridFileError(
                f"{path} is no result of the official LD3 code ({type(error).__name__}: {first})"
            ) from None
        if both.ndim != 1 or len(both) % 2 or len(both) < 4:
            raise GridFileError(
                f"{path}: best_t_steps must hold N + 1 times of the steps, then N + 1 of the"
                f" denoiser, got shape {tuple(both.shape)}"
            )
        if isinstance(process, DiscreteVP):
            both = both * len(process.alphas_cumprod) - 1.0
        times, denoiser_times = both.chunk(2)
        plan = SolverPlan.build(
            process,
            times,
            solver,
            order=order,
            history=history,
            end=end,
            denoiser_times=denoiser_times[:-1],
            prediction=prediction,
        )
        return cls.of_plan(plan, provenance={"official": Path(path).name})


def corrected(plan: SolverPlan, corrections: Tensor | Sequence[Sequence[float]]) -> SolverPlan:
    """The plan with something added to its table, ``(evaluations, columns)``; differentiable in it.

    Raises:
        ValueError: another shape.
    """
    added = as_float64("corrections", corrections)
    if added.shape != plan.table.shape:
        raise ValueError(
            f"corrections must have the shape of the table, {tuple(plan.table.shape)}, got"
            f" {tuple(added.shape)}"
        )
    return replace(plan, table=plan.table + added)


def _read(path: str | Path) -> dict[str, Any]:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise GridFileError(f"{path} does not exist; give a grid file (.json)") from None
    except (ValueError, OSError, RecursionError) as error:
        raise GridFileError(f"{path} cannot be read as JSON ({error})") from None
    if not isinstance(content, Mapping) or content.get("kind") != _KIND:
        raise GridFileError(f"{path} is no time grid; `LearnedGrid.save` writes them")
    if content.get("format") != 1:
        raise GridFileError(
            f"{path} has format {content.get('format')!r}; this version knows format 1"
        )
    return dict(content)


def _points(process: Any, times: Sequence[float]) -> tuple[Tensor, Tensor]:
    t = torch.tensor(times, dtype=torch.float64)
    return process.alpha(t), process.sigma(t)


def _same_process(own: Any, given: Any, times: Sequence[float]) -> None:
    points = [values.tolist() for values in _points(own, times)]
    _same_points(given, times, points, repr(own))


def _same_points(
    process: Any, times: Sequence[float], points: Sequence[Sequence[float]], name: str
) -> None:
    """Raise unless the process has these alphas and sigmas at the times."""
    for found, expected in zip(_points(process, times), points, strict=True):
        wanted = torch.tensor(expected, dtype=torch.float64)
        if found.shape != wanted.shape or not torch.allclose(found, wanted, _SAME, 1e-12):
            raise ValueError(
                f"the grid was learned for the process {name}, not for {process!r}: its times mean"
                " other noise there"
            )
