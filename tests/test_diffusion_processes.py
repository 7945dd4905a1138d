"""Processes: values against 50-digit arithmetic, inverses, gradients, and refusals."""

from __future__ import annotations

from collections.abc import Callable

import mpmath as mp
import numpy as np
import pytest
import torch
from torch import Tensor

from dsno_kernels.diffusion import EDM, VE, DiscreteVP, FlowMatching, Process, VPCosine, VPLinear

# A few roundings of float64, over functions that lose no digits to cancellation.
ROUNDING = 1e-14
DDPM = DiscreteVP.linear()


def _cosine(t: mp.mpf) -> tuple[mp.mpf, mp.mpf]:
    s = mp.mpf(0.008)
    alpha = mp.cos((t + s) / (1 + s) * mp.pi / 2) / mp.cos(s / (1 + s) * mp.pi / 2)
    return alpha, mp.sqrt(1 - alpha**2)


def _linear(t: mp.mpf) -> tuple[mp.mpf, mp.mpf]:
    y = mp.mpf(0.1) * t + (mp.mpf(20.0) - mp.mpf(0.1)) * t**2 / 2
    return mp.exp(-y / 2), mp.sqrt(1 - mp.exp(-y))


def _flow(t: mp.mpf) -> tuple[mp.mpf, mp.mpf]:
    sigma = 3 * t / (1 + 2 * t)
    return 1 - sigma, sigma


def _discrete(t: mp.mpf) -> tuple[mp.mpf, mp.mpf]:
    power = [mp.mpf(float(a)) for a in DDPM.alphas_cumprod]
    if t < 0:
        sigma = mp.sqrt(1 - power[0]) * (t + 1)
        return mp.sqrt(1 - sigma**2), sigma
    low = min(int(t), len(power) - 2)
    y = mp.log(power[low]) + (t - low) * (mp.log(power[low + 1]) - mp.log(power[low]))
    return mp.exp(y / 2), mp.sqrt(1 - mp.exp(y))


CASES: dict[str, tuple[Process, Callable[[mp.mpf], tuple[mp.mpf, mp.mpf]], list[float]]] = {
    "linear": (VPLinear(), _linear, [1e-12, 1e-5, 1e-3, 0.3, 1.0]),
    "cosine": (VPCosine(), _cosine, [1e-12, 1e-5, 1e-3, 0.3, 0.98, 0.9946, 1 - 1e-9]),
    "discrete": (DDPM, _discrete, [-1 + 1e-9, -0.5, 0.0, 0.25, 1.0, 400.75, 998.5, 999.0]),
    "edm": (EDM(), lambda t: (mp.mpf(1), t), [1e-9, 0.002, 1.0, 80.0]),
    "flow": (FlowMatching(shift=3.0), _flow, [1e-12, 1e-3, 0.5, 0.999, 1 - 1e-12]),
    "ve": (
        VE(),
        lambda t: (mp.mpf(1), mp.mpf(0.02) * (mp.mpf(100.0) / mp.mpf(0.02)) ** t),
        [0.0, 0.3, 1.0],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_values(name: str) -> None:
    process, exact, times = CASES[name]
    with mp.workdps(50):
        for t in times:
            alpha, sigma = exact(mp.mpf(t))
            for actual, expected in [
                (process.alpha(t), alpha),
                (process.sigma(t), sigma),
                (process.rho(t), sigma / alpha),
            ]:
                assert abs(mp.mpf(float(actual)) / expected - 1) <= ROUNDING, t
            # what a solver uses is differences of log_snr: absolute error, relative above 1
            log_snr = mp.log(alpha / sigma)
            error = abs(mp.mpf(float(process.log_snr(t))) - log_snr)
            assert error <= ROUNDING * max(1, abs(log_snr)), t


@pytest.mark.parametrize("name", CASES)
def test_inverse(name: str) -> None:
    process, _, times = CASES[name]
    t = torch.tensor(times, dtype=torch.float64)
    torch.testing.assert_close(process.inverse(process.log_snr(t)), t, rtol=1e-13, atol=1e-15)
    assert process.inverse(process.log_snr(t[0])).shape == ()


@pytest.mark.parametrize("name", [name for name in CASES if name != "ve"])
def test_ends_of_log_snr(name: str) -> None:
    process = CASES[name][0]
    assert float(process.log_snr(process.t_zero)) == torch.inf
    assert float(process.sigma(process.t_zero)) == 0
    assert float(process.alpha(process.t_zero)) == 1
    assert float(process.inverse(torch.inf)) == process.t_zero


def test_flow_starts_from_pure_noise() -> None:
    flow = FlowMatching(shift=2.0)
    assert float(flow.log_snr(1.0)) == -torch.inf
    assert (float(flow.alpha(1.0)), float(flow.sigma(1.0))) == (0.0, 1.0)


@pytest.mark.parametrize("name", CASES)
def test_gradients_in_time(name: str) -> None:
    process, _, times = CASES[name]
    inside = [t for t in times if 1e-4 < t < 0.9999 * process.t_max]
    if process is DDPM:
        inside = [t + 0.3 for t in inside if t < 998]  # its derivative jumps at whole times
    t = torch.tensor(inside, dtype=torch.float64, requires_grad=True)
    for method in (process.alpha, process.sigma, process.log_snr):
        assert torch.autograd.gradcheck(method, t, eps=1e-8, atol=1e-5, rtol=1e-5)
    log_snr = process.log_snr(t).detach().requires_grad_()
    assert torch.autograd.gradcheck(process.inverse, log_snr, eps=1e-8, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "parameter"),
    [
        (lambda p: VPLinear(beta_max=p), 20.0),
        (lambda p: VPLinear(beta_min=p), 0.1),
        (lambda p: VPCosine(s=p), 0.008),
        (lambda p: VE(sigma_max=p), 100.0),
        (lambda p: FlowMatching(shift=p), 3.0),
        (lambda p: DiscreteVP(p * torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)), 1.0),
    ],
    ids=["beta_max", "beta_min", "s", "sigma_max", "shift", "alphas_cumprod"],
)
def test_gradients_in_parameters(make: Callable[[Tensor], Process], parameter: float) -> None:
    p = torch.tensor(parameter, dtype=torch.float64, requires_grad=True)
    t = torch.tensor([0.1, 0.4, 0.9], dtype=torch.float64)
    for method in ("alpha", "sigma", "log_snr"):
        assert torch.autograd.gradcheck(lambda p, m=method: getattr(make(p), m)(t) * 1.0 + 0 * p, p)
    log_snr = torch.tensor([-1.0, 0.5], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda p: make(p).inverse(log_snr), p)


