"""Drop-in schedulers for diffusers: the same configuration and calls, one fused kernel a step.

Each class is the scheduler of diffusers whose name it carries, and is configured, saved, loaded
and called as that one; `from_config` takes the configuration of either. The coefficients of all
steps are made once, by `set_timesteps`, in float64; a step reads one row of them and makes one
call. Steps are differentiable in the sample and in the model's output.

The numbers are those of diffusers where it is right. Where it is not, these are right, and
``match_diffusers=True`` (an entry of the configuration) does as diffusers does:

=============================================  =====================================================
diffusers                                      here
=============================================  =====================================================
DEIS with Karras, exponential, beta or flow    the last step goes to sigma = 0
sigmas: the last step does nothing
DPM-Solver and UniPC with such sigmas and      sigmas for one step more, so that the last step moves
final_sigmas_type="sigma_min": likewise        to the smallest
thresholding with sample_max_value=1: a clamp  the threshold of Imagen: the quantile, at least 1
to [-1, 1]
DPM-Solver of order 3: half the weight of the  the exact weight, which converges with order 3
second difference, so order 2; the wrong sign
in sde-dpmsolver++, no such sde-dpmsolver
DEIS of a solver_order above 3: order 3        that order, up to 8
UniPC with bh1, or on epsilon, to sigma = 0:   finite, in either way
NaN
DDIM on epsilon where alpha is 0 (zero         a ValueError: epsilon says nothing about x0 there
terminal SNR): x0 is the clipped sign of
sample - epsilon
first timesteps that coincide after rounding:  the first timestep is step 0, in either way
the run starts a step late, and fails
=============================================  =====================================================

On coarse grids the halved weight can be the more accurate one (DPM-Solver of order 3).

Either way there is no cancellation at many steps (float32 coefficients of diffusers' DEIS are off
by 16 % at 250), a sigma of 0 gives no NaN, and `timesteps` or `sigmas` of one's own are taken by
all three multistep schedulers.

The history keeps the model's outputs themselves where no conversion is needed: a model that
overwrites its last output (CUDA graphs) must return a copy.

Example:
    >>> from dsno_kernels.integrations.diffusers import FusedDEISMultistepScheduler
    >>> pipeline.scheduler = FusedDEISMultistepScheduler.from_config(pipeline.scheduler.config)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dsno_kernels.functional import checks
from dsno_kernels.functional.step_checks import MAX_HISTORY
from dsno_kernels.integrations._configured import check_guidance, check_inputs, guided
from dsno_kernels.integrations._ddim import DDIM
from dsno_kernels.integrations._learned import Grid
from dsno_kernels.integrations._multistep import Multistep
from dsno_kernels.integrations._tables import Solver

try:
    from diffusers import (
        DDIMScheduler,
        DEISMultistepScheduler,
        DPMSolverMultistepScheduler,
        UniPCMultistepScheduler,
    )
    from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput

    # diffusers looks for SchedulerMixin in this module where it loads a pipeline with our scheduler
    from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput  # noqa: F401
    from diffusers.utils.torch_utils import randn_tensor
except ImportError as error:
    raise ImportError(
        "dsno_kernels.integrations.diffusers needs diffusers: pip install dsno-kernels[diffusers]"
    ) from error

__all__ = [
    "FusedDDIMScheduler",
    "FusedDEISMultistepScheduler",
    "FusedDPMSolverMultistepScheduler",
    "FusedUniPCMultistepScheduler",
]

_PREDICTIONS = ("epsilon", "sample", "v_prediction", "flow_prediction")

Device = str | torch.device | None


class FusedDEISMultistepScheduler(Multistep, DEISMultistepScheduler):  # type: ignore[misc]
    """`diffusers.DEISMultistepScheduler` with one fused call a step; the module says what differs.

    Source: DEIS (arXiv 2204.13902), interpolated in log(rho).
    """

    _promotes = True

    def _solver(self) -> Solver:
        order = self._order(MAX_HISTORY)
        return Solver(
            family="deis",
            history="eps",
            prediction=self._prediction(*_PREDICTIONS),
            thresholded=self._limits is not None,
            flow=self.config.use_flow_sigmas,
            order=min(order, 3) if self.config.match_diffusers else order,
            end=self._end(),
        )

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Device = None,
        mu: float | None = None,
        sigmas: Sequence[float] | None = None,
        timesteps: Sequence[int] | None = None,
        grid: Grid | None = None,
    ) -> None:
        """Set the schedule of the next run, and its coefficients.

        Args:
            num_inference_steps: N steps, spaced as the configuration says. Or
            sigmas: N decreasing sigmas, as diffusers counts them: noise over signal, or with
                use_flow_sigmas the share of noise before the time shift; 0 is added at the end. Or
            timesteps: N decreasing training timesteps. Or
            grid: a :class:`dk.diffusion.LearnedGrid` or its file, learned for this solver and for
                the `DiscreteVP` of `alphas_cumprod`, or for `FlowMatching` with use_flow_sigmas.
                The model is then called at the learned times, between its training timesteps.
            device: of `timesteps`.
            mu: of the time shift, with use_dynamic_shifting.

        Raises:
            ValueError: none or several of these, a schedule that does not decrease (names the
            index), or a grid that was learned for another solver or process.
        """
        self._schedule(num_inference_steps, device, sigmas, timesteps, mu, grid)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        return_dict: bool = True,
        *,
        unconditional: Tensor | None = None,
        guidance: float | Tensor | None = None,
    ) -> Any:
        """The sample at the next timestep, as the original returns it.

        With the unconditional output u and a scale g, both optional and not of the original,
        classifier-free guidance u + g (model_output - u) is done in the same pass.
        """
        moved = self._moved(timestep, model_output, sample, unconditional, guidance)
        return SchedulerOutput(prev_sample=moved) if return_dict else (moved,)


class FusedDPMSolverMultistepScheduler(Multistep, DPMSolverMultistepScheduler):  # type: ignore[misc]
    """`diffusers.DPMSolverMultistepScheduler` with one fused call a step; the module says what
    differs.

    Source: DPM-Solver (arXiv 2206.00927), DPM-Solver++ (arXiv 2211.01095).
    """

    def _solver(self) -> Solver:
        config = self.config
        plus, sde = (config.algorithm_type.endswith("++"), config.algorithm_type.startswith("sde"))
        third = "exact"
        if config.match_diffusers:
            third = "diffusers_sde" if plus and sde else "shipped"
        end = self._end()
        if end == "full" and (config.euler_at_final or config.final_sigmas_type == "zero"):
            end = "euler_at_final"
        return Solver(
            family="dpm",
            history="x0" if plus else "eps",
            prediction=self._prediction(*_PREDICTIONS[: 4 if plus else 3]),
            thresholded=self._limits is not None,
            flow=config.use_flow_sigmas,
            order=self._order(MAX_HISTORY),
            end=end,
            second=config.solver_type,
            third=third,
            sde=sde,
        )

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Device = None,
        mu: float | None = None,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        grid: Grid | None = None,
    ) -> None:
        """As that of :class:`FusedDEISMultistepScheduler`; own sigmas end as final_sigmas_type
        says.
        """
        self._schedule(num_inference_steps, device, sigmas, timesteps, mu, grid)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Any = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
        *,
        unconditional: Tensor | None = None,
        guidance: float | Tensor | None = None,
    ) -> Any:
        """The sample at the next timestep, as the original returns it; unconditional and guidance
        as in :class:`FusedDEISMultistepScheduler`.
        """
        config = self.config
        learned = config.variance_type in ("learned", "learned_range")
        if learned and config.prediction_type == "epsilon":
            model_output = model_output[:, :3]
            unconditional = None if unconditional is None else unconditional[:, :3]

        def noise() -> Tensor:
            if variance_noise is None:
                return randn_tensor(
                    model_output.shape,
                    generator=generator,
                    device=model_output.device,
                    dtype=torch.float32,
                )
            checks.real("variance_noise", variance_noise)
            given = variance_noise.to(model_output.device, torch.float32)
            check_inputs(sample, model_output, unconditional, given)
            return given

        moved = self._moved(timestep, model_output, sample, unconditional, guidance, noise)
        entry = self.model_outputs[-1]
        assert entry is not None
        if moved.dtype is not entry.dtype:
            moved = moved.to(entry.dtype)
        return SchedulerOutput(prev_sample=moved) if return_dict else (moved,)


class FusedUniPCMultistepScheduler(Multistep, UniPCMultistepScheduler):  # type: ignore[misc]
    """`diffusers.UniPCMultistepScheduler` with corrector and predictor in one fused call a step;
    the module says what differs. With `solver_p` the steps are the original's.

    Source: UniPC (arXiv 2302.04867).
    """

    def _prepare(self) -> None:
        super()._prepare()
        self.disable_corrector: list[int] = list(self.config.disable_corrector)  # not shared

    def _threshold(self) -> tuple[float, float, str] | None:
        return super()._threshold() if self.predict_x0 else None

    def _end(self) -> str:
        return "lower_order_final" if self.config.lower_order_final else "full"

    def _solver(self) -> Solver:
        config = self.config
        return Solver(
            family="unipc",
            history="x0" if self.predict_x0 else "eps",
            prediction=self._prediction(*_PREDICTIONS[: 4 if self.predict_x0 else 3]),
            thresholded=self._limits is not None,
            flow=config.use_flow_sigmas,
            order=self._order(MAX_HISTORY - 1),
            end=self._end(),
            second=config.solver_type,
            uncorrected=frozenset(step + 1 for step in self.disable_corrector),
        )

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Device = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        timesteps: Sequence[int] | None = None,
        grid: Grid | None = None,
    ) -> None:
        """As that of :class:`FusedDEISMultistepScheduler`; own sigmas end as final_sigmas_type
        says.
        """
        if self.config.use_dynamic_shifting and mu is None:
            raise ValueError("use_dynamic_shifting needs mu")
        self._schedule(num_inference_steps, device, sigmas, timesteps, mu, grid)

    def _shifted(self, sigmas: Any, keywords: dict[str, Any]) -> Any:
        if self.config.use_dynamic_shifting:
            return self.time_shift(keywords["mu"], 1.0, sigmas)
        return super()._shifted(sigmas, {})

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        return_dict: bool = True,
        *,
        unconditional: Tensor | None = None,
        guidance: float | Tensor | None = None,
    ) -> Any:
        """The sample at the next timestep, as the original returns it; unconditional and guidance
        as in :class:`FusedDEISMultistepScheduler`.
        """
        if self.solver_p is not None:
            check_inputs(sample, model_output, unconditional)
            model_output = guided(model_output, unconditional, guidance)
            return super().step(model_output, timestep, sample, return_dict)
        moved = self._moved(timestep, model_output, sample, unconditional, guidance)
        return SchedulerOutput(prev_sample=moved) if return_dict else (moved,)


class FusedDDIMScheduler(DDIM, DDIMScheduler):  # type: ignore[misc]
    """`diffusers.DDIMScheduler` with one fused call a step; the module says what differs.

    Source: DDIM (arXiv 2010.02502), equations 12 and 16.
    """

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Any = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
        *,
        unconditional: Tensor | None = None,
        guidance: float | Tensor | None = None,
    ) -> Any:
        """The sample at the next timestep and the predicted x0, as the original returns them;
        unconditional and guidance as in :class:`FusedDEISMultistepScheduler`.
        """
        check_inputs(sample, model_output, unconditional, variance_noise)
        check_guidance(unconditional, guidance)
        t, row = self._row(timestep, eta, use_clipped_model_output)
        if not row:
            return super().step(
                guided(model_output, unconditional, guidance),
                t,
                sample,
                eta,
                use_clipped_model_output,
                generator,
                variance_noise,
                return_dict,
            )
        noise = None
        if eta > 0:
            if variance_noise is not None and generator is not None:
                raise ValueError("give generator or variance_noise, not both")
            noise = variance_noise
            if noise is None:
                noise = randn_tensor(
                    model_output.shape,
                    generator=generator,
                    device=model_output.device,
                    dtype=model_output.dtype,
                )
        moved, x0 = self._moved(row, model_output, sample, unconditional, guidance, noise)
        if not return_dict:
            return moved, x0
        return DDIMSchedulerOutput(prev_sample=moved, pred_original_sample=x0)
