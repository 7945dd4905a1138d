"""Spectral convolutions composed of CUDA C++ transforms and cuBLAS products: the launches of the
GPU, with the device code and the products on the CPU.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import dsno_kernels as dk
from dsno_kernels import backends
from dsno_kernels.backends import Request, _composed, _transforms, cuda, reference
from dsno_kernels.backends._composed import Composed, Launch
from dsno_kernels.backends._transforms import Plan
from tests import oracle, shim
from tests.helpers import BUDGETS, IO_BUDGET, assert_close
from tests.strategies import Case, cases
from tests.test_properties import check

CUDA = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    return shim.plain_launch(tmp_path_factory.mktemp("shim"))


@pytest.fixture(scope="module")
def on_the_cpu(plain: Launch) -> Iterator[list[Plan]]:
    """Backend "cuda" on CPU tensors; the plans that it launches."""
    launched: list[Plan] = []

    def launch(plan: Plan, source: Tensor, target: Tensor, table: Tensor) -> None:
        launched.append(plan)
        plain(plan, source, target, table)

    ops = Composed(launch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "unsupported", lambda request: None)
        for name in ("spectral_conv", "spectral_conv_weight_grad"):
            patch.setattr(cuda, name, getattr(ops, name))
        backends.unsupported.cache_clear()
        backends._select.cache_clear()
        yield launched
    backends.unsupported.cache_clear()
    backends._select.cache_clear()


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(case=cases(max_elements=1500))
def test_any_call_follows_the_formula(on_the_cpu: list[Plan], case: Case) -> None:
    check("reference" if case.dtype == torch.float64 else "cuda", case)


# shape, time_dim, channel_dim, O, K, n
LONG = {
    "fno": ((3, 6, 130), 2, 1, 5, 20, 130),
    "fno-nyquist": ((2, 4, 66), 2, 1, 4, 34, 66),
    "fno-odd": ((2, 3, 131), 2, 1, 4, 66, 131),
    "channels-last": ((2, 96, 8), 1, 2, 8, 10, 96),
    "video": ((2, 70, 4, 2, 4), 1, 2, 4, 7, 70),
    "longer": ((2, 4, 65), 2, 1, 3, 33, 200),
    "shorter": ((2, 4, 200), 2, 1, 3, 33, 64),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("shape", "time_dim", "channel_dim", "O", "K", "n"), LONG.values(), ids=LONG
)
def test_long_transforms_forward_and_backward(
    on_the_cpu: list[Plan],
    shape: tuple[int, ...],
    time_dim: int,
    channel_dim: int,
    O: int,
    K: int,
    n: int,
    dtype: torch.dtype,
) -> None:
    axes = {"time_dim": time_dim, "channel_dim": channel_dim, "n": n}
    x = torch.randn(shape).to(dtype).requires_grad_()
    weight = torch.randn(shape[channel_dim], O, K, 2, requires_grad=True)
    on_the_cpu.clear()
    y = dk.spectral_conv(x, weight, precision="fp32", backend="cuda", **axes)
    assert len(on_the_cpu) == 2  # and a copy of W and one product: nothing else touches y
    assert y.dtype == dtype
    exact = oracle.spectral_conv(x, weight, **axes)
    budget = BUDGETS["fp32"] if dtype == torch.float32 else IO_BUDGET
    assert_close(y, exact, budget)
    g = torch.randn_like(y)
    leaves = (x, weight)
    grads = torch.autograd.grad(y, leaves, g)
    expected = torch.autograd.grad(exact, leaves, g.double())
    for grad, right in zip(grads, expected, strict=True):
        assert_close(grad, right, 1.5 * budget)
    # Imaginary weights of bins that are real on both sides are dead.
    dead = [k for k in range(K) if 2 * k % shape[time_dim] == 0 and 2 * k % n == 0]
    assert grads[1][:, :, dead, 1].abs().max() == 0


def test_the_device_code_of_a_long_convolution_under_sanitizers(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    ops = Composed(shim.sanitized_launch(tmp_path_factory.mktemp("sanitized")))
    for shape, time_dim, channel_dim, O, K, n in LONG.values():
        axes = {"time_dim": time_dim, "channel_dim": channel_dim}
        x, weight = torch.randn(shape), torch.randn(shape[channel_dim], O, K, 2)
        y, _ = ops.spectral_conv(x, weight, n=n, **axes)
        assert_close(y, oracle.spectral_conv(x, weight, n=n, **axes), BUDGETS["fp32"])


def test_transposed_weights_and_gradients_of_gradients(on_the_cpu: list[Plan]) -> None:
    weight = torch.randn(4, 2, 2, 3).permute(2, 3, 0, 1).requires_grad_()  # (I, O, K, 2), strided
    x = torch.randn(2, 2, 70, requires_grad=True)
    with dk.use_backend("cuda"):
        y = dk.spectral_conv(x, weight, time_dim=2, channel_dim=1, precision="fp32")
        (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        second = torch.autograd.grad(grad.square().sum(), (x, weight))
    exact = oracle.spectral_conv(x, weight, 2, 1)
    (grad,) = torch.autograd.grad(exact.square().sum(), x, create_graph=True)
    expected = torch.autograd.grad(grad.square().sum(), (x, weight))
    for found, right in zip(second, expected, strict=True):
        assert_close(found, right, 2 * BUDGETS["fp32"])


@pytest.mark.parametrize("x_planar", [False, True])
@pytest.mark.parametrize("g_planar", [False, True])
def test_weight_gradients_of_any_pair_of_layouts(
    on_the_cpu: list[Plan], x_planar: bool, g_planar: bool
) -> None:
    x, g = torch.randn(2, 70, 4, 6), torch.randn(2, 66, 5, 6)
    expected = dk.spectral_conv_weight_grad(x.double(), g.double(), 9)
    x, g = (
        t if planar else t.transpose(2, 3).contiguous().transpose(2, 3)
        for t, planar in ((x, x_planar), (g, g_planar))
    )
    found = dk.spectral_conv_weight_grad(x, g, 9, backend="cuda")
    assert_close(found, expected, BUDGETS["fp32"])


def test_autocast_does_not_lower_the_products(on_the_cpu: list[Plan]) -> None:
    x, weight, bias = torch.randn(2, 4, 70), torch.randn(4, 4, 9, 2), torch.randn(4)
    with torch.autocast("cpu", torch.bfloat16):
        y = dk.spectral_conv(
            x, weight, time_dim=2, channel_dim=1, bias=bias, precision="fp32", backend="cuda"
        )
    assert_close(y, oracle.spectral_conv(x, weight, 2, 1) + bias[:, None], BUDGETS["fp32"])


def test_spectra_are_planar_where_pixels_are_neighbors(on_the_cpu: list[Plan]) -> None:
    x, weight = torch.randn(2, 70, 4, 2, 4), torch.randn(4, 4, 3, 2)
    on_the_cpu.clear()
    dk.spectral_conv(x, weight, backend="cuda")
    assert [plan.kernel for plan in on_the_cpu] == [
        "truncated_rfft_columns_f32_v4_c4",
        "truncated_irfft_columns_f32_v4_c8",
    ]


class Products(TorchDispatchMode):
    """Records the dtype of every batched product."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.bmm.default:
            self.dtypes.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


