r"""DDIM: the rows of its steps, by the timestep.

.. math:: x' = \alpha' x_0 + \sqrt{\sigma'^2 - s^2}\, \epsilon + s\, noise, \qquad
    s = \eta \frac{\sigma'}{\sigma} \sqrt{1 - \alpha^2/\alpha'^2}

with x_0 clipped or thresholded, epsilon as the model says (or derived from that x_0). Both are
affine in the sample x and the model's output m, and m is given as an entry of history, so that the
step is one row of `solver_step`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dsno_kernels.functional import solver_step, step_checks
from dsno_kernels.integrations._configured import Configured, check_steps, guided

PREDICTIONS = ("epsilon", "sample", "v_prediction")


def ddim_row(
    signal: float, signal_next: float, prediction: str, eta: float, corrected: bool
) -> tuple[float, ...]:
    """A row of `solver_step` with the history (x_0, m), from the cumulative products of alpha.

    Args:
        corrected: epsilon is derived from the clipped x_0.
    """
    alpha, sigma = math.sqrt(signal), math.sqrt(1.0 - signal)
    if prediction == "epsilon":
        if alpha == 0.0:
            raise ValueError(
                "epsilon says nothing about x0 where alpha is 0 (rescale_betas_zero_snr at the last"
                " timestep): use v_prediction or sample; or, as diffusers, the clipped sign of"
                " sample - epsilon, with match_diffusers=True, clip_sample=True and no thresholding"
            )
        A, B, E, F = 1.0 / alpha, -sigma / alpha, 0.0, 1.0
    elif prediction == "sample":
        A, B, E, F = 0.0, 1.0, 1.0 / sigma, -alpha / sigma
    else:
        A, B, E, F = alpha, -sigma, sigma, alpha
    variance = (1.0 - signal_next) / (1.0 - signal) * (1.0 - signal / signal_next)
    s = eta * math.sqrt(max(variance, 0.0))
    along = math.sqrt(max(1.0 - signal_next - s * s, 0.0))
    c_x0 = math.sqrt(signal_next)
    if corrected:
        E, F, c_x0 = 1.0 / sigma, 0.0, c_x0 - along * alpha / sigma
    return A, B, along * E, c_x0, along * F, s, 1.0, 0.0, 0.0, 1.0


def guided_row(row: tuple[float, ...], guidance: float) -> tuple[float, ...]:
    """The row with the history (x_0, c, u), where m = u + g (c - u)."""
    A, B, a, c_x0, c_m, s, *_ = row
    entries = (c_x0, guidance * c_m, (1.0 - guidance) * c_m)
    return A, B, a, *entries, s, 1.0, 0.0, 0.0, 0.0, 1.0


def place_of(element: Tensor, whole: Tensor) -> int | None:
    """Which element of a dense tensor this view is, without reading it; None if it is none."""
    if element.dtype != whole.dtype or element.device != whole.device or element.numel() != 1:
        return None
    place, rest = divmod(element.data_ptr() - whole.data_ptr(), whole.element_size())
    return place if rest == 0 and 0 <= place < whole.numel() else None


class DDIM(Configured):
    """The steps of diffusers' DDIM scheduler."""

    # of diffusers
    timesteps: Tensor
    alphas_cumprod: Tensor
    final_alpha_cumprod: Tensor
    num_inference_steps: int | None

    def _prepare(self) -> None:
        self._rows: dict[tuple[float, bool], dict[int, tuple[float, ...]]] = {}
        self._own, self._times = self.timesteps, [0]
        self._limits: tuple[float, float, str] | None = None
        self._clip: tuple[float, float] | None = None

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        """Set the schedule of the next run, and its coefficients.

        Args:
            num_inference_steps: N steps, spaced as the configuration says.
            device: of `timesteps`.
        """
        super().set_timesteps(check_steps(num_inference_steps), device)  # type: ignore[misc]
        config = self.config
        if config.prediction_type not in PREDICTIONS:
            raise ValueError(
                f"prediction_type must be one of {', '.join(PREDICTIONS)}, got"
                f" {config.prediction_type!r}"
            )
        self._own, self._times = self.timesteps, self.timesteps.tolist()
        self._limits, self._clip = self._threshold(), None
        if self._limits is not None and self._limits[1:] == (1.0, "diffusers"):
            self._limits, self._clip = None, (-1.0, 1.0)
        elif self._limits is None and config.clip_sample:
            self._clip = (-config.clip_sample_range, config.clip_sample_range)
        self._rows = {}
        self._made(0.0, False)

    def _made(self, eta: float, corrected: bool) -> dict[int, tuple[float, ...]]:
        """The rows of the schedule by timestep, made once for each way of stepping."""
        key = (eta, corrected)
        if key not in self._rows:
            signals = self.alphas_cumprod.tolist()
            self._rows[key] = {t: self._row_at(t, signals, *key) for t in self._times}
        return self._rows[key]

    def _row_at(
        self, t: int, signals: list[float], eta: float, corrected: bool
    ) -> tuple[float, ...]:
        """The row of a timestep; none where diffusers clips an infinite x0, and that is wanted."""
        assert self.num_inference_steps is not None
        before = t - self.config.num_train_timesteps // self.num_inference_steps
        final = float(self.final_alpha_cumprod)
        signal_next = signals[before] if before >= 0 else final
        config = self.config
        clips = config.match_diffusers and config.clip_sample and not config.thresholding
        if clips and config.prediction_type == "epsilon" and signals[t] == 0:
            return ()
        return ddim_row(signals[t], signal_next, config.prediction_type, eta, corrected)

    def _number(self, timestep: int | Tensor) -> int:
        """The timestep as an int, without waiting for the device where it is one of `timesteps`."""
        if not isinstance(timestep, Tensor):
            return int(timestep)
        place = place_of(timestep, self._own) if timestep.is_cuda else None
        return int(timestep) if place is None else self._times[place]

    def _row(
        self, timestep: int | Tensor, eta: float, corrected: bool
    ) -> tuple[int, tuple[float, ...]]:
        """The timestep as a number, and its row."""
        if self.num_inference_steps is None:
            raise ValueError("call set_timesteps before step: there is no schedule yet")
        if not step_checks.is_number(eta):
            raise TypeError(f"eta must be a number, got {eta!r}")
        t, made = self._number(timestep), self._made(float(eta), bool(corrected))
        if t not in made:  # a timestep outside the schedule
            signals = self.alphas_cumprod.tolist()
            if not 0 <= t < len(signals):
                raise ValueError(f"timestep must be from 0 to {len(signals) - 1}, got {t}")
            made[t] = self._row_at(t, signals, float(eta), bool(corrected))
        return t, made[t]

    def _moved(
        self,
        row: tuple[float, ...],
        output: Tensor,
        sample: Tensor,
        unconditional: Tensor | None,
        guidance: float | Tensor | None,
        noise: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        history: tuple[Tensor, ...] = (output,)
        if isinstance(guidance, Tensor):
            output = guided(output, unconditional, guidance)
            unconditional = guidance = None
            history = (output,)
        elif unconditional is not None and guidance is not None:
            scale = step_checks.numbers("guidance", [guidance])[0]
            row, history = guided_row(row, scale), (output, unconditional)
        if output.dtype != sample.dtype:
            sample = sample.to(torch.promote_types(output.dtype, sample.dtype))
        moved, _, x0, _ = solver_step(
            sample,
            output,
            row,
            history,
            unconditional=unconditional,
            guidance=guidance,
            noise=noise,
            clip=self._clip,
            threshold=self._limits,
        )
        assert x0 is not None
        return moved, x0
