r"""`learn_time_grid`: the times at which few steps of a solver do what a teacher does with many.

With :math:`\Psi_\xi` the student, its times :math:`\xi` to be learned, and :math:`\Psi_*` the
teacher, both from the same start,

.. math:: \min_\xi\; E_{x_T}\; \min_{|x_T' - x_T| \le r \sigma_T}
    d(\Psi_\xi(x_T'),\; \Psi_*(x_T)), \qquad r = 0.001\, \dim / \mathrm{NFE}^2

All steps are differentiable in their coefficients, and those in the times, so the gradient is
exact, for every solver.

Source: LD3 (arXiv 2405.15506).
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsno_kernels.diffusion.grids import check_times, time_grid
from dsno_kernels.diffusion.learned_grid import LearnedGrid
from dsno_kernels.diffusion.learning import distances
from dsno_kernels.diffusion.learning.loop import Found, Loop, NonFiniteError, StoppedError
from dsno_kernels.diffusion.learning.official import OfficialLoop
from dsno_kernels.diffusion.learning.options import LearningOptions
from dsno_kernels.diffusion.learning.pairs import Pairs, Student, first_process, processes
from dsno_kernels.diffusion.learning.parameters import TimeParameters, finite_log_snr
from dsno_kernels.diffusion.plan import SolverPlan
from dsno_kernels.diffusion.process_files import check_process
from dsno_kernels.diffusion.processes import integer, outside_inference_mode
from dsno_kernels.diffusion.sample import progress_bar
from dsno_kernels.functional import checks

Denoiser = Callable[..., Tensor]
# Of the soft objective's ball: r = _BALL d / NFE^2.
_BALL = 0.001
_TEACHER_STEPS = 20


@outside_inference_mode
def learn_time_grid(
    denoiser: Denoiser,
    process: Any,
    steps: int,
    x_T: Tensor,
    targets: Tensor | SolverPlan | None = None,
    *,
    solver: str = "dpmpp_3m",
    order: int | None = None,
    history: str | None = None,
    end: str = "lower_order_final",
    prediction: str = "x0",
    grid: Tensor | None = None,
    kwargs: Mapping[str, Any] | None = None,
    unconditional: Mapping[str, Any] | None = None,
    guidance: float | Tensor | None = None,
    split_guidance: bool = False,
    loss: str | distances.Loss = "l2",
    decode: Callable[[Tensor], Tensor] | None = None,
    options: LearningOptions | None = None,
    out: str | Path | None = None,
    callback: Callable[[int, float], object] | None = None,
    progress: bool = False,
) -> LearnedGrid:
    r"""Learn the times of a solver's steps, and of its calls of the model, from a teacher.

    Args:
        denoiser: as in :func:`sample`; differentiable in x and t. Its weights are not touched.
        process: the noising process.
        steps: N, at least 2.
        x_T: states at the first time, as :func:`sample` takes them, ``(B, ...)``; a hundred
            are enough for a trained network (LD3, section 5). The exact denoiser of a data set
            needs thousands and optimizer "adam": a grid would learn the jumps of a few by heart.
            In a process group every process gets all of them, and works on its share.
        targets: what the teacher makes of them, ``(B, ...)``, after `decode` where there is one; or
            the teacher's plan of the same process, first time and prediction, without noise, which
            then makes them; by default that of UniPC-3 with 20 steps between the same ends.
        solver, order, history, end, prediction: as in :meth:`SolverPlan.build`; no solver with
            noise.
        grid: the N + 1 times to begin with, whose ends stay; by default equal steps in log-SNR from
            `process.t_max` to `process.t_min`, or in t where the log-SNR is infinite there.
        kwargs, unconditional, guidance, split_guidance: as in :func:`sample`.
        loss: "l2" or "l1", means over a sample; "lpips"; or a function of samples and targets that
            gives one number a sample, ``(B,)``.
        decode: of samples, before they are compared; differentiable.
        options: what is seldom changed.
        out: a file, in a folder that exists, that always holds the best grid so far, also when
            learning is interrupted; before there is one that was learned, it is left as it was.
        callback: ``callback(i, loss)`` after the i-th training loss; if it returns True learning
            ends there.
        progress: show a bar (needs tqdm).

    Returns:
        The best grid, by its loss on the share of the data that is not trained on. A loss that
        becomes NaN or infinite ends learning with a warning.

    Raises:
        TypeError, ValueError: arguments that do not fit; fewer than 2 steps; a solver with noise; a
        denoiser that is not differentiable in x or in t (says which); a loss that is not finite
        from the beginning. KeyboardInterrupt: after `out` was written, as said there.

    Example:
        >>> process = dk.diffusion.EDM()
        >>> model = dk.diffusion.for_process(dk.diffusion.ExactDenoiser(images), process)
        >>> x_T = 80.0 * torch.randn(100, 1, 8, 8)
        >>> grid = dk.diffusion.learn_time_grid(model, process, 5, x_T, out="grid.json")
        >>> samples = dk.diffusion.sample(model, 80.0 * torch.randn(16, 1, 8, 8), grid.plan())

    Source: LD3 (arXiv 2405.15506).
    """
    check_process(process)
    options = LearningOptions() if options is None else options
    if not isinstance(options, LearningOptions):
        raise TypeError(f"options must be LearningOptions, got {type(options).__name__}")
    _check_kinds("callable", Callable, decode=decode, callback=callback)
    _check_kinds("a mapping from names", Mapping, kwargs=kwargs, unconditional=unconditional)
    _check_kinds("a path", (str, Path), out=out)
    if not callable(denoiser):
        raise TypeError(f"denoiser must be callable, got {type(denoiser).__name__}")
    if out is not None and (Path(out).is_dir() or not Path(out).parent.is_dir()):
        raise ValueError(f"out must be a file in a folder that exists, got {str(out)!r}")
    if integer("steps", steps) < 2:
        raise ValueError(f"steps must be at least 2, got {steps}: the ends of a grid are fixed")
    checks.real("x_T", x_T)
    if x_T.ndim < 2 or len(x_T) == 0:
        raise ValueError(f"x_T must have shape (B, ...), B >= 1, got {tuple(x_T.shape)}")

    def build(times: Tensor, calls: Tensor | None) -> SolverPlan:
        return SolverPlan.build(
            process,
            times,
            solver,
            order=order,
            history=history,
            end=end,
            denoiser_times=calls,
            prediction=prediction,
        )

    times = _first_grid(process, steps, grid, options.mode)
    plan = build(times, None)
    if plan.stochastic():
        raise ValueError(f"solver {plan.solver!r} adds noise: learn the grid of one without")
    model = _outside_inference(denoiser) if options.partial else denoiser
    student = Student(model, split_guidance, decode, distances.found(loss))
    wanted = targets if isinstance(targets, Tensor) else x_T
    _check_pairs(x_T, wanted, decode)
    pairs = Pairs(_recordable(x_T), _recordable(wanted), kwargs, unconditional, guidance)
    if options.match_official and processes() > 1:
        raise ValueError("match_official learns in one process, as the official code does")
    still = not _differentiable_in_time(model, plan, pairs, options.partial)
    train, validation = (part.share() for part in _divided(pairs, options.validation))
    if not isinstance(targets, Tensor):
        teacher = _teacher(process, times, prediction) if targets is None else targets
        _check_teacher(teacher, process, float(times[0]), prediction)
        train, validation = (
            student.taught(part, teacher, options.batch) for part in (train, validation)
        )
    parameters = TimeParameters(
        process,
        times,
        build,
        mode=options.mode,
        decoupled=options.decoupled,
        still=still,
        coefficients=options.coefficients,
        official=options.match_official,
    )
    radius = options.radius or _BALL * x_T[0].numel() / plan.evaluations**2
    kind = OfficialLoop if options.match_official else Loop
    sigma = float(process.sigma(times[0]))
    loop = kind(parameters, student, train, validation, options, radius, sigma)
    about = {
        "mode": parameters.mode,
        "loss": loss if isinstance(loss, str) else getattr(loss, "__name__", repr(loss)),
        "samples": len(x_T),
        "guidance": guidance if isinstance(guidance, (int, float)) else None,
        "options": dataclasses.asdict(options),
    }
    results = _Results(loop, about, out)
    with progress_bar(options.iterations, progress and first_process()) as advance:
        return results.learned(advance, callback)


class _Results:
    """Grids of a loop, and the file that holds the best one."""

    def __init__(self, loop: Loop, about: dict[str, Any], out: str | Path | None) -> None:
        self.loop, self.about, self.out = loop, about, out
        self.initial: float | None = None

    def learned(
        self, advance: Callable[[], object], callback: Callable[[int, float], object] | None
    ) -> LearnedGrid:
        """Run the loop, and return the best grid."""
        loop, more = self.loop, {}

        def reported(loss: float) -> bool:
            advance()
            return callback is not None and callback(len(loop.losses) - 1, loss) is True

        try:
            with torch.enable_grad():
                loop.run(reported, self._judged)
        except NonFiniteError:
            if self.initial is None:
                raise ValueError(
                    "the loss of the first grid is not finite: look at the denoiser and the targets"
                ) from None
            more["stopped"] = f"the loss was not finite after {len(loop.losses)} evaluations"
            warnings.warn(f"{more['stopped']}; the best grid before it is kept", stacklevel=4)
        except StoppedError:
            more["stopped"] = f"by the callback after {len(loop.losses)} evaluations"
        except KeyboardInterrupt:
            # What was not validated yet is better than nothing.
            if loop.best.loss != self.initial:
                self._save(loop.best, stopped="interrupted")
            elif loop.lowest.loss is not None:
                self._save(Found(None, loop.lowest.values), stopped="interrupted")
            raise
        best = self.grid(loop.best, **more)
        self._save(loop.best, **more)
        return best

    def grid(self, found: Found, **more: Any) -> LearnedGrid:
        """What these numbers make."""
        parameters = self.loop.parameters
        with torch.no_grad(), parameters.at(found.values):
            plan = parameters.plan()
            added = parameters.corrections()
        return LearnedGrid.of_plan(
            plan,
            corrections=None if added is None else added.tolist(),
            loss=found.loss,
            baselines={} if self.initial is None else {"initial": self.initial},
            losses=tuple(self.loop.losses),
            provenance={**self.about, "evaluations": self.loop.evaluations, **more},
        )

    def _judged(self, loss: float, better: bool) -> None:
        if self.initial is None:
            self.initial = loss
        elif better:
            self._save(self.loop.best)

    def _save(self, found: Found, **more: Any) -> None:
        if self.out is not None and first_process():
            self.grid(found, **more).save(self.out)


def _check_kinds(wanted: str, kind: Any, **given: object) -> None:
    """Raise TypeError for what is given and is not of this kind."""
    for name, value in given.items():
        if value is not None and not isinstance(value, kind):
            raise TypeError(f"{name} must be {wanted}, got {type(value).__name__}")


def _first_grid(process: Any, steps: int, grid: Tensor | None, mode: str) -> Tensor:
    if grid is not None:
        times = check_times(process, grid).detach()
        if len(times) != steps + 1:
            raise ValueError(f"grid must hold {steps + 1} times, got {len(times)}")
        return times
    ends = torch.tensor([process.t_max, process.t_min], dtype=torch.float64)
    counts = mode != "time" and finite_log_snr(process, ends)
    return time_grid(process, steps, "log_snr" if counts else "uniform")


def _teacher(process: Any, times: Tensor, prediction: str) -> SolverPlan:
    """LD3's: UniPC of order 3 with 20 steps, those of EDM where that is possible."""
    kind = "karras" if finite_log_snr(process, times[[0, -1]]) else "uniform"
    first, last = float(times[0]), float(times[-1])
    grid = time_grid(process, _TEACHER_STEPS, kind, t_start=first, t_end=last)
    return SolverPlan.build(
        process, grid, "unipc3_bh1", end="lower_order_final", prediction=prediction
    )


