"""`solver_step` against its formulas in float64, on every instruction set: values, noise, memory,
gradients, and a sampler in bfloat16.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import dsno_kernels as dk
from dsno_kernels import _C
from dsno_kernels.backends import cpu, reference_steps
from dsno_kernels.backends._solver_step import Step
from tests.helpers import FLOAT64, assert_close, rel_rms
from tests.test_exp_step import STEP, STEP_BACKENDS, isa  # noqa: F401

OPS = torch.ops.dsno_kernels
SHAPE = (3, 2, 5, 7)


def row_of(K: int, batch: int | None = None) -> Tensor:
    """Random columns A, B, a_b, c_b, s, a_p, c_p, c_in."""
    return torch.randn(*(() if batch is None else (batch,)), 2 * K + 6, dtype=torch.float64)


def formula(
    point: Tensor, output: Tensor, row: Tensor, history: list[Tensor], **options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """base', point', h_0, input' in float64, written out; rows `[cols]` or `[B, cols]`."""
    K = row.shape[-1] // 2 - 3

    def c(j: int) -> Tensor:
        return row[..., j].reshape(-1, *[1] * (point.ndim - 1)) if row.ndim == 2 else row[j]

    x, m = point.double(), output.double()
    if (u := options.get("unconditional")) is not None:
        g = torch.as_tensor(options["guidance"], dtype=torch.float64)
        m = u.double() + g.reshape(-1, 1, 1, 1) * (m - u.double())
    h = c(0) * x + c(1) * m
    if "clip" in options:
        h = h.clamp(*options["clip"])
    if "threshold" in options:
        ratio, max_value, _ = options["threshold"]
        s = torch.quantile(h.abs().flatten(1), ratio, dim=1).clamp(min=max_value)
        s = s.reshape(-1, 1, 1, 1)
        h = h.clamp(-s, s) / s
    entries = [h, *(t.double() for t in history)]
    base = x if options.get("base") is None else options["base"].double()
    new = c(2) * base + sum(c(3 + j) * entries[j] for j in range(K))
    if options.get("noise") is not None:
        new = new + c(3 + K) * options["noise"].double()
    ahead = new
    if options.get("looks_ahead"):
        ahead = c(4 + K) * new + sum(c(5 + K + j) * entries[j] for j in range(K))
    return new, ahead, h, c(5 + 2 * K) * ahead


def inputs(K: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    point, output, *history = torch.randn(K + 1, *SHAPE).unbind(0)
    return point, output, history


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": dict,
    "guided": lambda: {"unconditional": torch.randn(SHAPE), "guidance": 7.5},
    "guided_0d": lambda: {"unconditional": torch.randn(SHAPE), "guidance": torch.tensor(3.0)},
    "guided_rows": lambda: {"unconditional": torch.randn(SHAPE), "guidance": torch.randn(3)},
    "base": lambda: {"base": torch.randn(SHAPE), "looks_ahead": True},
    "clip": lambda: {"clip": (-0.5, 0.75), "looks_ahead": True},
    "clip_below": lambda: {"clip": (-0.5, math.inf)},
    "threshold": lambda: {"threshold": (0.9, 0.5, "dpm_solver")},
    "noise": lambda: {"noise": torch.randn(SHAPE), "looks_ahead": True},
}


@pytest.mark.parametrize("K", [1, 3, 8])
@pytest.mark.parametrize("case", CASES)
def test_values(isa: str, case: str, K: int) -> None:  # noqa: F811
    point, output, history = inputs(K)
    options = CASES[case]()
    for row in (row_of(K), row_of(K, 3)):
        row[..., 3 + K] *= "noise" in options
        exact = formula(point, output, row, history, **options)
        for backend, tables in itertools.product(STEP_BACKENDS, [False, True]):
            table, index = row, None
            if tables:
                table = torch.stack([row, -row]) if row.ndim == 1 else row.flip(0)
                index = torch.tensor(0) if row.ndim == 1 else torch.tensor([2, 1, 0])
            step = dk.solver_step(
                point,
                output,
                table,
                history,
                index=index,
                input_dtype=torch.float32,
                backend=backend,
                **options,
            )
            for actual, expected in zip(step, exact, strict=True):
                assert actual is not None and actual.dtype == torch.float32
                # Clamped values are divided by a quantile that is rounded too.
                assert_close(actual, expected, 4 * STEP)


