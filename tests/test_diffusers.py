"""The fused schedulers give what diffusers' give, over their configurations."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from dsno_kernels.integrations._ddim import place_of
from tests.helpers import assert_close, rel_rms

pytest.importorskip("diffusers", reason="diffusers is not installed")

from tests.scheduler_runs import (
    SCHEDULERS,
    denoise,
    original,
    ours,
    run,
    run_wide,
    start,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:__array:DeprecationWarning"),
]

# Original and ours in float64, on the same float32 sigmas: roundings, grown by alpha'/alpha where
# epsilon is derived from other predictions: up to 100 a step, for UniPC's flows 1e6 in the first.
WIDE, WIDE_FLOW = 1e-9, 1e-6
# float32 coefficients of the original, in well-conditioned configurations.
SINGLE = 1e-5

SCHEDULES: dict[str, dict[str, Any]] = {
    "linspace": {},
    "leading": {"timestep_spacing": "leading", "steps_offset": 1},
    "trailing": {"timestep_spacing": "trailing"},
    "scaled": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
    "flow": {"use_flow_sigmas": True, "flow_shift": 3.0},
    "lu": {"use_lu_lambdas": True},
}
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "DEISMultistepScheduler": [{}],
    "DPMSolverMultistepScheduler": [
        {"algorithm_type": algorithm, "solver_type": kind, "final_sigmas_type": final}
        for algorithm, final in (
            ("dpmsolver++", "zero"),
            ("dpmsolver++", "sigma_min"),
            ("dpmsolver", "sigma_min"),
            ("sde-dpmsolver++", "zero"),
            ("sde-dpmsolver", "sigma_min"),
        )
        for kind in ("midpoint", "heun")
    ],
    "UniPCMultistepScheduler": [
        {"solver_type": "bh2"},
        {"solver_type": "bh1", "final_sigmas_type": "sigma_min"},
        {"solver_type": "bh1", "final_sigmas_type": "sigma_min", "predict_x0": False},
        {"solver_type": "bh2", "final_sigmas_type": "sigma_min", "predict_x0": False},
        {"solver_type": "bh2", "disable_corrector": [0, 2]},
    ],
}
PREDICTIONS = ("epsilon", "sample", "v_prediction", "flow_prediction")


def _exists(config: dict[str, Any]) -> bool:
    """Whether the original computes this at all."""
    order, algorithm = config["solver_order"], config.get("algorithm_type", "")
    if config["prediction_type"] == "flow_prediction":
        plain = config.get("predict_x0", True) and algorithm not in ("dpmsolver", "sde-dpmsolver")
        return plain and config.get("use_flow_sigmas", False)
    return not (algorithm == "sde-dpmsolver" and order == 3)  # for which it has no branch


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_equal_to_the_original(name: str, schedule: str) -> None:
    """Every order, prediction, solver type and variant, few steps and more, defects included."""
    if schedule == "lu" and not name.startswith("DPM"):
        pytest.skip("DPM-Solver alone has these sigmas")
    compared, x = 0, start()
    for variant, order, prediction, steps in itertools.product(
        VARIANTS[name], (1, 2, 3), PREDICTIONS, (4, 17)
    ):
        config = {**SCHEDULES[schedule], **variant}
        config.update(solver_order=order, prediction_type=prediction)
        if not _exists(config) or (steps > 4 and order < 3):
            continue
        expected = run_wide(name, x, steps, **config)
        scheduler = ours(name, **config, match_diffusers=True)
        scheduler.set_timesteps(steps)
        actual = run(scheduler, x)
        if not bool(torch.isfinite(expected).all()):
            assert bool(torch.isfinite(actual).all()), (config, steps)
            continue
        compared += 1
        error = rel_rms(actual, expected)
        budget = WIDE_FLOW if schedule == "flow" else WIDE
        assert error <= budget, f"relative RMS error {error:.3g} with {config}, {steps} steps"
    assert compared >= 12


@pytest.mark.parametrize("lower_order_final", [True, False], ids=["lower", "full"])
@pytest.mark.parametrize("steps", [1, 2, 3, 14, 15, 40])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_equal_in_float32(name: str, order: int, steps: int, lower_order_final: bool) -> None:
    """As users run both: float32 samples, the original with its own coefficients."""
    config: dict[str, Any] = {"solver_order": order, "lower_order_final": lower_order_final}
    if name.startswith("UniPC"):
        config["final_sigmas_type"] = "sigma_min"  # at sigma 0 its full order is NaN
    x = start(torch.float32)
    theirs, mine = original(name, **config), ours(name, **config, match_diffusers=True)
    for scheduler in (theirs, mine):
        scheduler.set_timesteps(steps)
    assert mine.timesteps.equal(theirs.timesteps) and mine.sigmas.equal(theirs.sigmas)
    expected, actual = run(theirs, x), run(mine, x)
    assert actual.dtype == expected.dtype
    assert_close(actual, expected, SINGLE if steps < 20 else 10 * SINGLE)


@pytest.mark.parametrize("sample_max_value", [1.0, 1.5])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_thresholding(name: str, prediction: str, sample_max_value: float) -> None:
    variants = [{}]
    if name.startswith("DPM"):
        variants.append({"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"})
    for variant in variants:
        config = {"thresholding": True, "sample_max_value": sample_max_value, "solver_order": 2}
        config |= {"prediction_type": prediction, "dynamic_thresholding_ratio": 0.8, **variant}
        expected = run_wide(name, 2 * start(), 8, **config)
        scheduler = ours(name, **config, match_diffusers=True)
        scheduler.set_timesteps(8)
        assert_close(run(scheduler, 2 * start()), expected, WIDE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_low_precision_no_worse_than_the_original(name: str, dtype: torch.dtype) -> None:
    x = start(dtype)
    theirs, mine = original(name), ours(name)
    for scheduler in (theirs, mine):
        scheduler.set_timesteps(20)
    expected, actual = run(theirs, x), run(mine, x)
    assert actual.dtype == expected.dtype == dtype
    exact = run_wide(name, x, 20)
    error, their_error = rel_rms(actual, exact), rel_rms(expected, exact)
    assert error <= 1.2 * their_error + 1e-3, (error, their_error)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_mixed_dtypes(name: str) -> None:
    """The dtype of the result where sample and output differ is the original's."""
    for x_dtype, m_dtype in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        results = []
        for scheduler in (original(name), ours(name)):
            scheduler.set_timesteps(10)
            t = scheduler.timesteps[0]
            results.append(scheduler.step(start(m_dtype, 1), t, start(x_dtype)).prev_sample)
        assert results[0].dtype == results[1].dtype
        assert_close(results[1], results[0], 1e-2)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"prediction_type": "v_prediction"},
        {"prediction_type": "sample", "beta_schedule": "squaredcos_cap_v2"},  # steep first steps
        {"thresholding": True},
    ],
    ids=["epsilon", "v", "steep", "threshold"],
)
@pytest.mark.parametrize("name", [*SCHEDULERS, "DDIMScheduler"])
def test_guidance_in_the_step(name: str, config: dict[str, Any]) -> None:
    """The same as guidance before the step, by a number or one number a sample."""
    for scale in (4.0, torch.tensor([1.5, 4.0], dtype=torch.float64)):
        g = scale if isinstance(scale, float) else scale.reshape(2, 1, 1, 1)
        before, within = ours(name, **config), ours(name, **config)
        before.set_timesteps(6)
        within.set_timesteps(6)
        x = y = start()
        for t in before.timesteps:
            m, u = denoise(x, t), 0.5 * denoise(x, t / 2)
            x = before.step(u + g * (m - u), t, x).prev_sample
            y = within.step(m, t, y, unconditional=u, guidance=scale).prev_sample
            assert_close(y, x, WIDE)
    within.set_timesteps(6)
    for half in ({"unconditional": u}, {"guidance": 2.0}):
        with pytest.raises(ValueError, match="unconditional and guidance come together"):
            within.step(m, within.timesteps[0], y, **half)


