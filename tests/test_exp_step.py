"""`exp_step` against its formula in float64: values, coefficients of every form, layouts, dtypes,
memory, and every refusal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import dsno_kernels as dk
from dsno_kernels import _C, backends
from dsno_kernels.backends import cpu
from tests.helpers import FLOAT64, IO_BUDGET, assert_close
from tests.strategies import tensor

STEP_BACKENDS = ("cpu", "reference")
# Ten products and sums rounded to float32, 6e-8 each, on terms a few times the size of their sum.
STEP = 1e-6


@pytest.fixture(params=_C.cpu_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    _C.cpu_set_isa(request.param)
    yield request.param
    _C.cpu_set_isa(_C.cpu_isas()[-1])


def formula(tensors: list[Tensor], rows: Tensor) -> Tensor:
    """The sum, term by term in float64; rows `[cols]` or `[B, cols]`."""
    total = torch.zeros(tensors[0].shape, dtype=torch.float64)
    for j, t in enumerate(tensors):
        c = rows[..., j].double()
        c = c.reshape(-1, *[1] * (t.ndim - 1)) if rows.ndim == 2 else c
        total = total + c * t.double()
    return total


def test_the_cpu_kernels_are_built() -> None:
    request = backends.Request("exp_step", torch.device("cpu"), torch.float32)
    assert backends.unsupported("cpu", request) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("terms", range(10))
def test_every_number_of_terms_on_every_instruction_set(
    isa: str, terms: int, dtype: torch.dtype
) -> None:
    x, *rest = (torch.randn(3, 5, 7, 11).to(dtype) for _ in range(terms + 1))
    noise = rest.pop() if terms == 9 else None
    row = torch.randn(terms + 1)
    y = dk.exp_step(x, rest, row.tolist(), noise=noise, backend="cpu")
    tensors = [x, *rest] if noise is None else [x, *rest, noise]
    assert y.dtype == dtype
    assert_close(y, formula(tensors, row), STEP if dtype == torch.float32 else IO_BUDGET)


@pytest.mark.parametrize("size", [1, 3, 15, 16, 17, 511, 513, 8191, 8193, 70001])
@pytest.mark.parametrize("dtypes", [(torch.float32,) * 4, (torch.float32, torch.bfloat16) * 2])
def test_odd_sizes_are_written_to_the_last_element(
    isa: str, size: int, dtypes: tuple[torch.dtype, ...]
) -> None:
    x, *history = (torch.randn(size).to(dtype) for dtype in dtypes)
    row = [1.1, -0.3, 0.2, -0.1]
    y = dk.exp_step(x, history, row, backend="cpu")
    assert_close(y, formula([x, *history], torch.tensor(row)), STEP)


def test_large_outputs_are_streamed_right(isa: str) -> None:
    x, *history = torch.randn(4, 3, 5, 300, 301).unbind(0)  # past the size of streamed outputs
    assert x.numel() * 4 >= 4 << 18
    big = [t.repeat(1, 2, 2, 1) for t in (x, *history)]
    row = torch.randn(4)
    y = dk.exp_step(big[0], big[1:], row.tolist(), backend="cpu")
    assert big[0].numel() * 4 > 4 << 20
    assert_close(y, formula(big, row), STEP)


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    ndim = draw(st.integers(1, 4))
    shape = tuple(draw(st.sampled_from([1, 2, 3, 5, 17])) for _ in range(ndim))
    k = draw(st.integers(0, 8))
    dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])
    memory = st.sampled_from(["contiguous", "permuted", "sliced", "offset", "expanded"])
    count = k + 1 + draw(st.booleans())
    same = draw(st.booleans())
    order = tuple(draw(st.permutations(range(ndim))))
    first = (draw(dtypes), draw(memory), order)
    kinds = [
        first if same else (draw(dtypes), draw(memory), tuple(draw(st.permutations(range(ndim)))))
        for _ in range(count)
    ]
    return {
        "shape": shape,
        "k": k,
        "kinds": kinds,
        "rows": draw(st.sampled_from(["numbers", "row", "rows", "int", "index", "indices"])),
        "out_dtype": draw(st.one_of(st.none(), dtypes)),
        "row_dtype": draw(st.sampled_from([torch.float32, torch.float64])),
        "zeros": draw(st.lists(st.integers(0, count - 1), max_size=3)),
        "backend": draw(st.sampled_from([None, "reference"])),
        "seed": draw(st.integers(0, 2**31)),
    }


@settings(max_examples=150, deadline=None)
@given(calls())
def test_drawn_calls_agree_with_float64(call: dict[str, Any]) -> None:
    torch.manual_seed(call["seed"])
    shape, N = call["shape"], 4
    tensors = [tensor(shape, dtype, memory, order) for dtype, memory, order in call["kinds"]]
    history, noise = tensors[1 : 1 + call["k"]], tensors[1 + call["k"] :]
    table = torch.randn(N, len(tensors), dtype=call["row_dtype"])
    table[:, call["zeros"]] = 0
    index: Any = None
    coefficients: Any = table[1]
    rows = table[1]
    if call["rows"] == "numbers":
        coefficients = table[1].tolist()
    elif call["rows"] == "rows":
        coefficients = rows = torch.randn(shape[0], len(tensors), dtype=call["row_dtype"])
    elif call["rows"] in ("int", "index"):
        coefficients, index, rows = table, 2, table[2]
        index = torch.tensor(2) if call["rows"] == "index" else 2
    elif call["rows"] == "indices":
        index = torch.randint(N, shape[:1])
        coefficients, rows = table, table[index]
    y = dk.exp_step(
        tensors[0],
        history,
        coefficients,
        noise=noise[0] if noise else None,
        index=index,
        out_dtype=call["out_dtype"],
        backend=call["backend"],
    )
    exact = formula(tensors, rows)
    dtype = call["out_dtype"] or tensors[0].dtype
    assert y.dtype == dtype and y.shape == shape
    low = torch.finfo(dtype).eps > 1e-6
    # Against the size of the terms: the sum may cancel, and is no larger than they are together.
    size = sum(formula([t], rows[..., j : j + 1]).norm().item() for j, t in enumerate(tensors))
    assert (y.double() - exact).norm().item() <= (IO_BUDGET if low else STEP) * size


@pytest.mark.parametrize("backend", STEP_BACKENDS)
def test_float64_is_computed_in_float64(backend: str) -> None:
    x, h = torch.randn(2, 3, 5, dtype=torch.float64).unbind(0)
    row = torch.tensor([0.3, -1.7], dtype=torch.float64)
    if backend == "cpu":
        with pytest.raises(NotImplementedError, match="float32"):
            dk.exp_step(x, [h], row, backend=backend)
        backend = ""
    y = dk.exp_step(x, [h], row, backend=backend or None)
    assert y.dtype == torch.float64
    assert_close(y, formula([x, h], row), FLOAT64)


def test_bfloat16_sums_are_float32() -> None:
    """Eight steps of 2^-9 each on 1 vanish one by one in bfloat16, together they do not."""
    x, h = torch.ones(64, dtype=torch.bfloat16), torch.full((64,), 2.0**-9, dtype=torch.bfloat16)
    y = dk.exp_step(x, [h] * 8, [1.0] * 9)
    assert torch.equal(y, torch.full_like(x, 1 + 2.0**-6))


@pytest.mark.parametrize("backend", STEP_BACKENDS)
@pytest.mark.parametrize("garbage", [math.nan, math.inf])
@pytest.mark.parametrize("kind", ["numbers", "row", "rows", "index", "indices"])
def test_a_zero_coefficient_hides_garbage(kind: str, garbage: float, backend: str) -> None:
    x, h = torch.randn(2, 3, 5, 7).unbind(0)
    bad = torch.full_like(x, garbage)
    row = torch.tensor([1.5, 0.0, -0.5, 0.0])
    forms = {
        "numbers": (row.tolist(), None),
        "row": (row, None),
        "rows": (row.expand(3, 4), None),
        "index": (torch.stack([row * 9, row]), torch.tensor(1)),
        "indices": (torch.stack([row, row * 9]), torch.tensor([0, 0, 0])),
    }
    coefficients, index = forms[kind]
    y = dk.exp_step(x, [bad, h, bad], coefficients, index=index, backend=backend)
    assert_close(y, 1.5 * x.double() - 0.5 * h.double(), STEP)
    empty = dk.exp_step(bad, [bad], [0.0, 0.0], backend=backend)
    assert torch.equal(empty, torch.zeros_like(x))
    used = dk.exp_step(bad, [h], [1.0, 1.0], backend=backend)
    assert not used.isfinite().any()


@pytest.mark.parametrize("backend", STEP_BACKENDS)
def test_samples_of_mixed_orders_are_those_of_single_calls_bitwise(backend: str) -> None:
    B, N = 5, 7
    x, *history = torch.randn(5, B, 3, 5, 7).unbind(0)
    table = torch.randn(N, 5, dtype=torch.float64)
    for row, order in enumerate([1, 2, 3, 4, 1, 2, 4]):
        table[row, 1 + order :] = 0
    index = torch.tensor([6, 0, 3, 3, 1])
    y = dk.exp_step(x, history, table, index=index, backend=backend)
    rows = dk.exp_step(x, history, table[index], backend=backend)
    assert torch.equal(y, rows)
    for b in range(B):
        parts = [t[b : b + 1] for t in (x, *history)]
        row = table[index[b]]
        for alone in (
            dk.exp_step(parts[0], parts[1:], row, backend=backend),
            dk.exp_step(parts[0], parts[1:], row.tolist(), backend=backend),
            dk.exp_step(parts[0], parts[1:], table, index=int(index[b]), backend=backend),
            dk.exp_step(parts[0], parts[1:], table, index=index[b], backend=backend),
        ):
            assert torch.equal(y[b : b + 1], alone)


@pytest.mark.parametrize("backend", STEP_BACKENDS)
@pytest.mark.parametrize("tensor_head", [False, True])
def test_a_ring_buffer_is_read_from_its_head_backwards(backend: str, tensor_head: bool) -> None:
    x, ring, noise = torch.randn(2, 3, 5), torch.randn(4, 2, 3, 5), torch.randn(2, 3, 5)
    row = [0.9, 1.0, -2.0, 3.0, -4.0, 0.5]
    for head in (0, 1, 3, 6, -1):
        entries = [ring[(head - j) % 4] for j in range(4)]
        at = torch.tensor(head) if tensor_head else head
        y = dk.exp_step(x, ring, row, head=at, noise=noise, backend=backend)
        assert torch.equal(y, dk.exp_step(x, entries, row, noise=noise, backend=backend))
    newest_first = dk.exp_step(x, ring, row, noise=noise, backend=backend)
    assert torch.equal(
        newest_first, dk.exp_step(x, ring.unbind(0), row, noise=noise, backend=backend)
    )


@pytest.mark.parametrize("backend", STEP_BACKENDS)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["fp32", "bf16", "fp64"]
)
def test_in_place(backend: str, dtype: torch.dtype) -> None:
    if backend == "cpu" and dtype == torch.float64:
        backend = ""
    for shape, memory in [((3, 5, 7), "contiguous"), ((3, 5, 7), "permuted"), ((4, 9), "sliced")]:
        order = tuple(reversed(range(len(shape))))
        x, h = (tensor(shape, dtype, memory, order) for _ in range(2))
        expected = dk.exp_step(x, [h, x], [0.5, 2.0, 0.25], backend=backend or None)
        version, address = x._version, x.data_ptr()
        y = dk.exp_step(x, [h, x], [0.5, 2.0, 0.25], inplace=True, backend=backend or None)
        assert y is x and x.data_ptr() == address and x._version > version
        assert torch.equal(x, expected)


@pytest.mark.parametrize("backend", STEP_BACKENDS)
def test_in_place_over_memory_that_overlaps_shifted(backend: str) -> None:
    memory = torch.randn(20000)
    x, shifted = memory[:-3], memory[3:]
    expected = formula([x, shifted], torch.tensor([1.0, -2.0]))
    dk.exp_step(x, [shifted], [1.0, -2.0], inplace=True, backend=backend)
    assert_close(x, expected, STEP)


def test_writing_in_place_is_seen_by_autograd() -> None:
    x, w = torch.randn(5), torch.randn(5, requires_grad=True)
    loss = (x * w).sum()
    dk.exp_step(x, [x], [1.0, 1.0], inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("shape", [(0, 3, 5), (3, 0), ()], ids=str)
def test_empty_batches_and_tensors_without_axes(shape: tuple[int, ...]) -> None:
    x, h = torch.randn(shape), torch.randn(shape)
    y = dk.exp_step(x, [h], [2.0, 3.0])
    assert y.shape == shape and torch.allclose(y, 2 * x + 3 * h)
    if shape:
        rows = torch.randn(shape[0], 2)
        assert dk.exp_step(x, [h], rows).shape == shape
        assert dk.exp_step(x, [h], rows, inplace=True) is x


@pytest.mark.parametrize("memory", ["contiguous", "permuted"])
def test_the_result_lies_in_memory_as_x_does(memory: str) -> None:
    x = tensor((3, 4, 5), torch.float32, memory, (0, 2, 1))
    for coefficients in ([1.0, 2.0], torch.ones(3, 2)):
        y = dk.exp_step(x, [x.contiguous()], coefficients)
        assert y.stride() == x.stride()
    batch_inside = torch.randn(4, 5, 3).permute(2, 0, 1)
    rows = torch.randn(3, 2)
    y = dk.exp_step(batch_inside, [batch_inside], rows)
    assert y.is_contiguous()
    assert_close(y, formula([batch_inside] * 2, rows), STEP)


def test_threads_and_runs_do_not_change_bits() -> None:
    x, *history = torch.randn(4, 2, 3, 130, 131).unbind(0)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            results.append(dk.exp_step(x, history, [1.0, 2.0, 3.0, 4.0], backend="cpu"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def plant(monkeypatch: pytest.MonkeyPatch, change: Callable[[list[Any], list[float]], Any]) -> None:
    run = cpu.exp_step

    def defect(tensors: list[Tensor], *, values: list[float], **options: Any) -> Tensor:
        tensors, values = change(list(tensors), list(values))
        return run(tensors, values=values, **options)

    monkeypatch.setattr(cpu, "exp_step", defect)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, row: (tensors, [row[0], -row[1], *row[2:]]),
        lambda tensors, row: (tensors[:-1], row[:-1]),
        lambda tensors, row: (tensors, [row[0], row[2], row[1], *row[3:]]),
        lambda tensors, row: (tensors, [0.0, *row[1:]]),
    ],
    ids=["wrong_sign", "dropped_term", "wrong_column", "x_dropped"],
)
def test_a_planted_defect_is_noticed(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[list[Any], list[float]], Any]
) -> None:
    test_odd_sizes_are_written_to_the_last_element("", 17, (torch.float32,) * 4)
    plant(monkeypatch, change)
    with pytest.raises(AssertionError, match="relative RMS error"):
        test_odd_sizes_are_written_to_the_last_element("", 17, (torch.float32,) * 4)


X, TABLE = torch.zeros(2, 3), torch.zeros(5, 2)


@pytest.mark.parametrize(
    ("kind", "message", "call"),
    [
        (TypeError, "x must be a torch.Tensor", lambda: dk.exp_step([1.0], [X], [1, 2])),
        (TypeError, "x must be real", lambda: dk.exp_step(X.long(), [X], [1, 2])),
        (TypeError, r"history\[1\] must be real", lambda: dk.exp_step(X, [X, X.int()], [1, 2, 3])),
        (TypeError, r"history\[0\] must be a", lambda: dk.exp_step(X, [None], [1, 2])),
        (TypeError, "noise must be a", lambda: dk.exp_step(X, [X], [1, 2, 3], noise=1.0)),
        (ValueError, r"shape of x, \(2, 3\)", lambda: dk.exp_step(X, [X.mT], [1, 2])),
        (ValueError, "noise must have the shape", lambda: dk.exp_step(X, [], [1, 2], noise=X[0])),
        (ValueError, "one device", lambda: dk.exp_step(X, [X.to("meta")], [1, 2])),
        (ValueError, "3 columns, got 2", lambda: dk.exp_step(X, [X, X], [1, 2])),
        (ValueError, "2 columns, got 3", lambda: dk.exp_step(X, [X], torch.ones(3))),
        (ValueError, "at most 8", lambda: dk.exp_step(X, [X] * 9, [1.0] * 10)),
        (ValueError, "finite, got nan", lambda: dk.exp_step(X, [X], [1.0, math.nan])),
        (ValueError, "finite, got inf", lambda: dk.exp_step(X, [X], [math.inf, 1.0])),
        (TypeError, "numbers or one tensor", lambda: dk.exp_step(X, [X], [1.0, X])),
        (TypeError, "coefficients must be real", lambda: dk.exp_step(X, [X], TABLE[0].long())),
        (ValueError, r"\[B, cols\]", lambda: dk.exp_step(X, [X], TABLE)),
        (ValueError, "device of x", lambda: dk.exp_step(X, [X], TABLE[0].to("meta"))),
        (ValueError, "must be a table", lambda: dk.exp_step(X, [X], TABLE[0], index=1)),
        (ValueError, "must be a tensor", lambda: dk.exp_step(X, [X], [1, 2], index=1)),
        (ValueError, "index 5 is out", lambda: dk.exp_step(X, [X], TABLE, index=5)),
        (ValueError, "index -1 is out", lambda: dk.exp_step(X, [X], TABLE, index=-1)),
        (
            ValueError,
            "index 5 is out of range for a table of 5 rows",
            lambda: dk.exp_step(X, [X], TABLE, index=torch.tensor([0, 5])),
        ),
        (
            ValueError,
            "index -2 is out",
            lambda: dk.exp_step(X, [X], TABLE, index=torch.tensor(-2)),
        ),
        (
            ValueError,
            r"shape \[B\]",
            lambda: dk.exp_step(X, [X], TABLE, index=torch.tensor([0, 1, 2])),
        ),
        (TypeError, "index must be torch.int64", lambda: dk.exp_step(X, [X], TABLE, index=X[0, 0])),
        (TypeError, "index must be an integer", lambda: dk.exp_step(X, [X], TABLE, index=1.0)),
        (ValueError, "ring buffer", lambda: dk.exp_step(X, [X], [1, 2], head=0)),
        (ValueError, r"\[k, 2, 3\]", lambda: dk.exp_step(X, X, [1, 2])),
        (TypeError, "head must be an integer", lambda: dk.exp_step(X, X[None], [1, 2], head=0.5)),
        (
            ValueError,
            "without axes",
            lambda: dk.exp_step(X, X[None], [1, 2], head=torch.tensor([0])),
        ),
        (TypeError, "out_dtype", lambda: dk.exp_step(X, [X], [1, 2], out_dtype=torch.int32)),
        (
            ValueError,
            "writes into x",
            lambda: dk.exp_step(X, [X], [1, 2], out_dtype=torch.float64, inplace=True),
        ),
        (
            ValueError,
            "share memory",
            lambda: dk.exp_step(X[:, :1].expand(2, 4), [], [1], inplace=True),
        ),
        (
            ValueError,
            r"its elements share memory.*shape \(4, 3\), strides \(1, 1\)",
            lambda: dk.exp_step(torch.arange(6.0).unfold(0, 3, 1), [], [1], inplace=True),
        ),
        (TypeError, "history must be tensors, .* NoneType", lambda: dk.exp_step(X, None, [1])),
        (TypeError, "coefficients must be numbers .* None", lambda: dk.exp_step(X, [], None)),
        (TypeError, "coefficients must be .* 2.0: give a list", lambda: dk.exp_step(X, [], 2.0)),
        (
            ValueError,
            "records no graph",
            lambda: dk.exp_step(X, [X.clone().requires_grad_()], [1, 2], inplace=True),
        ),
        (ValueError, "unknown backend", lambda: dk.exp_step(X, [X], [1, 2], backend="gpu")),
        (NotImplementedError, "does not have exp_step", lambda: refused_by_triton()),
    ],
)
def test_refusals_say_what_is_wrong(
    kind: type[Exception], message: str, call: Callable[[], object]
) -> None:
    with pytest.raises(kind, match=message):
        call()


def test_coefficients_may_be_numbers_of_numpy() -> None:
    given = np.array([0.5, 2.0], dtype=np.float32)
    assert torch.equal(dk.exp_step(X, [X + 1], given), dk.exp_step(X, [X + 1], [0.5, 2.0]))


def refused_by_triton() -> None:
    """A backend that could run on this device, but has no such op."""
    request = backends.Request("exp_step", torch.device("cpu"), torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(cpu, "exp_step")
        backends.unsupported.cache_clear()
        backends._select.cache_clear()
        try:
            backends.select("cpu", request)
        finally:
            backends.unsupported.cache_clear()
            backends._select.cache_clear()


def test_explain_names_the_backend() -> None:
    assert "-> cpu" in dk.explain("exp_step", X, [X], [1.0, 2.0])
    assert "-> reference" in dk.explain("exp_step", X.double(), [X], [1.0, 2.0])
