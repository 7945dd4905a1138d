"""`sample`: from noise to data, or back, along a plan."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dsno_kernels.diffusion._calls import Calls
from dsno_kernels.diffusion._device_rows import DeviceRows, padded
from dsno_kernels.diffusion._frames import Frames, frame_rows
from dsno_kernels.diffusion._rows import Rows, Setting
from dsno_kernels.diffusion.plan import SolverPlan
from dsno_kernels.functional import checks

Callback = Callable[[int, Tensor, Tensor, Tensor], object]


def sample(
    denoiser: Callable[..., Tensor],
    x_T: Tensor,
    plan: SolverPlan,
    *,
    kwargs: Mapping[str, Any] | None = None,
    unconditional: Mapping[str, Any] | None = None,
    guidance: float | Tensor | None = None,
    split_guidance: bool = False,
    frames: Sequence[int] | Sequence[float] | Tensor | None = None,
    history: Sequence[Tensor] = (),
    generator: torch.Generator | None = None,
    noise: Callable[[int], Tensor] | None = None,
    clip: tuple[float, float] | None = None,
    threshold: tuple[float, float, str] | None = None,
    callback: Callback | None = None,
    progress: bool = False,
    check_finite: bool = True,
    model_dtype: torch.dtype | None = None,
    recompute: bool = False,
    compile: bool = False,
    cuda_graph: bool = False,
    backend: str | None = None,
) -> Tensor:
    r"""Integrate from ``grid[0]`` of a plan to ``grid[-1]``; each row of its table is one call of
    the denoiser and one fused pass (:func:`solver_step`).

    The state is float32 (float64 where x_T is float64), so that a model in bfloat16 costs no
    accuracy of the solver. Differentiable in x_T, in what the denoiser uses, in the guidance scale
    and in the grid of the plan; run it under ``torch.no_grad()`` where no gradient is wanted.

    Args:
        denoiser: ``denoiser(x, t, **kwargs)`` gives what the plan calls its `prediction`, in the
            shape of x. x is the state times c_in, in `model_dtype`; it must not be changed in
            place. t is the row's model time, a tensor without axes, float64 for a float64 state
            and else float32, on the device of x; ``t.expand(len(x))`` where a model wants one for
            each sample.
        x_T: the state at ``grid[0]``, real, of any shape and strides; it is not changed.
        plan: from `SolverPlan.build`; ``plan.reversed()`` goes from data to noise.
        kwargs: of the denoiser, such as class labels.
        unconditional: keyword arguments of the unconditional call of classifier-free guidance;
            comes with guidance. The denoiser is called once on ``torch.cat([x, x])``, conditional
            half first; tensors of B rows are concatenated, other arguments must be the same.
        guidance: the scale g of ``u + g (c - u)``: a number, a tensor without axes, or ``[B]``.
        split_guidance: call the denoiser twice instead.
        frames: what to return in place of the last state: states at these times of the grid, or,
            given as integers, at these positions in it. Position 0 is x_T itself.
        history: entries before the first row, newest first, as many as the plan's `start` has.
        generator: draws two numbers for each row that adds noise (EDM's churn, SDE solvers,
            ``eta``), from which the kernel makes it; the same generator state gives the same
            sample. By default PyTorch's own on the CPU.
        noise: gives the noise of row i instead, and for i = -1 that before the first row.
        clip: (lowest, highest) of x0, for plans with x0 history.
        threshold: (ratio, max_value, definition) of :func:`dynamic_threshold` for x0, likewise.
        callback: ``callback(i, t, x, h)`` after row i: time, state and history entry (x0, eps or
            flow, as `plan.history` says). If it returns True sampling stops with that state.
        progress: show a bar (needs tqdm).
        check_finite: look, once at the end, whether the denoiser returned NaN or infinity. This
            waits for the device; under ``torch.func.vmap`` nothing is looked at.
        model_dtype: of the model's input; that of x_T by default.
        recompute: keep at most 8 states for the backward pass, however many rows there are, and
            call the denoiser again there: three calls a row up to 64 rows, of which two are in the
            backward pass; two up to 8. Its insides are kept for one row at a time. A `noise` of
            your own must give the same tensors again.
        compile: compile model and step with ``torch.compile(fullgraph=True)``: one graph for all
            rows, kept for later calls with the same denoiser and shapes, at other guidance scales
            and numbers of steps too (64 more need another). A process keeps
            ``torch._dynamo.config.recompile_limit`` of them, and forgets them all for one more.
            Records no gradients; where they are wanted, or the model is no single graph, compile
            the model alone.
        cuda_graph: capture model and step as one CUDA graph, and replay it for each row. Each call
            captures anew, which runs the model four times; :class:`CapturedSampler` keeps the
            graph. Records no gradients; what the denoiser does must be capturable.
        backend: as in :func:`exp_step`.

    Returns:
        The state at ``grid[-1]``, in the shape, dtype and on the device of x_T. With frames
        ``(B, T, *x_T.shape[1:])``, in their order. Where no graph is recorded they are one buffer
        with time outermost in memory, into which the steps write and from which the next ones
        read: a frame costs nothing (one copy where x_T is no float32 or float64, or with compile or
        cuda_graph, whose state stays where it is). After a callback has stopped, the frames that
        were reached.

    Raises:
        TypeError, ValueError: arguments that do not fit; what the denoiser returns has another
        shape, device or dtype, or is not finite (names the row). ImportError: tqdm is missing.

    Equivalent to: ``plan.replay(denoiser, x_T)``.

    Example:
        >>> process = dk.diffusion.VPLinear()
        >>> plan = dk.diffusion.SolverPlan.build(process, dk.diffusion.time_grid(process, 10))
        >>> model = lambda x, t: x * process.sigma(t).float()  # of data N(0, 1)
        >>> dk.diffusion.sample(model, torch.randn(2, 3, 8, 8), plan).shape
        torch.Size([2, 3, 8, 8])
    """
    _check_mode(recompute, compile, cuda_graph, callback is not None or progress)
    for name, function in (("noise", noise), ("callback", callback)):
        if function is not None and not callable(function):
            raise TypeError(f"{name} must be callable, got {type(function).__name__}")
    setting = setting_of(
        denoiser,
        x_T,
        plan,
        kwargs=kwargs,
        unconditional=unconditional,
        guidance=guidance,
        split_guidance=split_guidance,
        clip=clip,
        threshold=threshold,
        model_dtype=model_dtype,
        backend=backend,
        noise=noise,
        generator=generator,
        keep_entry=callback is not None,
    )
    check_history(plan, history)
    kept = None if frames is None else Frames(x_T, frame_rows(plan, frames))
    rows: Rows | DeviceRows
    if compile or cuda_graph:
        rows = DeviceRows(setting, x_T, check_finite)
        run = rows.captured() if cuda_graph else rows.compiled()
        rows.begin(x_T, history)
        states = rows.states(run)
    else:
        rows = Rows(setting, check_finite)
        first = rows.begin(x_T, history)
        if recompute:
            states = rows.states_recomputed(first, () if kept is None else kept.rows)
        elif kept is not None and x_T.dtype == setting.dtype:
            states = rows.states(first, kept.slot)
        else:
            states = rows.states(first)
    base = last_state(plan, states, kept, callback, progress)
    if check_finite:
        all_finite(plan, rows.finite())
    return base.to(x_T.dtype) if kept is None else kept.result()


def last_state(
    plan: SolverPlan,
    states: Iterator[tuple[int, Tensor, Tensor | None]],
    kept: Frames | None,
    callback: Callback | None,
    progress: bool,
) -> Tensor:
    """Run all rows, and report them."""
    with progress_bar(plan.evaluations, progress) as advance:
        for i, base, entry in states:
            if kept is not None:
                kept.add(i, base)
            advance()
            if callback is not None:
                assert entry is not None
                if callback(i, plan.times[i], base, entry) is True:
                    break
    return base


def setting_of(
    denoiser: Callable[..., Tensor],
    x_T: Tensor,
    plan: SolverPlan,
    *,
    kwargs: Mapping[str, Any] | None,
    unconditional: Mapping[str, Any] | None,
    guidance: float | Tensor | None,
    split_guidance: bool,
    clip: tuple[float, float] | None,
    threshold: tuple[float, float, str] | None,
    model_dtype: torch.dtype | None,
    backend: str | None,
    noise: Callable[[int], Tensor] | None = None,
    generator: torch.Generator | None = None,
    keep_entry: bool = False,
) -> Setting:
    """The arguments of `sample`, checked."""
    _check(denoiser, x_T, plan, clip, threshold, model_dtype)
    for name, given in (("kwargs", kwargs), ("unconditional", unconditional)):
        if given is not None and not isinstance(given, Mapping):
            raise TypeError(
                f"{name} must be a mapping from names to arguments of the denoiser, got"
                f" {type(given).__name__}"
            )
    if (unconditional is None) != (guidance is None):
        raise ValueError("unconditional and guidance come together: give both or neither")
    batch = x_T.shape[0] if x_T.ndim else None
    return Setting(
        plan=plan,
        calls=Calls(denoiser, dict(kwargs or {}), unconditional, split_guidance, batch),
        dtype=torch.float64 if x_T.dtype == torch.float64 else torch.float32,
        model_dtype=model_dtype or x_T.dtype,
        device=x_T.device,
        noise=noise,
        seeds=seeds_of(plan, generator, x_T.device) if noise is None else None,
        keep_entry=keep_entry,
        options={"guidance": guidance, "clip": clip, "threshold": threshold, "backend": backend},
    )


def _check(
    denoiser: object,
    x_T: Tensor,
    plan: object,
    clip: object,
    threshold: object,
    model_dtype: torch.dtype | None,
) -> None:
    if not callable(denoiser):
        raise TypeError(f"denoiser must be callable, got {type(denoiser).__name__}")
    checks.real("x_T", x_T)
    if not isinstance(plan, SolverPlan):
        raise TypeError(f"plan must be a SolverPlan, got {type(plan).__name__}")
    if model_dtype is not None and model_dtype not in checks.REAL_DTYPES:
        raise TypeError(
            f"model_dtype must be one of {checks.names(checks.REAL_DTYPES)}, got {model_dtype}"
        )
    if plan.history != "x0" and (clip is not None or threshold is not None):
        raise ValueError(
            f"clip and threshold act on x0, but the plan combines {plan.history}: build it with"
            " history='x0' and a solver that has it"
        )


def check_history(plan: SolverPlan, history: Sequence[Tensor]) -> None:
    if not isinstance(history, (Sequence, Tensor)):
        raise TypeError(
            f"history must be a sequence of tensors, newest first, got {type(history).__name__};"
            " give () for none"
        )
    if len(history) != len(plan._seeds):
        raise ValueError(
            f"the plan starts from {len(plan._seeds)} history entries, got {len(history)}"
        )


def _check_mode(recompute: bool, compile: bool, cuda_graph: bool, reports: bool) -> None:
    if recompute + compile + cuda_graph > 1:
        raise ValueError("recompute, compile and cuda_graph exclude each other: give one")
    if recompute and reports:
        raise ValueError("recompute=True runs rows again: it takes no callback and no progress")
    if (compile or cuda_graph) and torch.is_grad_enabled():
        raise ValueError(
            "compile=True and cuda_graph=True record no gradients: call sample under"
            " torch.no_grad(), or compile the model alone"
        )


def seeds_of(
    plan: SolverPlan, generator: torch.Generator | None, device: torch.device
) -> Tensor | None:
    if not plan.stochastic():
        return None
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator must be a torch.Generator or None, got {generator!r}: for example"
            " torch.Generator().manual_seed(0)"
        )
    source = "cpu" if generator is None else generator.device
    shape = (plan.evaluations + 1, 2)
    return padded(torch.randint(2**63 - 1, shape, generator=generator, device=source)).to(device)


def all_finite(plan: SolverPlan, finite: Tensor) -> None:
    if not _readable(finite):
        return
    for i, fine in enumerate(finite.tolist()):
        if not fine:
            raise ValueError(
                f"the denoiser returned NaN or infinity at row {i} of the plan, t ="
                f" {float(plan.model_times[i].detach()):.6g}"
            )


def _readable(values: Tensor) -> bool:
    """Whether there are numbers: not on the meta device, and not under `torch.func.vmap`."""
    while torch._C._functorch.is_functorch_wrapped_tensor(values):
        if torch._C._functorch.is_batchedtensor(values):
            return False
        values = torch._C._functorch.get_unwrapped(values)
    return not values.is_meta


@contextlib.contextmanager
def progress_bar(rows: int, show: bool) -> Iterator[Callable[[], object]]:
    """What is called after each row; it moves a bar where one is shown."""
    if not show:
        yield lambda: None
        return
    try:
        from tqdm.auto import tqdm
    except ImportError:
        raise ImportError("progress=True needs tqdm: pip install tqdm") from None
    with tqdm(total=rows) as bar:
        yield bar.update