def test_cosine_without_normalization_is_a_pure_cosine() -> None:
    process, t = VPCosine(normalized=False), torch.linspace(0.01, 0.98, 7, dtype=torch.float64)
    angle = (t + 0.008) / 1.008 * (torch.pi / 2)
    torch.testing.assert_close(process.alpha(t), angle.cos(), rtol=ROUNDING, atol=0)
    torch.testing.assert_close(process.sigma(t), angle.sin(), rtol=ROUNDING, atol=0)
    torch.testing.assert_close(process.inverse(process.log_snr(t)), t, rtol=1e-13, atol=0)
    assert process.t_zero is None


def test_discrete_schedules() -> None:
    """alphas_cumprod of the usual formulas; the values are diffusers', in float32."""
    n = np.arange(1000)
    torch.testing.assert_close(DDPM.alpha(n).square(), DDPM.alphas_cumprod, rtol=1e-14, atol=0)
    for process, first, last in [
        (DDPM, 0.9999, 4.0358e-05),
        (DiscreteVP.scaled_linear(), 0.99915, 0.0046600),
        (DiscreteVP.squaredcos_cap_v2(), 0.99995871, 2.4288e-09),
    ]:
        assert float(process.alphas_cumprod[0]) == pytest.approx(first, rel=1e-5)
        assert float(process.alphas_cumprod[-1]) == pytest.approx(last, rel=1e-4)


def test_float32_times_are_computed_in_float64() -> None:
    t = torch.tensor([0.25, 1e-3])
    out = VPLinear().log_snr(t)
    assert out.dtype == torch.float64
    assert torch.equal(out, VPLinear().log_snr(t.double()))


def test_preconditioning_is_edm_on_the_unscaled_state() -> None:
    """c_in normalizes the input: Var(c_in x) = 1 for data of variance sigma_data^2."""
    for process in (EDM(), VPLinear(), FlowMatching(shift=2.0)):
        t = torch.tensor([0.01, 0.3, 0.9], dtype=torch.float64)
        c_skip, c_out, c_in = process.preconditioning(t)
        alpha, sigma = process.alpha(t), process.sigma(t)
        variance = alpha.square() * process.sigma_data**2 + sigma.square()
        torch.testing.assert_close(c_in.square() * variance, torch.ones_like(t))
        # the target (x0 - c_skip x) / c_out has variance 1 as well
        rest = (1 - c_skip * alpha).square() * process.sigma_data**2 + (c_skip * sigma).square()
        torch.testing.assert_close(rest / c_out.square(), torch.ones_like(t))


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: VPLinear(beta_min=20.0, beta_max=0.1), ValueError, "beta_min < beta_max"),
        (lambda: VPLinear(t_min=1.0), ValueError, "t_min < t_max"),
        (lambda: VPCosine(t_max=1.5), ValueError, "t_max must be at most 1"),
        (lambda: VPCosine(s=-0.1), ValueError, "s must be at least 0"),
        (lambda: VE(sigma_min=0.0), ValueError, "0 < sigma_min"),
        (lambda: EDM(sigma_max=float("inf")), ValueError, "sigma_min < sigma_max"),
        (lambda: EDM(sigma_data=0.0), ValueError, "sigma_data must be positive"),
        (lambda: FlowMatching(shift=0.0), ValueError, "shift must be positive"),
        (lambda: FlowMatching(t_max=2.0), ValueError, "t_max must be at most 1"),
        (lambda: VPLinear(beta_max="high"), TypeError, "beta_max must be a real number"),
        (lambda: VPLinear(beta_max=torch.ones(2)), ValueError, "beta_max must be one number"),
        (lambda: FlowMatching(shift=None), TypeError, "shift must be a real number"),
        (lambda: EDM(sigma_data=1j), TypeError, "sigma_data must be a real number"),
        (lambda: DiscreteVP.linear(2.5), TypeError, "n must be an integer, got 2.5"),
        (lambda: DiscreteVP.squaredcos_cap_v2(1), ValueError, "n must be at least 2, got 1"),
        (lambda: DiscreteVP([0.5, 0.5]), ValueError, "strictly decreasing"),
        (lambda: DiscreteVP([0.5, 0.0]), ValueError, "inside"),
        (lambda: DiscreteVP([0.5]), ValueError, "shape"),
        (lambda: DiscreteVP(["a"]), TypeError, "alphas_cumprod"),
        (lambda: EDM().sigma(torch.tensor(1j)), TypeError, "t must be real"),
        (lambda: EDM().sigma("now"), TypeError, "t must be a real number"),
    ],
)
def test_refusals(make: Callable[[], object], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        make()