@pytest.mark.parametrize("shape", [(3, 350003), (4, 262160)], ids=["odd", "whole vectors"])
@pytest.mark.parametrize("batch", [False, True], ids=["one row", "rows"])
def test_large_results_are_streamed_right(isa: str, shape: tuple[int, int], batch: bool) -> None:  # noqa: F811
    point, output, base, entry = torch.randn(4, *shape).unbind(0)  # past the size of streaming
    assert point.numel() * 4 > 4 << 20
    row = row_of(2, shape[0] if batch else None)
    row[..., 5] = 0
    options: dict[str, Any] = {"base": base, "looks_ahead": True}
    exact = formula(
        *(x[..., None, None] for x in (point, output)),
        row,
        [entry[..., None, None]],
        base=base[..., None, None],
        looks_ahead=True,
    )
    for inplace in (False, True):
        step = dk.solver_step(
            point,
            output,
            row,
            [entry],
            input_dtype=torch.float32,
            inplace=inplace,
            backend="cpu",
            **options,
        )
        for actual, expected in zip(step, exact, strict=True):
            assert actual is not None
            assert_close(actual, expected[..., 0, 0], STEP)


@pytest.mark.parametrize("backend", STEP_BACKENDS)
def test_dtypes_of_results(backend: str) -> None:
    point, output, history = inputs(2)
    low = [t.bfloat16() for t in history]
    row, base = row_of(2), torch.randn(SHAPE)
    row[5] = 0
    step = dk.solver_step(
        point.bfloat16(),
        output.half(),
        row.tolist(),
        low,
        base=base,
        input_dtype=torch.float16,
        backend=backend,
    )
    assert [t.dtype for t in step] == [
        torch.float32,
        torch.bfloat16,
        torch.bfloat16,
        torch.float16,
    ]
    exact = formula(point.bfloat16(), output.half(), row, low, base=base)
    assert_close(step.base, exact[0], STEP)
    for actual, expected in zip(step[1:], exact[1:], strict=True):
        assert_close(actual, expected, 5e-3)
    plain = dk.solver_step(point, output, row.tolist(), history, keep_entry=False, backend=backend)
    assert plain.point is plain.base and plain.entry is None and plain.model_input is None


@pytest.mark.parametrize("backend", STEP_BACKENDS)
@pytest.mark.parametrize("tensor_head", [False, True])
@pytest.mark.parametrize("k", [2, 3])
def test_a_ring_buffer_holds_the_history(k: int, tensor_head: bool, backend: str) -> None:
    """K = 3: with k = 2 slots h_0 overwrites h_2, which the same step reads."""
    x, ring = torch.randn(SHAPE), torch.full((k, *SHAPE), math.nan)
    state, exact, entries = x, x.double(), []
    table = row_of(3, 7) / 4
    table[:, 6] = 0
    table[0, 4:6] = table[1, 5] = table[0, 9:11] = table[1, 10] = 0  # lower orders first
    head = k - 1
    for i in range(7):
        output = torch.randn(SHAPE)
        padded = [*entries, *[torch.zeros(SHAPE)] * 2][:2]
        exact, ahead, h, _ = formula(x, output, table[i], padded, base=exact, looks_ahead=True)
        step = dk.solver_step(
            x,
            output,
            table,
            ring,
            index=i,
            base=state,
            head=torch.tensor(head) if tensor_head else head,
            looks_ahead=True,
            store=True,
            backend=backend,
        )
        assert step.entry is None
        head = (head + 1) % k
        entries = [h, *entries]
        assert_close(ring[head], h, 10 * STEP)
        assert_close(step.base, exact, 20 * STEP)
        assert_close(step.point, ahead, 20 * STEP)
        x, state = ahead.float(), step.base


@pytest.mark.parametrize("backend", STEP_BACKENDS)
@pytest.mark.parametrize("K", [1, 3])
def test_in_place_with_inputs_that_are_the_state(backend: str, K: int) -> None:
    row = row_of(K)
    row[3 + K] = 0
    for base in (None, torch.randn(SHAPE)):
        point, output, history = inputs(K)
        state = point if base is None else base
        history = [state, *history][: K - 1]
        expected = dk.solver_step(
            point, output, row, history, base=base, looks_ahead=True, backend=backend
        )
        step = dk.solver_step(
            point, output, row, history, base=base, looks_ahead=True, inplace=True, backend=backend
        )
        assert step.base is state
        for actual, wanted in zip(step[:3], expected[:3], strict=True):
            assert torch.equal(actual, wanted)


