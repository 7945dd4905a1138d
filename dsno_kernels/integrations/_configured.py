"""What all fused schedulers share: checks, guidance, one more entry of the configuration."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from dsno_kernels.diffusion.processes import integer
from dsno_kernels.functional import checks, exp_step, step_checks


def check_guidance(unconditional: Tensor | None, guidance: float | Tensor | None) -> None:
    if (unconditional is None) != (guidance is None):
        raise ValueError("unconditional and guidance come together: give both or neither")
    if not (guidance is None or isinstance(guidance, Tensor) or step_checks.is_number(guidance)):
        raise TypeError(f"guidance must be a number or a tensor, got {guidance!r}")


def check_inputs(
    sample: Tensor, output: Tensor, unconditional: Tensor | None, noise: Tensor | None = None
) -> None:
    """Refuse tensors that do not fit the sample, by the names that they have in `step`."""
    checks.real("sample", sample)
    names = ("unconditional", "variance_noise", "model_output")
    given = (unconditional, noise, output)
    step_checks.all_like(names, given, sample, optional=2, of="sample")


def check_steps(steps: object) -> int:
    """The number of steps of a schedule."""
    number = integer("num_inference_steps", steps)
    if number < 1:
        raise ValueError(f"num_inference_steps must be at least 1, got {steps}")
    return number


def guided(output: Tensor, unconditional: Tensor | None, guidance: float | Tensor | None) -> Tensor:
    """Classifier-free guidance u + g (c - u), in one pass; c without it."""
    check_guidance(unconditional, guidance)
    if unconditional is None or guidance is None:
        return output
    if isinstance(guidance, Tensor):
        rows = torch.stack([guidance, 1.0 - guidance], -1)
        return exp_step(output, (unconditional,), rows)
    return exp_step(output, (unconditional,), (guidance, 1.0 - guidance))


class Configured:
    """Adds `match_diffusers` to the configuration of a scheduler of diffusers."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        original = super().__init__
        if "__init__" in vars(cls) or original is object.__init__:
            return

        def __init__(self: Any, *args: Any, match_diffusers: bool = False, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            self.register_to_config(match_diffusers=bool(match_diffusers))
            self._prepare()

        # diffusers reads the entries of a configuration from the signature
        signature = inspect.signature(original)
        keyword = inspect.Parameter.KEYWORD_ONLY
        added = inspect.Parameter("match_diffusers", keyword, default=False, annotation=bool)
        __init__.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[*signature.parameters.values(), added]
        )
        cls.__init__ = __init__  # type: ignore[method-assign]

    def _prepare(self) -> None:
        """Set the attributes that this library adds."""

    config: Any

    def _threshold(self) -> tuple[float, float, str] | None:
        """The arguments of `dynamic_threshold` that the configuration asks for.

        diffusers clamps the quantile to [1, sample_max_value]; with the default of 1 that leaves
        nothing of it, and the threshold of the paper (arXiv 2205.11487) is taken: at least 1.
        """
        config = self.config
        if not config.thresholding:
            return None
        if config.sample_max_value < 1:
            raise ValueError(
                f"sample_max_value must be at least 1 with thresholding, got"
                f" {config.sample_max_value}"
            )
        ratio, highest = config.dynamic_thresholding_ratio, float(config.sample_max_value)
        if config.match_diffusers or highest > 1:
            return ratio, highest, "diffusers"
        return ratio, 1.0, "dpm_solver"