def _check_teacher(teacher: object, process: Any, first: float, prediction: str) -> None:
    if not isinstance(teacher, SolverPlan):
        raise TypeError(
            f"targets must be a tensor or the SolverPlan of a teacher, got {type(teacher).__name__}"
        )
    own, other = (
        torch.cat([one.alpha(teacher.grid), one.sigma(teacher.grid)])
        for one in (process, teacher.process)
    )
    if not torch.allclose(own, other, 1e-6, 1e-12):
        raise ValueError(f"the teacher's plan is of {teacher.process!r}, not of {process!r}")
    if not math.isclose(float(teacher.grid[0]), first, rel_tol=1e-6):
        raise ValueError(
            f"the teacher's plan starts at t = {float(teacher.grid[0])}, the states x_T are those"
            f" of t = {first}"
        )
    if teacher.prediction != prediction:
        raise ValueError(
            f"the teacher's plan takes the denoiser's output as {teacher.prediction!r}, the student"
            f" as {prediction!r}: give both the same prediction"
        )
    if teacher.stochastic():
        raise ValueError(
            f"the teacher's plan, of solver {teacher.solver!r}, adds noise: its samples are no"
            " function of x_T; take one without"
        )


def _recordable(x: Tensor) -> Tensor:
    """x without its graph; autograd refuses what was made in inference mode."""
    return x.clone() if x.is_inference() else x.detach()