class TestTf32:
    """PyTorch's switch lowers the products of cuBLAS only where the precision allows it."""

    @pytest.fixture(autouse=True)
    def bmm(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
        """What the switch says at each product."""
        seen: list[str] = []
        original = torch.bmm

        def record(a: Tensor, b: Tensor) -> Tensor:
            seen.append(torch.backends.cuda.matmul.fp32_precision)
            return original(a, b)

        monkeypatch.setattr(torch, "bmm", record)
        before = torch.get_float32_matmul_precision()
        yield seen
        torch.backends.fp32_precision = "none"
        torch.set_float32_matmul_precision(before)

    @pytest.mark.parametrize("setting", ["highest", "high", "medium"])
    @pytest.mark.parametrize("precision", BUDGETS)
    def test_the_switch_of_each_precision(
        self, bmm: list[str], setting: str, precision: str
    ) -> None:
        torch.set_float32_matmul_precision(setting)
        matrix = torch.randn(1, 2, 2, dtype=torch.complex64)
        _composed.products(matrix, matrix, precision)
        assert (bmm[-1] == "tf32") == (setting != "highest" and precision == "bf16")
        assert torch.get_float32_matmul_precision() == setting

    def test_an_inherited_switch_stays_inherited(self, bmm: list[str]) -> None:
        """One call used to pin it: a later global "ieee" did not arrive."""
        matmul = torch.backends.cuda.matmul
        matmul.fp32_precision = "none"
        torch.backends.fp32_precision = "tf32"
        matrix = torch.randn(1, 2, 2, dtype=torch.complex64)
        _composed.products(matrix, matrix, "fp32")
        assert bmm == ["ieee"] and matmul.fp32_precision == "tf32"
        torch.backends.fp32_precision = "ieee"
        assert matmul.fp32_precision == "ieee"

    @pytest.mark.parametrize("inherited", ["none", "ieee"])
    def test_a_switch_of_its_own_stays_its_own(self, bmm: list[str], inherited: str) -> None:
        torch.backends.fp32_precision = inherited
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        matrix = torch.randn(1, 2, 2, dtype=torch.complex64)
        _composed.products(matrix, matrix, "fp32")
        assert bmm == ["ieee"] and torch.backends.cuda.matmul.fp32_precision == "tf32"

    @pytest.mark.parametrize("capability", [(7, 5), (8, 0)], ids=str)
    @pytest.mark.parametrize("setting", ["highest", "high"])
    @pytest.mark.parametrize("precision", BUDGETS)
    def test_the_reference_goes_where_tf32_does_not_reach(
        self,
        monkeypatch: pytest.MonkeyPatch,
        capability: tuple[int, int],
        setting: str,
        precision: str,
    ) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        torch.set_float32_matmul_precision(setting)
        with FakeTensorMode(), Products() as seen:
            spectrum = torch.empty(4, 2, 3, device="cuda", dtype=torch.complex64)
            product = reference._einsum("bki,bko->kio", spectrum, spectrum, precision)
        wide = setting == "high" and precision != "bf16" and capability == (8, 0)
        assert seen.dtypes == [torch.complex128 if wide else torch.complex64]
        assert product.dtype == torch.complex64

    def test_gradients_of_the_reference_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """They run after it has returned, so it cannot guard them with the switch."""
        asked: list[str] = []

        def widened(spectrum: Tensor, precision: str) -> Tensor:
            asked.append(precision)
            return spectrum.to(torch.complex128)

        monkeypatch.setattr(reference, "out_of_reach", widened)
        x, weight, g = torch.randn(2, 4, 3), torch.randn(3, 5, 2, 2), torch.randn(2, 4, 5)
        with Products() as seen:
            y, pull = torch.func.vjp(dk.spectral_conv, x, weight)
            grads = pull(g)
        assert seen.dtypes == [torch.complex128] * 3 and asked == ["fp32"] * 2
        exact, pull = torch.func.vjp(oracle.spectral_conv, x.double(), weight.double())
        for found, right in zip((y, *grads), (exact, *pull(g.double())), strict=True):
            assert found.dtype == torch.float32
            assert_close(found, right, BUDGETS["fp32"])

    def test_the_switch_is_back_after_a_failure(self) -> None:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        with pytest.raises(RuntimeError):
            _composed.products(torch.ones(1, 2, 2), torch.ones(1, 3, 3), "fp32")
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"

    def test_threads_do_not_switch_it_on_for_each_other(self, bmm: list[str]) -> None:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        matrix = torch.randn(4, 16, 16, dtype=torch.complex64)

        def work() -> None:
            for _ in range(200):
                _composed.products(matrix, matrix, "fp32")

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert bmm == ["ieee"] * 800
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"


def test_a_missing_table_cannot_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uploading it would break the capture with CUDA's own words, or leave a stale table."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    message = "the first transform of length 12345 .* cannot capture: run the same call on cuda:0"
    for _ in range(2):  # the failure is not remembered as a table
        with pytest.raises(RuntimeError, match=message):
            _transforms.twiddles_on(12345, 3, False, 0, torch.float32, CUDA)
    with pytest.raises(RuntimeError, match="the first weight gradient with 3 modes"):
        _transforms.weight_factors_on(8, 8, 3, False, CUDA)


def test_tables_outlive_any_number_of_others() -> None:
    """A captured CUDA graph holds the address of its table."""
    cpu = torch.device("cpu")
    first = _transforms.twiddles_on(8, 2, False, 0, torch.float32, cpu)
    for n in range(9, 400):
        _transforms.twiddles_on(n, 2, False, 0, torch.float32, cpu)
    assert _transforms.twiddles_on(8, 2, False, 0, torch.float32, cpu) is first


@pytest.mark.parametrize(
    ("op", "length", "first"),
    [
        ("spectral_conv", 4, "triton"),
        ("spectral_conv", backends.LONGEST_FUSED, "triton"),
        ("spectral_conv", backends.LONGEST_FUSED + 1, "cuda"),
        ("spectral_conv_weight_grad", 1024, "cuda"),
        ("spectral_conv", 0, "triton"),
        ("truncated_rfft", 4, "cuda"),
        ("truncated_irfft", 4096, "cuda"),
    ],
)
def test_who_serves_which_length(
    monkeypatch: pytest.MonkeyPatch, op: str, length: int, first: str
) -> None:
    monkeypatch.setattr(backends, "unsupported", lambda name, request: None)
    monkeypatch.setattr(backends, "_module", lambda name: name)
    request = Request(op, CUDA, torch.float32, length=length)
    assert backends._select.__wrapped__("", request) == first
    assert f": {first}\n" in backends.explain_request(request)


@pytest.mark.parametrize(
    ("device", "dtype", "op", "reason"),
    [
        ("cpu", torch.float32, "spectral_conv", "it needs CUDA tensors"),
        ("cuda", torch.float64, "spectral_conv", "it computes products in float32"),
        ("cuda", torch.int32, "truncated_rfft", "torch.int32 is not one of"),
    ],
)
def test_refusals(device: str, dtype: torch.dtype, op: str, reason: str) -> None:
    refusal = _composed.unsupported_call(Request(op, torch.device(device), dtype))
    assert refusal is not None and refusal.startswith(reason)