def test_learned_variance() -> None:
    """The channels of a learned variance are left out."""
    x, m = start(torch.float32), torch.cat([start(torch.float32, 1), start(torch.float32, 2)], 1)
    results = []
    for scheduler in (
        original("DPMSolverMultistepScheduler", variance_type="learned_range"),
        ours("DPMSolverMultistepScheduler", variance_type="learned_range"),
    ):
        scheduler.set_timesteps(10)
        results.append(scheduler.step(m, scheduler.timesteps[0], x, return_dict=False)[0])
    assert_close(results[1], results[0], SINGLE)


def test_noise_of_the_generator() -> None:
    """The stochastic solver draws the numbers that the original draws."""
    results = []
    for make in (original, ours):
        scheduler = make("DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++")
        scheduler.set_timesteps(8)
        generator, x = torch.Generator().manual_seed(3), start(torch.float32)
        for t in scheduler.timesteps:
            x = scheduler.step(denoise(x, t), t, x, generator=generator).prev_sample
        results.append(x)
    assert_close(results[1], results[0], SINGLE)


def test_solver_p_takes_the_steps_of_the_original() -> None:
    predictor = {"solver_order": 2, "final_sigmas_type": "sigma_min"}
    results = []
    for make in (original, ours):
        solver_p = original("DPMSolverMultistepScheduler", **predictor)
        scheduler = make("UniPCMultistepScheduler", solver_p=solver_p, **predictor)
        scheduler.set_timesteps(8)
        results.append(run(scheduler, start(torch.float32)))
    assert_close(results[1], results[0], 1e-7)


