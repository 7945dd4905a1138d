"""`CapturedSampler`: `sample` on a CUDA graph that is captured once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dsno_kernels.diffusion._device_rows import DeviceRows
from dsno_kernels.diffusion._frames import Frames, frame_rows
from dsno_kernels.diffusion.plan import SolverPlan
from dsno_kernels.diffusion.sample import (
    all_finite,
    check_history,
    last_state,
    seeds_of,
    setting_of,
)


class CapturedSampler:
    """`sample` without gradients for one plan and shape: model and step are one CUDA graph,
    captured here and replayed for each row of each call.

    The graph reads parameters and tensors among the arguments where they lie: what is updated in
    place is seen, what is replaced is not.

    Args:
        denoiser, plan, kwargs, unconditional, guidance, split_guidance, clip, threshold,
            model_dtype, backend: as in :func:`sample`; what the denoiser does must be capturable.
        x_T: an example: its shape, dtype and device are those of every call.

    Raises:
        TypeError, ValueError: as :func:`sample`; x_T is not on a CUDA device.

    Equivalent to: ``sample(denoiser, x_T, plan, ...)`` under ``torch.no_grad()``.

    Example:
        >>> sampler = dk.diffusion.CapturedSampler(model.cuda().eval(), noise, plan)
        >>> images = sampler(torch.randn_like(noise))
    """

    @torch.no_grad()
    def __init__(
        self,
        denoiser: Callable[..., Tensor],
        x_T: Tensor,
        plan: SolverPlan,
        *,
        kwargs: Mapping[str, Any] | None = None,
        unconditional: Mapping[str, Any] | None = None,
        guidance: float | Tensor | None = None,
        split_guidance: bool = False,
        clip: tuple[float, float] | None = None,
        threshold: tuple[float, float, str] | None = None,
        model_dtype: torch.dtype | None = None,
        backend: str | None = None,
    ) -> None:
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
        )
        self.plan, self._like = plan, torch.empty_like(x_T, device="meta")
        self._rows = DeviceRows(setting, x_T, check_finite=True)
        self._run = self._rows.captured()

    @torch.no_grad()
    def __call__(
        self,
        x_T: Tensor,
        *,
        frames: Sequence[int] | Sequence[float] | Tensor | None = None,
        history: Sequence[Tensor] = (),
        generator: torch.Generator | None = None,
        progress: bool = False,
        check_finite: bool = True,
    ) -> Tensor:
        """The sample or the frames; the arguments are those of :func:`sample`."""
        rows, like = self._rows, self._like
        if not isinstance(x_T, Tensor) or x_T.dtype != like.dtype:
            given = x_T.dtype if isinstance(x_T, Tensor) else type(x_T).__name__
            raise TypeError(f"x_T was captured as {like.dtype}, got {given}")
        if x_T.shape != like.shape or x_T.device != rows.base.device:
            raise ValueError(
                f"x_T was captured with shape {tuple(like.shape)} on {rows.base.device}, got"
                f" {tuple(x_T.shape)} on {x_T.device}; capture a sampler for that"
            )
        check_history(self.plan, history)
        kept = None if frames is None else Frames(x_T, frame_rows(self.plan, frames))
        if rows.seeds is not None:
            seeds = seeds_of(self.plan, generator, x_T.device)
            assert seeds is not None
            rows.seeds.copy_(seeds)
        rows.begin(x_T, history)
        base = last_state(self.plan, rows.states(self._run), kept, None, progress)
        if check_finite:
            all_finite(self.plan, rows.finite())
        return base.to(x_T.dtype, copy=True) if kept is None else kept.result()
