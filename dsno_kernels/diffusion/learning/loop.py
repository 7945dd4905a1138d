"""The loop of `learn_time_grid`: rounds of an optimizer, each followed by a validation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dsno_kernels.diffusion.learning.options import LearningOptions
from dsno_kernels.diffusion.learning.pairs import Pairs, Student, mean, summed
from dsno_kernels.diffusion.learning.parameters import TimeParameters
from dsno_kernels.diffusion.plan import SolverPlan

_ADAM_RATE = 0.1  # over the number of steps: with more of them less is to be moved
# Of the gradients of the loss over the numbers: below it there is nothing left to gain.
_TOLERANCE = 1e-9
_TINY = 1e-300


class NonFiniteError(Exception):
    """A loss or its gradient was NaN or infinite."""


class StoppedError(Exception):
    """The caller wants no more."""


class Found(NamedTuple):
    """Numbers that were judged."""

    loss: float | None
    values: list[Tensor]


class Loop:
    """What is learned from, and the best that was found so far.

    Args:
        parameters: what is learned.
        student: its sampler and loss.
        train, validation: this process's shares; the means are over all processes.
        radius: of the balls in which starts may move, in units of sigma.
        sigma: at the first time.

    Attributes:
        best: of all validations.
        lowest: the training loss that was lowest, with its numbers.
        losses: all training losses.
        evaluations: samples times calls of the denoiser, in this process.
    """

    def __init__(
        self,
        parameters: TimeParameters,
        student: Student,
        train: Pairs,
        validation: Pairs,
        options: LearningOptions,
        radius: float,
        sigma: float,
    ) -> None:
        self.parameters, self.student, self.options = parameters, student, options
        self.train, self.validation, self.origin = train, validation, train.x_T
        self.radius, self.sigma = radius * sigma, sigma
        self._advance: Callable[[float], bool] = lambda loss: False
        self._judged: Callable[[float, bool], None] = lambda loss, better: None
        self.rates = torch.ones(len(train), dtype=torch.float64, device=train.x_T.device)
        self.best = Found(None, parameters.values())
        self.lowest = Found(None, parameters.values())
        self.losses: list[float] = []
        self.evaluations = 0
        self._last: tuple[list[Tensor], Pairs, float, list[Tensor]] | None = None

    def run(self, advance: Callable[[float], bool], judged: Callable[[float, bool], None]) -> None:
        """Learn; `best` has the result whatever happens meanwhile.

        Args:
            advance: called after each training loss, with its value; True ends the learning.
            judged: called after each validation, with its loss and whether it is the best so far.

        Raises:
            NonFiniteError: a loss was NaN or infinite. StoppedError: `advance` said so.
        """
        self._advance, self._judged = advance, judged
        self.judge()
        iterations, searches = self.options.iterations, self.options.optimizer == "lbfgs"
        optimize = self._lbfgs if searches else self._adam
        rounds = min(self.options.rounds, iterations)
        for i in range(rounds):
            before = len(self.losses)
            try:
                optimize(iterations * (i + 1) // rounds - iterations * i // rounds)
            except StoppedError:
                self.parameters.restore(self.lowest.values)
                self.judge()
                raise
            self.judge()
            last = i == rounds - 1
            moved = self.options.soft and not last and self.move_starts()
            if searches and len(self.losses) - before <= 1 and not moved:
                break  # nothing left to gain

    def judge(self) -> None:
        """Validate the numbers as they are, and keep them if they are the best so far.

        Raises:
            NonFiniteError: the loss was NaN or infinite.
        """
        with torch.no_grad():
            plan = self.parameters.plan()
            total = self._zero()
            for _, part in self.validation.parts(self.options.batch):
                total = total + self.student.losses(part, plan).sum()
        self._count(len(self.validation), plan)
        loss = mean(total, len(self.validation))
        if not math.isfinite(loss):
            raise NonFiniteError
        better = self.best.loss is None or loss < self.best.loss
        if better:
            self.best = Found(loss, self.parameters.values())
        self._judged(loss, better)

    def evaluate(self, pairs: Pairs) -> float:
        """The mean loss over the pairs of all processes; puts its gradients into the numbers.

        Raises:
            NonFiniteError, StoppedError: as `run`.
        """
        numbers = self.parameters.numbers
        if self._last is not None:
            values, of, loss, before = self._last
            if of is pairs and all(map(torch.equal, values, numbers)):
                _assign(numbers, before)
                return loss  # the optimizer asks again where it stopped
        plan = self.parameters.plan()
        leaf, leaves = _cut(plan)
        total, sums = self._zero(), [torch.zeros_like(of) for of in leaves]
        for _, part in pairs.parts(self.options.batch):
            losses = self.student.losses(part, leaf, self.options.recompute)
            found = torch.autograd.grad(losses.sum(), leaves, allow_unused=True)
            total = total + losses.detach().sum()
            for so_far, grad in zip(sums, found, strict=True):
                if grad is not None:
                    so_far += grad
        self._count(len(pairs), plan)
        device = total.device
        vector = torch.cat([total[None], *(one.to(device).flatten() for one in sums)])
        count = summed(torch.tensor(float(len(pairs)), dtype=torch.float64, device=device))
        vector = (summed(vector) / count).cpu()
        loss = float(vector[0])
        pieces = vector[1:].split([one.numel() for one in sums])
        wanted = [plan.table, plan.model_times]
        through = [
            (tensor, piece.reshape(tensor.shape))
            for tensor, piece in zip(wanted, pieces, strict=True)
            if tensor.requires_grad
        ]
        tensors, cotangents = zip(*through, strict=True)
        grads = torch.autograd.grad(
            tensors, numbers, cotangents, allow_unused=True, materialize_grads=True
        )
        if not (math.isfinite(loss) and all(bool(grad.isfinite().all()) for grad in grads)):
            raise NonFiniteError
        self.losses.append(loss)
        if self.lowest.loss is None or loss < self.lowest.loss:
            self.lowest = Found(loss, self.parameters.values())
        self._last = (self.parameters.values(), pairs, loss, list(grads))
        _assign(numbers, grads)
        ended = torch.tensor(float(self._advance(loss)), device=device)
        if summed(ended) > 0:  # one process is enough
            raise StoppedError
        return loss

    def move_starts(self) -> bool:
        """Move each start along its gradient within its ball, where that lowers its loss; whether
        any did.
        """
        plan = _cut(self.parameters.plan())[0]
        plan = dataclasses.replace(
            plan, table=plan.table.detach(), model_times=plan.model_times.detach()
        )
        moved = self._zero()
        starts = self.train.x_T.clone()
        for rows, part in self.train.parts(self.options.batch):
            x = part.x_T.detach().requires_grad_()
            losses = self.student.losses(
                dataclasses.replace(part, x_T=x), plan, self.options.recompute
            )
            if not losses.requires_grad:
                break  # none can be moved; the other processes wait for this one below
            g = torch.autograd.grad(losses.sum(), x)[0]
            step = self.radius * self.rates[rows] / _norms(g).clamp_min(_TINY)
            tried = projected(x.detach() - _rows(step, x) * g, self.origin[rows], self.radius)
            with torch.no_grad():
                after = self.student.losses(dataclasses.replace(part, x_T=tried), plan)
            lower = after < losses.detach()
            starts[rows] = torch.where(_rows(lower, x).bool(), tried, part.x_T)
            self.rates[rows] = torch.where(lower, self.rates[rows], 0.5 * self.rates[rows])
            moved = moved + lower.sum()
        self._count(2 * len(self.train), plan)
        self.train = dataclasses.replace(self.train, x_T=starts)
        return bool(summed(moved) > 0)

    def _lbfgs(self, iterations: int) -> None:
        optimizer = torch.optim.LBFGS(
            self.parameters.numbers,
            max_iter=iterations,
            max_eval=iterations,
            tolerance_grad=_TOLERANCE,
            tolerance_change=_TOLERANCE,
            history_size=20,
            line_search_fn="strong_wolfe",
        )
        optimizer.step(lambda: self.evaluate(self.train))

    def _adam(self, iterations: int) -> None:
        options = self.options
        if not hasattr(self, "_optimizer"):
            rate = options.learning_rate or _ADAM_RATE / self.parameters.steps
            self._optimizer = torch.optim.Adam(self.parameters.numbers, rate, betas=(0.9, 0.95))
            self._schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
                self._optimizer, options.iterations
            )
            self._generator = torch.Generator().manual_seed(options.seed)
            self._order: list[int] = []
        assert options.batch is not None
        for _ in range(iterations):
            if len(self._order) < min(options.batch, len(self.train)):
                self._order = torch.randperm(len(self.train), generator=self._generator).tolist()
            chosen = torch.tensor(self._order[: options.batch], dtype=torch.int64)  # maybe none
            rows = chosen.to(self.train.x_T.device)
            self._order = self._order[options.batch :]
            self.evaluate(self.train.part(rows))
            self._optimizer.step()
            self._schedule.step()

    def _zero(self) -> Tensor:
        return torch.zeros((), dtype=torch.float64, device=self.train.x_T.device)

    def _count(self, samples: int, plan: SolverPlan) -> None:
        self.evaluations += samples * plan.evaluations


def _cut(plan: SolverPlan) -> tuple[SolverPlan, list[Tensor]]:
    """The plan on leaves of its own, so that several batches share one pass through its graph. The
    first call is at an end of the grid, so what it needs depends on nothing that is learned.
    """
    leaves = [tensor.detach().requires_grad_() for tensor in (plan.table, plan.model_times)]
    rest = {name: getattr(plan, name).detach() for name in ("initial", "initial_c_in")}
    return dataclasses.replace(plan, table=leaves[0], model_times=leaves[1], **rest), leaves


def _assign(numbers: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    for number, grad in zip(numbers, grads, strict=True):
        number.grad = grad.clone()


def _norms(x: Tensor) -> Tensor:
    return x.double().flatten(1).norm(dim=1)


def _rows(values: Tensor, x: Tensor) -> Tensor:
    return values.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def projected(x: Tensor, center: Tensor, radius: float) -> Tensor:
    """The point of the ball that is nearest, for each sample."""
    away = x - center
    return center + _rows((radius / _norms(away).clamp_min(_TINY)).clamp(max=1.0), x) * away
