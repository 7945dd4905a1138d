"""What the multistep schedulers share: tables made once, one fused call a step, any schedule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsno_kernels.diffusion.grids import stacked
from dsno_kernels.diffusion.processes import integer
from dsno_kernels.functional import dynamic_threshold, exp_step, solver_step
from dsno_kernels.integrations._configured import (
    Configured,
    check_guidance,
    check_inputs,
    check_steps,
    guided,
)
from dsno_kernels.integrations._learned import Grid, learned, learned_schedule
from dsno_kernels.integrations._tables import Row, Solver, rows

_BY_CONFIGURATION = (
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "use_lu_lambdas",
)
# A flow's sigma of 1, pure noise, is taken as this far below, as diffusers' UniPC does.
_BELOW_ONE = 1e-6


class Multistep(Configured):
    """The steps of a multistep scheduler of diffusers, by rows of a table."""

    _promotes = False  # whether samples take the wider dtype of sample and output

    # of diffusers
    sigmas: Tensor
    timesteps: Tensor
    alphas_cumprod: Tensor
    model_outputs: list[Tensor | None]
    num_inference_steps: int | None
    lower_order_nums: int
    last_sample: Tensor | None
    _step_index: int | None
    _begin_index: int | None

    def _prepare(self) -> None:
        self._rows: tuple[Row, ...] = ()
        self._calls: tuple[float, ...] = ()
        self._first, self._of, self._version = 0, self.sigmas, -1
        self._limits: tuple[float, float, str] | None = None

    def _solver(self) -> Solver:
        raise NotImplementedError

    def _build(self, first: int) -> None:
        """The table of a run that begins at step `first`."""
        self._limits = self._threshold()
        if self.sigmas.is_inference():  # whose changes are not counted
            with torch.inference_mode(False):
                self.sigmas = self.sigmas.clone()
        self._first, self._of, self._version = first, self.sigmas, self.sigmas._version
        self._rows = rows(self._solver(), tuple(self.sigmas.tolist()), first, self._calls)

    def _end(self) -> str:
        few = len(self.timesteps) < 15
        return "lower_order_final" if self.config.lower_order_final and few else "full"

    def _order(self, highest: int) -> int:
        """`solver_order`, within what a row of a table holds."""
        order = integer("solver_order", self.config.solver_order)
        if not 1 <= order <= highest:
            raise ValueError(
                f"solver_order must be from 1 to {highest} for {type(self).__name__}, got {order}"
            )
        return order

    def _prediction(self, *known: str) -> str:
        given: str = self.config.prediction_type
        if given not in known:
            raise ValueError(
                f"prediction_type must be one of {', '.join(known)} for {type(self).__name__} with"
                f" this configuration, got {given!r}"
            )
        return given

    def index_for_timestep(
        self, timestep: int | Tensor, schedule_timesteps: Tensor | None = None
    ) -> int:
        """The step of a timestep, as the original finds it, except that the first timestep is that
        of step 0. The original takes the second match, for a run that begins in the middle, and so
        starts late where the first timesteps coincide after rounding.
        """
        times = self.timesteps if schedule_timesteps is None else schedule_timesteps
        if len(times) and bool(times[0] == timestep):
            return 0
        return super().index_for_timestep(timestep, times)  # type: ignore[misc]

    def _init_step_index(self, timestep: int | Tensor) -> None:
        super()._init_step_index(timestep)  # type: ignore[misc]
        assert self._step_index is not None
        if self._step_index != self._first:
            self._build(self._step_index)

    def _schedule(
        self,
        num_inference_steps: int | None,
        device: str | torch.device | None,
        sigmas: Sequence[float] | None,
        timesteps: Sequence[int] | None,
        mu: float | None,
        grid: Grid | None,
    ) -> None:
        """`set_timesteps`: the schedule of diffusers, one's own or a learned one, then the
        table.
        """
        config = self.config
        self.num_inference_steps = None  # until all is done: no step with half a schedule
        self._calls = ()
        shift = getattr(config, "flow_shift", None)
        keywords: dict[str, Any] = {} if mu is None else {"mu": mu}
        try:
            if grid is not None:
                if not (num_inference_steps is None and sigmas is None and timesteps is None):
                    raise ValueError(
                        "give num_inference_steps, timesteps or sigmas, or a grid: one of them"
                    )
                self._learned_schedule(grid, device, keywords)
            elif sigmas is not None or timesteps is not None:
                self._own_schedule(num_inference_steps, device, sigmas, timesteps, keywords)
            elif num_inference_steps is None:
                raise ValueError("give num_inference_steps, timesteps or sigmas, or a grid")
            else:
                self._usual_schedule(check_steps(num_inference_steps), device, keywords)
        finally:
            if shift is not None:
                config.flow_shift = shift  # diffusers leaves that of mu for the next call
        steps, self.num_inference_steps = self.num_inference_steps, None
        self._build(0)
        self.num_inference_steps = steps

    def _usual_schedule(
        self, steps: int, device: str | torch.device | None, keywords: dict[str, Any]
    ) -> None:
        config = self.config
        chosen = any(getattr(config, name, False) for name in _BY_CONFIGURATION)
        final = getattr(config, "final_sigmas_type", None)
        original = super().set_timesteps  # type: ignore[misc]
        if config.match_diffusers:
            original(steps, device, **keywords)
        elif chosen and final == "sigma_min":
            # diffusers' last two sigmas are then equal: here the last of one more step
            original(steps + 1, device, **keywords)
            self.timesteps, self.sigmas = self.timesteps[:-1], self.sigmas[: steps + 1]
            self.num_inference_steps = steps
        else:
            original(steps, device, **keywords)
            if final is None and (chosen or config.use_flow_sigmas):
                self.sigmas[-1] = 0.0  # DEIS: equal to the one before, as above
            elif config.use_flow_sigmas and self.sigmas[-1] >= self.sigmas[-2]:
                smallest = self._shifted(np.array([1.0 / config.num_train_timesteps]), keywords)
                self.sigmas[-1] = float(smallest[0])

    def _no_schedule_by_configuration(self, excludes: str) -> None:
        for name in _BY_CONFIGURATION:
            if getattr(self.config, name, False):
                raise ValueError(f"{excludes} {name}=True in the configuration")

    def _learned_schedule(
        self, grid: Grid, device: str | torch.device | None, keywords: dict[str, Any]
    ) -> None:
        self._no_schedule_by_configuration("a learned grid excludes")
        known = learned(grid)
        super().set_timesteps(known.steps, device, **keywords)  # type: ignore[misc]
        self.num_inference_steps = None
        self._limits = self._threshold()
        made = learned_schedule(
            known, self._solver(), self.config, self.alphas_cumprod, keywords.get("mu")
        )
        highest = 1.0 - _BELOW_ONE if self.config.use_flow_sigmas else torch.inf
        self.sigmas = made.sigmas.clamp(max=highest).float()
        self._calls = tuple(made.model_sigmas.clamp(max=highest).tolist())
        self.timesteps = made.timesteps.to(device=device, dtype=torch.float32)
        self.num_inference_steps = known.steps

    def _own_schedule(
        self,
        steps: int | None,
        device: str | torch.device | None,
        sigmas: Sequence[float] | None,
        timesteps: Sequence[int] | None,
        keywords: dict[str, Any],
    ) -> None:
        config = self.config
        if sigmas is not None and timesteps is not None:
            raise ValueError("give timesteps or sigmas, not both")
        self._no_schedule_by_configuration("timesteps and sigmas exclude")
        if timesteps is not None:
            last = config.num_train_timesteps - (0 if config.use_flow_sigmas else 1)
            given = _numbers("timesteps", timesteps)
            if not ((given == given.round()) & (given >= 0) & (given <= last)).all():
                raise ValueError(
                    f"timesteps must be integers from 0 to {last}, got {given.tolist()}: give"
                    " sigmas where they lie between"
                )
        else:
            assert sigmas is not None
            given = _numbers("sigmas", sigmas)
        ends_clean = sigmas is not None and len(given) > 1 and given[-1] == 0
        if ends_clean:
            given = given[:-1]
        if steps is not None and (timesteps is not None or steps != len(given)):
            raise ValueError("give num_inference_steps, timesteps or sigmas: only one of them")
        if timesteps is not None:
            _decreasing("timesteps", given)
        elif not (given > 0).all() or (config.use_flow_sigmas and (given > 1).any()):
            raise ValueError(
                "sigmas must be positive, with use_flow_sigmas at most 1 (a last one may be 0), got"
                f" {given.tolist()}"
            )
        trained = np.array(((1 - self.alphas_cumprod) / self.alphas_cumprod) ** 0.5, np.float64)
        if config.use_flow_sigmas:
            if timesteps is not None:
                own, times = given / config.num_train_timesteps, given
            else:
                own = self._shifted(given, keywords)
                times = own * config.num_train_timesteps
            own = np.minimum(own, 1.0 - _BELOW_ONE)
        elif timesteps is not None:
            own, times = np.interp(given, np.arange(len(trained)), trained), given
        else:
            logs = np.log(trained)
            own = given
            times = np.array([self._sigma_to_t(sigma, logs) for sigma in own]).round()  # type: ignore[attr-defined]
        final = getattr(config, "final_sigmas_type", "zero" if sigmas is not None else "sigma_min")
        smallest = 1.0 / config.num_train_timesteps if config.use_flow_sigmas else trained[0]
        match = config.match_diffusers
        to_smallest = final == "sigma_min" and not ends_clean and (match or own[-1] > smallest)
        own = np.append(own, smallest if to_smallest else 0.0)
        _decreasing("sigmas", own[:-1] if match else own)
        super().set_timesteps(len(given), device, **keywords)  # type: ignore[misc]
        self.sigmas = torch.from_numpy(own.astype(np.float32))
        self.timesteps = torch.from_numpy(times).to(device=device, dtype=torch.int64)
        self.num_inference_steps = len(given)

    def _shifted(self, sigmas: Any, keywords: dict[str, Any]) -> Any:
        """The time shift of flow models, by mu where it is given."""
        mu = keywords.get("mu")
        shift = self.config.flow_shift if mu is None else np.exp(mu)
        return shift * sigmas / (1 + (shift - 1) * sigmas)

    def _row(self, timestep: int | Tensor) -> Row:
        if self.num_inference_steps is None:
            raise ValueError("call set_timesteps before step: there is no schedule yet")
        if self._step_index is None:
            self._init_step_index(timestep)
        if self.sigmas is not self._of or self.sigmas._version != self._version:
            self._build(self._first)  # changed by hand
        assert self._step_index is not None
        i = self._step_index - self._first
        if not 0 <= i < len(self._rows):
            raise ValueError(
                f"step {self._step_index} of a schedule of {len(self.timesteps)} steps from"
                f" {self._first}: call set_timesteps before the next run"
            )
        return self._rows[i]

    def _moved(
        self,
        timestep: int | Tensor,
        output: Tensor,
        sample: Tensor,
        unconditional: Tensor | None,
        guidance: float | Tensor | None,
        noise: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        """The sample after the step at a timestep; `noise` makes that of a step that adds some."""
        before = self._step_index
        try:
            row, drawn = self._row(timestep), None
            if row.noisy or output.dtype is not sample.dtype:
                check_inputs(sample, output, unconditional)
                if row.noisy and noise is not None:
                    drawn = noise()
                if self._promotes:
                    sample = sample.to(torch.promote_types(output.dtype, sample.dtype))
            return self._advanced(row, output, sample, unconditional, guidance, drawn)
        except Exception as error:
            failure = error
        # The fused call has checked the arguments by its own names for them: where they are wrong,
        # they are called here what `step` calls them.
        self._step_index = before
        check_inputs(sample, output, unconditional)
        for earlier in self.model_outputs:
            if earlier is not None and earlier.shape != sample.shape:
                raise ValueError(
                    f"sample has shape {tuple(sample.shape)}, but those of the steps before had"
                    f" {tuple(earlier.shape)}: call set_timesteps before a new run"
                )
        raise failure

    def _advanced(
        self,
        row: Row,
        output: Tensor,
        sample: Tensor,
        unconditional: Tensor | None,
        guidance: float | Tensor | None,
        noise: Tensor | None,
    ) -> Tensor:
        """The sample after the row; its history and its place in the schedule move on."""
        if self._limits is not None or row.folded:
            output = guided(output, unconditional, guidance)
            unconditional = guidance = None
        check_guidance(unconditional, guidance)
        if self._limits is not None:
            output = self._thresholded(output, sample, row)
        outputs = self.model_outputs
        history: list[Any] = outputs[: -row.reads - 1 : -1] if row.reads else []
        for earlier in history:
            if earlier is None:
                raise ValueError(
                    f"step {self._step_index} needs {row.reads} earlier outputs, which are not"
                    " there: call set_timesteps before a new run"
                )
        entry: Tensor | None = output
        if row.direct and unconditional is None:
            moved = exp_step(sample, (output, *history), row.direct, noise=noise)
            if row.folded:
                entry = exp_step(sample, (output,), row.entry)
            self.last_sample = sample
        else:
            base, moved, entry, _ = solver_step(
                sample,
                output,
                row.fused,
                history,
                base=self.last_sample if row.corrects else None,
                unconditional=unconditional,
                guidance=guidance,
                noise=noise,
                looks_ahead=row.looks_ahead,
            )
            self.last_sample = base if row.corrects else sample
        outputs.append(entry)
        del outputs[0]
        self.lower_order_nums = min(self.lower_order_nums + 1, len(outputs))
        assert self._step_index is not None
        self._step_index += 1
        return moved

    def _thresholded(self, output: Tensor, sample: Tensor, row: Row) -> Tensor:
        """x0 after dynamic thresholding."""
        assert self._limits is not None
        x0 = output if row.to_x0 == (0.0, 1.0) else exp_step(sample, (output,), row.to_x0)
        ratio, highest, definition = self._limits
        if (highest, definition) == (1.0, "diffusers"):
            return x0.clamp(-1.0, 1.0)  # what is left of the quantile
        return dynamic_threshold(x0, ratio, highest, definition)


def _decreasing(name: str, values: Any) -> None:
    for i in range(len(values) - 1):
        if not values[i] > values[i + 1]:
            raise ValueError(
                f"{name} must decrease strictly: {name}[{i}] is {values[i]:.6g}, {name}[{i + 1}]"
                f" is {values[i + 1]:.6g}"
            )


def _numbers(name: str, values: Sequence[float]) -> Any:
    """Finite numbers, as an array."""
    given = stacked(name, values)
    if given.requires_grad:
        raise ValueError(
            f"{name} must not require gradients, which a scheduler has none for: detach them, or"
            " take dsno_kernels.diffusion.SolverPlan, whose table is differentiable in its grid"
        )
    if given.ndim != 1 or len(given) == 0 or not bool(torch.isfinite(given).all()):
        raise ValueError(f"{name} must be a list of finite numbers, got {given.tolist()}")
    return given.numpy()
