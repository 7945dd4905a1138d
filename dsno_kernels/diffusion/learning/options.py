"""How a time grid is learned: the options of `learn_time_grid` that are seldom changed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

from dsno_kernels.diffusion.learning.parameters import MODES
from dsno_kernels.diffusion.processes import integer, one_number

OPTIMIZERS = ("lbfgs", "adam")


@dataclass(frozen=True)
class LearningOptions:
    """Options of :func:`learn_time_grid`.

    Args:
        mode: what the gaps of the grid are shares of, "log_snr" or "time"; "auto" is the log-SNR
            where it is finite at both ends.
        decoupled: learn the times of the model's calls too, beside those of the steps.
        coefficients: learn corrections of the solver's coefficients too (as S4S and GAS do).
        soft: between rounds move each start within a ball, where that lowers its loss; LD3's soft
            objective. Validation data stay where they are.
        radius: of that ball, in units of sigma at the first time; None is 0.001 d / NFE^2 for
            samples of d numbers.
        optimizer: "lbfgs" on all training data at once, or "adam" on batches of them: for networks
            whose evaluations cost too much for that, and for the exact denoiser of a data set.
        iterations: of the optimizer, over all rounds.
        rounds: after each the grid is validated, and kept if it is the best so far.
        learning_rate: of Adam at first, falling to 0 like a cosine; None is 0.1 over the number of
            steps. L-BFGS searches its own steps.
        batch: samples that are computed at a time; None is all of them. With "adam" it is the
            batch, that of each process in a group.
        validation: share of the data that is not trained on, which judges the grid; 0 takes the
            loss of the training data for that.
        recompute: keep the states alone for the backward pass and compute the model's insides
            again, so that memory does not grow with the number of steps; costs one more evaluation
            a step.
        partial: go on with a denoiser that is not differentiable, instead of raising. In t: its
            calls stay at the times of the first grid, and the steps are learned. In x: its own
            share of the gradient is missing, so the grid is not the best there is.
        match_official: LD3's own parametrization, optimizers and schedule, as its code has them.
            Of these options `mode`, `decoupled`, `soft`, `radius`, `batch` (2 by default),
            `validation` (0.5 there), `recompute`, `partial` and `seed` count then; validation data
            move, too, and the first grid is equal steps in `mode`.
        seed: of the order of batches.

    Raises:
        ValueError: a value out of range. TypeError: no number, or no bool, where one is needed.
    """

    mode: str = "auto"
    decoupled: bool = True
    coefficients: bool = False
    soft: bool = True
    radius: float | None = None
    optimizer: str = "lbfgs"
    iterations: int = 60
    rounds: int = 4
    learning_rate: float | None = None
    batch: int | None = None
    validation: float = 0.2
    recompute: bool = False
    partial: bool = False
    match_official: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (("mode", MODES), ("optimizer", OPTIMIZERS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"unknown {name} {getattr(self, name)!r}; known are {', '.join(known)}"
                )
        self._convert(integer, "iterations", "rounds", "batch", "seed")
        self._convert(one_number, "radius", "learning_rate", "validation")
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(field.default, bool) and not isinstance(value, bool):
                raise TypeError(f"{field.name} must be True or False, got {value!r}")
        for name in ("iterations", "rounds", "batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in ("radius", "learning_rate"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value < math.inf:
                raise ValueError(f"{name} must be positive, got {value}")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must be in 0 .. 2**64 - 1, got {self.seed}")
        if not 0.0 <= self.validation < 1.0:
            raise ValueError(f"validation must be in [0, 1), got {self.validation}")
        if self.match_official and self.coefficients:
            raise ValueError("match_official learns no coefficients: give one of them")
        if self.optimizer == "adam" and self.batch is None:
            raise ValueError("optimizer 'adam' needs a batch: give the samples of one")

    def _convert(self, to: Callable[[str, object], float], *names: str) -> None:
        """To plain numbers, which files can hold; None stays where it is the default."""
        for name in names:
            value = getattr(self, name)
            if value is not None or getattr(type(self), name) is not None:
                object.__setattr__(self, name, to(name, value))
