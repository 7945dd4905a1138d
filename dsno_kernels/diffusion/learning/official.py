"""LD3's own schedule, for those who must reproduce it.

As in its official code: RMSprop on the logits and SGD on the offsets, batches of 2 in random order,
a validation after each of them, patience, and starts of both halves of the data that move by
gradient steps. In its first rounds the offsets rest. What is left out: until the first patience
ends it validates on 150 samples at most; here on all.

Source: LD3 (arXiv 2405.15506), its official code (trainer.py), with the settings of its scripts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from dsno_kernels.diffusion.learning.loop import Loop, NonFiniteError, StoppedError, projected
from dsno_kernels.diffusion.learning.pairs import Pairs

ROUNDS = (2, 5)  # without and with offsets
LATENT_ROUNDS = (2, 3)  # where a decoder follows
BATCH = 2
LOGITS_RATE, OFFSETS_RATE, LATENT_OFFSETS_RATE = 5e-3, 0.1, 0.001
START_RATE = 12.0  # over N
PATIENCE, DECAY, LOGITS_FLOOR, OFFSETS_FLOOR, AT_FLOOR = 5, 0.8, 5e-5, 1e-6, 5


class OfficialLoop(Loop):
    """`Loop` with LD3's schedule; its optimizers and rounds are fixed."""

    def run(self, advance: Callable[[float], bool], judged: Callable[[float, bool], None]) -> None:
        self._advance, self._judged = advance, judged
        latent = self.student.decode is not None
        before, after = LATENT_ROUNDS if latent else ROUNDS
        numbers = self.parameters.numbers
        self._logits = torch.optim.RMSprop(numbers[:1], LOGITS_RATE, momentum=0.9)
        rate = (LATENT_OFFSETS_RATE if latent else OFFSETS_RATE) / self.parameters.steps
        self._offsets = torch.optim.SGD(numbers[1:], rate) if numbers[1:] else None
        self._start_rate = START_RATE / self.parameters.steps
        self._generator = torch.Generator().manual_seed(self.options.seed)
        self._patience = self._hits = self._floors = 0
        self._origins = (self.train.x_T, self.validation.x_T)
        self.judge()
        self._kept = self._starts()
        try:
            for i in range(before + after):
                if i > 0:
                    self._reload()
                self.train = self._pass(self.train, self._origins[0], True, i >= before)
                if self.options.soft:
                    here = self.validation.x_T
                    self.validation = self._pass(self.validation, self._origins[1], False, False)
                    if self.validation.x_T.equal(here):
                        self._start_rate *= 0.5
                if self._floors >= AT_FLOOR:
                    break
        except StoppedError:
            self.judge()
            raise

    def _pass(self, pairs: Pairs, origin: Tensor, learn: bool, offsets: bool) -> Pairs:
        """Once through the data: the pairs with their starts as moved."""
        starts = pairs.x_T.clone()
        order = torch.arange(len(pairs))
        if learn:
            order = torch.randperm(len(pairs), generator=self._generator)
        for rows in order.to(starts.device).split(self.options.batch or BATCH):
            part = pairs.part(rows)
            x = part.x_T.detach().requires_grad_()
            plan = self.parameters.plan()
            here = dataclasses.replace(part, x_T=x)
            losses = self.student.losses(here, plan, self.options.recompute)
            self._count(len(part), plan)
            loss = float(losses.detach().mean())
            numbers = self.parameters.numbers
            *grads, g = torch.autograd.grad(
                losses.mean(), [*numbers, x], allow_unused=True, materialize_grads=True
            )
            if not (math.isfinite(loss) and all(bool(grad.isfinite().all()) for grad in grads)):
                raise NonFiniteError
            if learn:
                self._step(grads, offsets)
                self.losses.append(loss)
                self._validate(offsets)
            if self.options.soft:
                starts[rows] = self._moved(part, g, losses.detach(), origin[rows])
            if learn and self._advance(loss):
                raise StoppedError
            if self._floors >= AT_FLOOR:
                break
        return dataclasses.replace(pairs, x_T=starts)

    def _step(self, grads: list[Tensor], offsets: bool) -> None:
        for number, grad in zip(self.parameters.numbers, grads, strict=True):
            number.grad = grad
            torch.nn.utils.clip_grad_norm_([number], 1.0)
        self._logits.step()
        if offsets and self._offsets is not None:
            self._offsets.step()

    def _moved(self, part: Pairs, g: Tensor, losses: Tensor, origin: Tensor) -> Tensor:
        """The starts after a gradient step within their balls, where that lowers their loss; in
        units of unit noise, as the official code has them.
        """
        tried = part.x_T - self._start_rate * self.sigma**2 * g
        tried = projected(tried, origin, self.radius)
        with torch.no_grad():
            plan = self.parameters.plan()
            after = self.student.losses(dataclasses.replace(part, x_T=tried), plan)
        self._count(len(part), plan)
        lower = (after < losses).reshape(-1, *[1] * (tried.ndim - 1))
        return torch.where(lower, tried, part.x_T)

    def _validate(self, offsets: bool) -> None:
        best = self.best.loss
        self.judge()
        if self.best.loss != best:
            self._patience, self._kept = 0, self._starts()
            return
        self._patience += 1
        if self._patience < PATIENCE:
            return
        self._patience, self._hits = 0, self._hits + 1
        self._reload()
        if self._hits == 1:
            return
        self._decay(self._logits, LOGITS_FLOOR)
        if offsets and self._offsets is not None and self._decay(self._offsets, OFFSETS_FLOOR):
            self._floors += 1

    def _decay(self, optimizer: torch.optim.Optimizer, floor: float) -> bool:
        """Lower the rate; whether it is at its floor."""
        group = optimizer.param_groups[0]
        group["lr"] = max(DECAY * group["lr"], floor)
        return bool(group["lr"] == floor)

    def _starts(self) -> tuple[Tensor, Tensor]:
        return self.train.x_T, self.validation.x_T

    def _reload(self) -> None:
        self.parameters.restore(self.best.values)
        train, validation = self._kept
        self.train = dataclasses.replace(self.train, x_T=train)
        self.validation = dataclasses.replace(self.validation, x_T=validation)