# DDIM


def _ddim(scheduler: Any, x: Tensor, steps: int, **options: Any) -> tuple[Tensor, Tensor]:
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(5)
    x0 = x
    for t in scheduler.timesteps:
        noise = torch.randn(x.shape, generator=generator).to(x.dtype)
        kwargs = dict(options, variance_noise=noise) if options.get("eta") else options
        x, x0 = scheduler.step(denoise(x, t), t, x, **kwargs).to_tuple()
    return x, x0


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"clip_sample": False},
        {"clip_sample": False, "set_alpha_to_one": False, "timestep_spacing": "linspace"},
        {"clip_sample_range": 0.6, "timestep_spacing": "trailing"},
        {"thresholding": True, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.8},
        {"thresholding": True},
    ],
    ids=["default", "no-clip", "linspace", "trailing", "threshold", "static"],
)
def test_ddim(config: dict[str, Any], prediction: str) -> None:
    for steps, eta, corrected in itertools.product((3, 20), (0.0, 0.7), (False, True)):
        options = {"eta": eta, "use_clipped_model_output": corrected}
        settings = {**config, "prediction_type": prediction}
        theirs = original("DDIMScheduler", **settings)
        theirs.alphas_cumprod = theirs.alphas_cumprod.double()
        theirs.final_alpha_cumprod = theirs.final_alpha_cumprod.double()
        expected = _ddim(theirs, start(), steps, **options)
        mine = ours("DDIMScheduler", **settings, match_diffusers=True)
        actual = _ddim(mine, start(), steps, **options)
        for a, e in zip(actual, expected, strict=True):
            assert_close(a, e, WIDE)


def test_ddim_zero_terminal_snr() -> None:
    config = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": False}
    settings = {**config, "prediction_type": "v_prediction"}
    expected, _ = _ddim(original("DDIMScheduler", **settings), start(torch.float32), 10)
    actual, _ = _ddim(ours("DDIMScheduler", **settings), start(torch.float32), 10)
    assert_close(actual, expected, SINGLE)
    with pytest.raises(ValueError, match="epsilon says nothing about x0 where alpha is 0"):
        ours("DDIMScheduler", **config).set_timesteps(10)


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_ddim_zero_terminal_snr_of_epsilon(eta: float) -> None:
    """diffusers divides by an alpha of 0, and is finite as it clips what comes of it."""
    settings = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    x = start(torch.float32)
    expected = _ddim(original("DDIMScheduler", **settings), x, 4, eta=eta)
    actual = _ddim(ours("DDIMScheduler", **settings, match_diffusers=True), x, 4, eta=eta)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, SINGLE)
    # where matching is not asked for, or nothing finite is there to be matched
    for other in ({}, {"clip_sample": False}, {"thresholding": True, "sample_max_value": 1.5}):
        scheduler = ours("DDIMScheduler", **settings, **other, match_diffusers=bool(other))
        with pytest.raises(ValueError, match="match_diffusers=True, clip_sample=True and no"):
            scheduler.set_timesteps(4)


def test_place_of_a_timestep() -> None:
    """Where timesteps are on a device, the index comes from the address."""
    timesteps = torch.arange(90, 0, -10)
    assert [place_of(t, timesteps) for t in timesteps[3:]] == [3, 4, 5, 6, 7, 8]
    for stranger in (timesteps[2].clone(), timesteps[2].float(), timesteps[2:4]):
        assert place_of(stranger, timesteps) is None


def test_ddim_at_a_timestep_outside_its_schedule() -> None:
    results = []
    for make in (original, ours):
        scheduler = make("DDIMScheduler")
        scheduler.set_timesteps(10)
        results.append(scheduler.step(start(seed=1), 555, start(), return_dict=False)[0])
    assert_close(results[1], results[0], SINGLE)
