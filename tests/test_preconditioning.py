"""Preconditioners of VP, VE and EDM, with and without momentum, against the official values."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dsno_kernels.diffusion import (
    EDM,
    FDM,
    VE,
    DiscreteVP,
    FlowMatching,
    Preconditioner,
    Process,
    VPCosine,
    VPLinear,
)
from tests.diffusion_problems import golden
from tests.helpers import FLOAT64, assert_close

# The official rows are float32.
OFFICIAL = 1e-6


@pytest.mark.parametrize("momentum", [False, True], ids=["base", "fdm"])
@pytest.mark.parametrize("name", ["edm", "vp"])
def test_golden_coefficients(name: str, momentum: bool) -> None:
    values = golden("fdm.npz")
    low, high = values[f"{name}_m1_sigma_range"].tolist()
    base: Process = EDM() if name == "edm" else VPLinear(t_min=1e-5)
    process = FDM(base, sigma_min=low, sigma_max=high) if momentum else base
    sigma = values[f"{name}_m1_pre_sigma"]
    expected = values[f"{name}_m1_pre_{'fdm' if momentum else 'base'}"]
    found = Preconditioner(process).coefficients(sigma)
    for row, official in zip(found, expected, strict=True):
        assert_close(row, official, OFFICIAL)
        assert row.dtype == torch.float64


@pytest.mark.parametrize("momentum", [None, 1.0, 2.0], ids=["base", "m=1", "m=2"])
def test_ve(momentum: float | None) -> None:
    base = VE()
    table = Preconditioner(base if momentum is None else FDM(base, momentum))
    sigma = torch.tensor([0.02, 1.0, 100.0], dtype=torch.float64)
    c_skip, c_out, c_in, c_noise = table.coefficients(sigma)
    assert torch.equal(c_skip, torch.ones(3, dtype=torch.float64)) and torch.equal(c_out, sigma)
    assert_close(c_noise, torch.log(sigma / 2), FLOAT64)
    t = (sigma - 0.02) / (100.0 - 0.02)
    tau = (momentum or 0.0) * (0.1 * t + 9.95 * t**2)
    assert_close(c_in, torch.exp(-tau) * (1 + tau), FLOAT64)
    assert_close(table.weight(sigma), sigma**-2, FLOAT64)


@pytest.mark.parametrize(
    "base", [EDM(sigma_data=0.7), VE(), VPLinear(), VPCosine(), DiscreteVP.linear()]
)
def test_the_network_sees_the_state_of_the_momentum_process(base: Process) -> None:
    """D from x and D from s x are one function, in training and in a plan."""
    process = FDM(base, 1.5)
    t = torch.tensor([0.01, 0.3, 0.8], dtype=torch.float64)
    sigma, x, F = process.rho(t), torch.randn(3, dtype=torch.float64), torch.tensor([1.0, -2.0, 3])
    c_skip, c_out, c_in, _ = Preconditioner(process).coefficients(sigma)
    A, B, scale = process.preconditioning(t)
    state = process.alpha(t) * x
    assert_close(A * state + B * F, c_skip * x + c_out * F, FLOAT64)
    assert_close(scale * state, c_in * x, FLOAT64)


def test_times_that_the_official_networks_are_told() -> None:
    """VP: 999 t; a discrete process: its own time."""
    sigma = VPCosine().rho(torch.tensor([0.25, 0.5]))
    expected = torch.tensor([249.75, 499.5], dtype=torch.float64)
    assert_close(Preconditioner(VPCosine()).coefficients(sigma).c_noise, expected, FLOAT64)
    ddpm = DiscreteVP.linear()
    sigma = ddpm.rho(torch.tensor([17.0, 900.0]))
    expected = torch.tensor([17.0, 900.0], dtype=torch.float64)
    assert_close(Preconditioner(FDM(ddpm)).coefficients(sigma).c_noise, expected, FLOAT64)


def test_levels_in_training_are_those_of_the_base() -> None:
    u = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    normal = torch.distributions.Normal(*torch.tensor([-1.2, 1.2], dtype=torch.float64))
    cases: list[tuple[Process, torch.Tensor]] = [
        (EDM(), normal.icdf(u).exp()),
        (VE(), 0.02 * 5000**u),
        (VPLinear(t_min=1e-5), VPLinear().rho(1e-5 + u * (1 - 1e-5))),
    ]
    for base, expected in cases:
        for process in (base, FDM(base)):
            assert_close(Preconditioner(process).levels(u), expected, FLOAT64)
    moved = Preconditioner(EDM(), mean=0.0, std=1.6).levels(0.5)
    assert float(moved) == pytest.approx(1.0, abs=1e-12)


def test_golden_weights() -> None:
    values = golden("fdm.npz")
    sigma = values["loss_edm_warm_sigma"].double()
    weight = Preconditioner(FDM(EDM())).weight(sigma)
    ceiling = values["loss_edm_warm_clamp_cur"][:4, None]
    assert_close(torch.minimum(weight, ceiling), values["loss_edm_warm_weight"], OFFICIAL)
    assert_close(weight, values["loss_edm_plain_weight"], OFFICIAL)


@pytest.mark.parametrize("base", [EDM(), VE(), VPLinear()])
def test_the_denoiser_without_noise_is_the_identity(base: Process) -> None:
    for process in (base, FDM(base)):
        c_skip, c_out, c_in, _ = Preconditioner(process).coefficients(0.0)
        assert (float(c_skip), abs(float(c_out))) == (1.0, 0.0) and bool(c_in.isfinite())


def test_which_networks_momentum_shows_large_inputs() -> None:
    """The share of the training levels at which the root mean square of the input is above 3, for
    data of 0.85 as the digits: why momentum is harder on VP than on EDM (README).
    """
    quantiles = (torch.arange(10000, dtype=torch.float64) + 0.5) / 10000
    bases = {"edm": EDM(sigma_data=0.75), "vp": VPLinear(t_min=1e-5), "ve": VE()}
    shares = {}
    for name, base in bases.items():
        for process in (base, FDM(base, 2.0)):
            table = Preconditioner(process)
            sigma = table.levels(quantiles)
            size = table.coefficients(sigma).c_in * (sigma.square() + 0.85**2).sqrt()
            shares[name, process is base] = float((size > 3).double().mean())
    expected = {("edm", True): 0.0, ("edm", False): 0.03, ("vp", True): 0.0, ("vp", False): 0.46}
    expected |= {("ve", True): 0.42, ("ve", False): 0.33}
    assert shares == pytest.approx(expected, abs=0.01)


def test_gradients() -> None:
    sigma = torch.tensor([0.003, 0.5, 20.0], dtype=torch.float64, requires_grad=True)
    for base in (EDM(), VE(), VPLinear()):
        assert torch.autograd.gradcheck(Preconditioner(FDM(base)).coefficients, sigma, eps=1e-7)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: Preconditioner(FlowMatching()), TypeError, "a VP, VE or EDM process is required"),
        (lambda: Preconditioner("edm"), TypeError, "a VP, VE or EDM process is required"),
        (lambda: Preconditioner(EDM(), std=0.0), ValueError, "std must be positive and finite"),
        (lambda: Preconditioner(EDM(), std=float("inf")), ValueError, "std must be positive and"),
        (lambda: Preconditioner(EDM(), float("nan")), ValueError, "mean must be finite, got nan"),
        (lambda: Preconditioner(EDM()).weight("loud"), TypeError, "sigma must be a real number"),
        (lambda: Preconditioner(EDM()).coefficients(-1), ValueError, "at least 0, got -1"),
    ],
)
def test_refusals(make: Callable[[], object], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        make()