def philox_of_numpy(seed: int, offset: int, blocks: int) -> np.ndarray:
    """Philox4x32-10 with Python's integers."""
    words = np.zeros((blocks, 4), dtype=np.uint64)
    for q in range(blocks):
        c = [q & 0xFFFFFFFF, q >> 32, offset & 0xFFFFFFFF, offset >> 32]
        key = [seed & 0xFFFFFFFF, seed >> 32]
        for _ in range(10):
            a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [
                (b >> 32) ^ c[1] ^ key[0],
                b & 0xFFFFFFFF,
                (a >> 32) ^ c[3] ^ key[1],
                a & 0xFFFFFFFF,
            ]
            key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
        words[q] = c
    return words


def test_philox_is_the_published_one() -> None:
    """Known answers of Random123 (kat_vectors): counter and key all zero."""
    assert philox_of_numpy(0, 0, 1)[0].tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    for seed, offset in [(0, 0), (2**63 - 5, 2**40 + 3), (12345, 1)]:
        ours = reference_steps.philox(torch.tensor([seed, offset]), 50)
        assert ours.tolist() == philox_of_numpy(seed, offset, 50).tolist()


NOISE_ROW = [0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("size", [1, 3, 64, 1001, 20011])
def test_noise_is_the_same_on_every_backend(isa: str, size: int) -> None:  # noqa: F811
    x = torch.zeros(size)
    seed = (2**62 + 11, 2**33 + 5)
    drawn = dk.solver_step(x, x, NOISE_ROW, seed=seed, backend="cpu").base
    exact = reference_steps.normal_noise(torch.tensor(seed), size)
    # The polynomials of logarithm, sine and cosine are good to an ulp or two of float32.
    assert (drawn.double() - exact).abs().max() <= 2e-6
    assert torch.equal(drawn, dk.solver_step(x, x, NOISE_ROW, seed=seed, backend="cpu").base)


def test_noise_is_normal_and_depends_on_seed_and_offset() -> None:
    n = 400000
    x = torch.zeros(n)

    def draw(seed: Any) -> Tensor:
        return dk.solver_step(x, x, NOISE_ROW, seed=seed).base.double()

    z = draw((1, 0))
    # Five standard errors of the mean, the variance and the fourth moment.
    assert abs(z.mean()) <= 5 / n**0.5 and abs(z.var() - 1) <= 5 * (2 / n) ** 0.5
    assert abs((z**4).mean() - 3) <= 5 * (96 / n) ** 0.5
    for lag in (1, 2, 3, 4):
        assert abs((z[lag:] * z[:-lag]).mean()) <= 5 / n**0.5
    for other in (draw((2, 0)), draw((1, 1)), draw((1 + 2**32, 0))):
        assert abs((z * other).mean()) <= 5 / n**0.5
    generator = torch.Generator().manual_seed(3)
    first, second = draw(generator), draw(generator)
    assert not torch.equal(first, second)
    assert torch.equal(first, draw(generator.manual_seed(3)))


def test_noise_of_samples_is_that_of_the_batch_and_of_the_composed_step() -> None:
    x, rows = torch.randn(4, 3, 5, 7), row_of(1, 4)
    seed = torch.tensor([9, 4])
    step = dk.solver_step(x, x, rows, seed=seed)
    noise = reference_steps.noise_like(x, seed)
    assert_close(step.base, formula(x, x, rows, [], noise=noise)[0], 4 * STEP)
    composed = dk.solver_step(x.clone().requires_grad_(), x, rows, seed=seed)
    assert_close(step.base, composed.base.double(), STEP)


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_formula(case: str) -> None:
    K = 3
    point, output, history = (
        t.double() if isinstance(t, Tensor) else [h.double() for h in t] for t in inputs(K)
    )
    options = CASES[case]()
    row = row_of(K, 5)
    row[:, 3 + K] *= "noise" in options
    leaves = [point, output, row, *history]
    names = [n for n in ("unconditional", "base", "noise", "guidance") if n in options]
    for name in names:
        if isinstance(options[name], Tensor):
            options[name] = options[name].double()
            leaves.append(options[name])
    for leaf in leaves:
        leaf.requires_grad_()
    index = torch.tensor([4, 0, 4])
    step = dk.solver_step(
        point, output, row, history, index=index, input_dtype=torch.float64, **options
    )
    exact = formula(point, output, row[index], history, **options)
    weights = [torch.randn_like(t) for t in exact]
    loss = sum((w * t).sum() for w, t in zip(weights, step, strict=True))
    exact_loss = sum((w * t).sum() for w, t in zip(weights, exact, strict=True))
    assert_close(loss, exact_loss, 1e-10)
    grads = torch.autograd.grad(loss, leaves)
    for grad, expected in zip(grads, torch.autograd.grad(exact_loss, leaves), strict=True):
        assert_close(grad, expected, 10 * FLOAT64)


def test_samples_of_mixed_orders_are_those_of_single_calls_bitwise() -> None:
    point, output, history = inputs(3)
    table = row_of(3, 4)
    table[:, 6] = 0
    table[1, [4, 5, 9, 10]] = 0
    index = torch.tensor([3, 1, 1])
    options = {"looks_ahead": True, "clip": (-1.0, 1.0)}
    batch = dk.solver_step(point, output, table, history, index=index, **options)
    for b in range(3):
        one = [t[b : b + 1] for t in (point, output, *history)]
        alone = dk.solver_step(one[0], one[1], table, one[2:], index=int(index[b]), **options)
        for together, single in zip(batch[:3], alone[:3], strict=True):
            assert torch.equal(together[b : b + 1], single)


@pytest.mark.parametrize("backend", STEP_BACKENDS)
def test_in_place_over_a_model_that_returns_its_input(backend: str) -> None:
    """The output lies where base' is written; the entry is still the output before that."""
    point = torch.randn(2, 3, 700)
    expected = dk.solver_step(point, point.clone(), ROW, inplace=False, backend=backend)
    state = point.clone()
    actual = dk.solver_step(state, state, ROW, inplace=True, backend=backend)
    assert actual.entry is not None and expected.entry is not None
    assert torch.equal(actual.entry, expected.entry)
    assert torch.equal(actual.base, expected.base)


@pytest.mark.parametrize("backend", STEP_BACKENDS)
def test_opcheck(backend: str) -> None:
    point, output, history = inputs(3)
    ring, base = torch.randn(3, *SHAPE), torch.randn(SHAPE)
    row = row_of(3)
    no = None
    plain = (no, no, 1.0, no, no, no)
    for args in [
        (point, output, no, no, history, no, point, no, row, [], *plain, False, no, no, 0, [2] * 4),
        (point, output, output, no, history, no, no, torch.tensor([1, 2]), no, row.tolist(), no, no,
         2.0, no, -1.0, 1.0, True, no, no, 0, [2, 2, -1, 1]),
        (point, output, no, base, list(ring.unbind(0)), torch.tensor(1), point, no,
         row_of(3, 5), [], torch.tensor([0, 4, 2]), no, 1.0, torch.rand(3), no, no, True,
         torch.empty(SHAPE), torch.empty(3, *SHAPE), 0, [-1, 2, -1, 1]),
        (point[:0], output[:0], no, no, [], no, no, no, row_of(1) * 0, [], *plain, False,
         no, no, 0, [2, 2, -1, 1]),
    ]:  # fmt: skip
        torch.library.opcheck(OPS.solver_step.default, (*args, backend))


def test_compiled_steps_are_one_graph() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    table = row_of(3, 20) / 4
    table[:, 6] = 0

    def step(x: Tensor, ring: Tensor, i: Tensor) -> Tensor:
        output = torch.tanh(x)
        done = dk.solver_step(
            x, output, table, ring, index=i, head=i, looks_ahead=True, store=True, clip=(-1, 1)
        )
        return done.point

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    rings = [torch.zeros(3, *SHAPE) for _ in range(2)]
    x = torch.randn(SHAPE)
    for i in range(20):
        y = compiled(x, rings[0], torch.tensor(i))
        assert torch.equal(y, step(x, rings[1], torch.tensor(i)))
        assert torch.equal(*rings)
        x = y
    assert counter.frame_count == 1
    torch._dynamo.reset()


def dpm_2m_table(N: int) -> tuple[Tensor, Tensor, Tensor]:
    """DPM-Solver++ 2M on the VP process, uniform in log-SNR; also alpha and sigma, `[N + 1]`."""
    t = torch.linspace(1.0, 1e-2, 4001, dtype=torch.float64)
    log_alpha = -0.25 * t**2 * 19.9 - 0.05 * t
    lam = log_alpha - 0.5 * torch.log(-torch.expm1(2 * log_alpha))
    grid = torch.linspace(lam[0], lam[-1], N + 1, dtype=torch.float64)
    alpha, sigma = torch.sigmoid(2 * grid).sqrt(), torch.sigmoid(-2 * grid).sqrt()
    h = grid.diff()
    p = -alpha[1:] * torch.expm1(-h)
    q = torch.cat([torch.zeros(1), h[1:] / h[:-1]]).double()
    table = torch.zeros(N, 10, dtype=torch.float64)
    table[:, 0], table[:, 1] = 1 / alpha[:-1], -sigma[:-1] / alpha[:-1]  # x_0 from epsilon
    table[:, 2], table[:, 3], table[:, 4] = sigma[1:] / sigma[:-1], p * (1 + q / 2), -p * q / 2
    table[:, 9] = 1.0
    return table, alpha, sigma


def test_bfloat16_tensors_with_a_float32_state_beat_a_bfloat16_solver() -> None:
    """20 steps on Gaussian data, model and history in bfloat16: the error stays below that of
    DPM-Solver++ 2M in diffusers, 6.4e-3 against float32 on the same kind of problem.
    """
    N = 20
    table, alpha, sigma = dpm_2m_table(N)
    x_T, mean = torch.randn(4, 3, 32, 32), torch.randn(3, 32, 32)

    def epsilon(x: Tensor, i: int) -> Tensor:
        """The exact model of N(mean, 0.5^2), in float32, rounded to the dtype of x."""
        a, s = float(alpha[i]), float(sigma[i])
        exact = s * (x.float() - a * mean) / (a**2 * 0.25 + s**2)
        return exact.to(x.dtype)

    def sample(dtype: torch.dtype) -> Tensor:
        state, model_input, history = x_T, x_T.to(dtype), []
        for i in range(N):
            step = dk.solver_step(
                state,
                epsilon(model_input, i),
                table[i],
                history,
                entry_dtype=dtype,
                input_dtype=dtype,
            )
            state, model_input, history = step.base, step.model_input, [step.entry]
        return state

    assert rel_rms(sample(torch.bfloat16), sample(torch.float32)) <= 6.4e-3


X = torch.zeros(2, 3)
ROW = [0.0, 1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0]
ROW2 = [0.0, 1.0, 1.0, 1.0, 0.5, 0.0, 1.0, 0.0, 0.0, 1.0]
CUDA_LIKE = X.to("meta")


@pytest.mark.parametrize(
    ("kind", "message", "call"),
    [
        (ValueError, "2K \\+ 6", lambda: dk.solver_step(X, X, ROW[:7])),
        (ValueError, "2K \\+ 6", lambda: dk.solver_step(X, X, [0.0] * 24)),
        (ValueError, "reads 1 entries", lambda: dk.solver_step(X, X, ROW2)),
        (ValueError, "reads 1 entries", lambda: dk.solver_step(X, X, torch.tensor(ROW2))),
        (
            ValueError,
            "needs 1 entries of history",
            lambda: dk.solver_step(CUDA_LIKE, CUDA_LIKE, torch.tensor(ROW2, device="meta")),
        ),
        (
            ValueError,
            "adds noise",
            lambda: dk.solver_step(X, X, [*ROW[:4], 1.0, *ROW[5:]]),
        ),
        (TypeError, "output must be a", lambda: dk.solver_step(X, None, ROW)),
        (ValueError, "base must have the shape", lambda: dk.solver_step(X, X, ROW, base=X.mT)),
        (ValueError, "come together", lambda: dk.solver_step(X, X, ROW, guidance=2.0)),
        (ValueError, "come together", lambda: dk.solver_step(X, X, ROW, unconditional=X)),
        (
            ValueError,
            "finite",
            lambda: dk.solver_step(X, X, ROW, unconditional=X, guidance=math.nan),
        ),
        (
            ValueError,
            r"shape \[B\]",
            lambda: dk.solver_step(X, X, ROW, unconditional=X, guidance=torch.ones(3)),
        ),
        (ValueError, "exclude", lambda: dk.solver_step(X, X, ROW, noise=X, seed=(1, 2))),
        (
            ValueError,
            "exclude",
            lambda: dk.solver_step(X, X, ROW, clip=(0, 1), threshold=(0.9, 1.0, "dpm_solver")),
        ),
        (ValueError, "lowest, highest", lambda: dk.solver_step(X, X, ROW, clip=(1, -1))),
        (
            ValueError,
            "unknown threshold definition 'x'",
            lambda: dk.solver_step(X, X, ROW, threshold=(0.9, 1.0, "x")),
        ),
        (ValueError, r"shape \[2\]", lambda: dk.solver_step(X, X, ROW, seed=torch.tensor([1]))),
        (TypeError, "clip must be two numbers", lambda: dk.solver_step(X, X, ROW, clip=1.0)),
        (TypeError, "clip must be two numbers", lambda: dk.solver_step(X, X, ROW, clip=(1,))),
        (TypeError, "clip must be two numbers", lambda: dk.solver_step(X, X, ROW, clip=("a", 1))),
        (TypeError, "threshold must be", lambda: dk.solver_step(X, X, ROW, threshold=0.995)),
        (
            TypeError,
            "threshold ratio must be a number, got 'a'",
            lambda: dk.solver_step(X, X, ROW, threshold=("a", 1.0, "dpm_solver")),
        ),
        (TypeError, r"history must be .* give \(\)", lambda: dk.solver_step(X, X, ROW, None)),
        (TypeError, "table must be numbers", lambda: dk.solver_step(X, X, 1.0)),
        (ValueError, "output must have the shape of point", lambda: dk.solver_step(X, X.mT, ROW)),
        (ValueError, "with head", lambda: dk.solver_step(X, X, ROW, X[None], store=True)),
        (TypeError, "dtypes of results", lambda: dk.solver_step(X, X, ROW, input_dtype=torch.int8)),
        (
            ValueError,
            "records no graph",
            lambda: dk.solver_step(X, X.clone().requires_grad_(), ROW, inplace=True),
        ),
    ],
)
def test_refusals_say_what_is_wrong(
    kind: type[Exception], message: str, call: Callable[[], object]
) -> None:
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.parametrize(
    ("kind", "seed"),
    [
        *((TypeError, seed) for seed in (5, True, (1.5, 2.5), "a", (1, True), {1: 2})),
        *((ValueError, seed) for seed in ((5,), (1, 2, 3), (), (2**63, 0), (0, -(2**63) - 1))),
    ],
    ids=repr,
)
def test_a_seed_is_two_integers(kind: type[Exception], seed: Any) -> None:
    """One number was read out of bounds."""
    with pytest.raises(kind, match=r"two integers \(seed, offset\) from .*; got"):
        dk.solver_step(X, X, NOISE_ROW, seed=seed)


def test_seeds_of_all_kinds() -> None:
    numbers = (2**63 - 1, -(2**63))
    expected = dk.solver_step(X, X, NOISE_ROW, seed=torch.tensor(numbers)).base
    for seed in (numbers, list(numbers), tuple(np.int64(number) for number in numbers)):
        assert torch.equal(dk.solver_step(X, X, NOISE_ROW, seed=seed).base, expected)


@pytest.mark.parametrize("column", range(10))
def test_a_planted_wrong_column_is_noticed(monkeypatch: pytest.MonkeyPatch, column: int) -> None:
    """Each column matters: the values change where one is another number."""
    run = cpu.solver_step

    def defect(step: Step, *rest: Any) -> Any:
        assert step.table is not None
        table = step.table.clone()
        table[..., column] += 0.5
        return run(step._replace(table=table), *rest)

    def check() -> None:
        torch.manual_seed(1)
        point, output, history = inputs(2)
        row, noise = row_of(2), torch.randn(SHAPE)
        options = {"noise": noise, "looks_ahead": True}
        step = dk.solver_step(
            point, output, row, history, input_dtype=torch.float32, backend="cpu", **options
        )
        for actual, expected in zip(
            step, formula(point, output, row, history, **options), strict=True
        ):
            assert_close(actual, expected, 4 * STEP)

    check()
    monkeypatch.setattr(cpu, "solver_step", defect)
    with pytest.raises(AssertionError, match="relative RMS error"):
        check()


def test_the_kernels_of_this_machine_are_tested() -> None:
    assert _C.cpu_isas()[0] == "portable"