def _outside_inference(denoiser: Denoiser) -> Denoiser:
    """The denoiser, whose outputs a step may keep for its backward pass; autograd refuses those of
    inference mode.
    """

    def output(*args: Any, **kwargs: Any) -> Tensor:
        found = denoiser(*args, **kwargs)
        return found.clone() if isinstance(found, Tensor) and found.is_inference() else found

    return output


def _check_pairs(x_T: Tensor, wanted: Tensor, decode: object) -> None:
    checks.real("targets", wanted)
    if len(wanted) != len(x_T) or (decode is None and wanted.shape != x_T.shape):
        raise ValueError(
            f"x_T and targets must be pairs, got shapes {tuple(x_T.shape)} and"
            f" {tuple(wanted.shape)}"
        )
    if wanted.device != x_T.device:
        raise ValueError(f"targets must be on the device of x_T, {x_T.device}: {wanted.device}")


def _divided(pairs: Pairs, validation: float) -> tuple[Pairs, Pairs]:
    """What is trained on, and what judges: the last ones, at least one, or the same."""
    if not validation:
        return pairs, pairs
    if len(pairs) < 2:
        raise ValueError(
            f"{len(pairs)} sample cannot both teach and judge: give at least 2, or validation=0"
        )
    count = min(max(round(validation * len(pairs)), 1), len(pairs) - 1)
    return pairs.part(slice(len(pairs) - count)), pairs.part(slice(len(pairs) - count, None))


def _differentiable_in_time(
    denoiser: Denoiser, plan: SolverPlan, pairs: Pairs, partial: bool
) -> bool:
    """Whether a gradient reaches t through the denoiser, which is called once, on one sample.

    Raises:
        ValueError: none reaches x or t, and not `partial`.
    """
    one = pairs.part(slice(1))
    with torch.enable_grad():
        x = one.x_T.clone().requires_grad_()
        t = plan.model_times[0].to(x.device, torch.promote_types(x.dtype, torch.float32))
        t = t.detach().requires_grad_()
        output = denoiser(x, t, **(one.kwargs or {}))
        reached: tuple[Tensor | None, ...] = (None, None)
        if isinstance(output, Tensor) and output.requires_grad:
            reached = torch.autograd.grad(output.sum(), (x, t), allow_unused=True)
    missing = [name for name, grad in zip("xt", reached, strict=True) if grad is None]
    if missing and not partial:
        raise ValueError(
            f"the denoiser is not differentiable in {' and '.join(missing)}: no gradient comes back"
            " from its output; give LearningOptions(partial=True) to learn what can be learned"
        )
    return "t" not in missing
