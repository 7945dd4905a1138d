"""`group_norm_silu` against the literal chain of PyTorch's functions: values, layouts, gradients of
every order, and what PyTorch asks of an operator.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import dsno_kernels as dk
from dsno_kernels.ops.group_norm_silu import GroupNormSiluFunction, backward_op, op
from tests.helpers import BUDGETS, FLOAT64, IO_BUDGET, assert_close

BUDGET = BUDGETS["fp32"]
EPS = 1e-5

# Shape of x, channel_dim, groups, batch axes of scale and shift.
SHAPES: dict[str, tuple[tuple[int, ...], int, int, tuple[int, ...]]] = {
    "odd": ((3, 6, 7, 5), 1, 3, (3,)),
    "dsno": ((2, 4, 8, 4, 4), 2, 4, (2, 4)),
    "times_shared_by_the_batch": ((2, 3, 6, 5, 3), 2, 2, (1, 3)),
    "one_image_for_all_times": ((2, 1, 6, 5, 3), 2, 2, (1, 3)),
    "one_group": ((2, 5, 3, 3), 1, 1, (2,)),
    "a_group_a_channel": ((2, 5, 3, 3), 1, 5, (1,)),
    "signal": ((2, 6, 11), 1, 3, (2,)),
    "no_pixels": ((4, 6), 1, 2, (4,)),
    "volume": ((2, 4, 3, 2, 3), 1, 2, (2,)),
}


def problem(name: str, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], int, int]:
    """x, weight, bias, scale and shift; the groups; the channel axis."""
    shape, channel_dim, groups, batch = SHAPES[name]
    C = shape[channel_dim]
    tensors = [torch.randn(shape) + 0.5, *torch.randn(2, C), *torch.randn(2, *batch, C)]
    return [t.to(dtype).requires_grad_() for t in tensors], groups, channel_dim


def chain(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    channel_dim: int = 1,
    activation: str | None = "silu",
) -> Tensor:
    """What the official residual block computes, for any axes."""
    pixels = [1] * (x.ndim - channel_dim - 1)
    y = F.group_norm(x.flatten(0, channel_dim - 1), groups, weight, bias, EPS).view_as(x)
    if scale is not None:
        y = y * (scale.view(*scale.shape, *pixels) + 1.0)
    if shift is not None:
        y = y + shift.view(*shift.shape, *pixels)
    return y if activation is None else F.silu(y)


def exact_leaves(leaves: list[Tensor]) -> list[Tensor]:
    return [leaf.detach().double().requires_grad_() for leaf in leaves]


def through_the_function(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None, **how: Any
) -> Tensor:
    """The path of the kernels, `GroupNormSiluFunction`, on the reference; x is (B, T, C, ...)."""
    batch = x.shape[:2]
    scale, shift = (None if t is None else t.expand(*batch, -1) for t in (scale, shift))
    options = {"groups": 2, "silu": True, "channels_last": False, "out_dtype": x.dtype} | how
    return GroupNormSiluFunction.apply(
        x,
        options["groups"],
        weight,
        bias,
        scale,
        shift,
        EPS,
        options["silu"],
        options["channels_last"],
        options["out_dtype"],
        "reference",
    )


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("name", SHAPES)
def test_value_and_gradients(name: str, activation: str | None) -> None:
    leaves, groups, channel_dim = problem(name)
    options: dict[str, Any] = {"channel_dim": channel_dim, "activation": activation}
    x, weight, bias, scale, shift = leaves
    y = dk.group_norm_silu(x, groups, weight, bias, scale=scale, shift=shift, **options)
    exact = exact_leaves(leaves)
    expected = chain(exact[0], groups, *exact[1:], **options)
    assert_close(y, expected, BUDGET)
    g = torch.randn_like(y)
    grads = torch.autograd.grad(y, leaves, g)
    for grad, wanted in zip(grads, torch.autograd.grad(expected, exact, g.double()), strict=True):
        assert_close(grad, wanted, 5 * BUDGET)


@pytest.mark.parametrize("missing", ["scale", "shift", "both"])
def test_scale_and_shift_are_optional(missing: str) -> None:
    (x, weight, bias, scale, shift), groups, _ = problem("odd", torch.float64)
    given = {
        name: value
        for name, value in (("scale", scale), ("shift", shift))
        if missing not in (name, "both")
    }
    y = dk.group_norm_silu(x, groups, weight, bias, **given)
    assert_close(y, chain(x, groups, weight, bias, **given), FLOAT64)


@pytest.mark.parametrize("order", ["contiguous", "channels_last", "crop", "pixels_swapped"])
def test_memory_order_of_x_is_kept(order: str) -> None:
    (x, weight, bias, scale, shift), groups, _ = problem("odd")
    x = x.detach()
    if order == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif order == "crop":
        x = x[:, :, 1:, 1:4]
    elif order == "pixels_swapped":
        x = x.mT.contiguous().mT
    y = dk.group_norm_silu(x, groups, weight, bias, scale=scale, shift=shift)
    assert_close(y, chain(x, groups, weight, bias, scale, shift), BUDGET)
    last = dk.group_norm_silu(x, groups, weight, bias, scale=scale, shift=shift, channels_last=True)
    assert torch.equal(last, y)
    assert last.is_contiguous(memory_format=torch.channels_last)
    if order in ("contiguous", "channels_last"):
        assert y.stride() == x.stride()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    leaves, groups, _ = problem("odd")
    x, weight, bias, scale, shift = (leaf.detach().to(dtype) for leaf in leaves)
    y = dk.group_norm_silu(x, groups, weight, bias, scale=scale, shift=shift)
    exact = chain(*(x.double(), groups, *(t.double() for t in (weight, bias, scale, shift))))
    assert y.dtype == dtype
    assert_close(y, exact, IO_BUDGET)
    wide = dk.group_norm_silu(
        x, groups, weight, bias, scale=scale, shift=shift, out_dtype=torch.float32
    )
    assert wide.dtype == torch.float32
    assert_close(wide, exact, BUDGET)


def test_one_float64_tensor_makes_the_arithmetic_float64() -> None:
    (x, weight, bias, *_), groups, _ = problem("odd")
    y = dk.group_norm_silu(x, groups, weight.double(), bias, out_dtype=torch.float64)
    assert_close(y, chain(x.double(), groups, weight.double(), bias.double()), FLOAT64)
    assert dk.group_norm_silu(x, groups, weight.double(), bias).dtype == torch.float32


def test_a_mean_far_from_zero_costs_no_digits() -> None:
    (x, weight, bias, *_), groups, _ = problem("odd")
    x = x.detach() + 1000.0
    y = dk.group_norm_silu(x, groups, weight, bias)
    # x itself carries half a unit in the last place of 1000, 3e-5, against a deviation of 1.
    assert_close(y, chain(x.double(), groups, weight.double(), bias.double()), 1e-4)


@pytest.mark.parametrize("silu", [False, True])
def test_first_and_second_derivatives_of_the_kernel_path(silu: bool) -> None:
    leaves, _, _ = problem("times_shared_by_the_batch", torch.float64)

    def run(*leaves: Tensor) -> Tensor:
        return through_the_function(*leaves, silu=silu)

    assert gradcheck(run, leaves)
    assert gradgradcheck(run, leaves)
    x, weight, bias, scale, _ = leaves

    def without_shift(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
        return through_the_function(x, weight, bias, scale, None, silu=silu)

    assert gradcheck(without_shift, (x, weight, bias, scale))
    assert gradcheck(
        lambda x, w, b: through_the_function(x, w, b, None, None, silu=silu), (x, weight, bias)
    )


def test_backward_saves_x_and_two_numbers_a_group() -> None:
    x = torch.randn(2, 4, 32, 16, 16, requires_grad=True)
    weight, bias = torch.randn(2, 32).requires_grad_().unbind()
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        through_the_function(x, weight, bias, None, None, groups=8)
    assert sum(saved) == x.numel() + 2 * 2 * 4 * 8 + 2 * 32


def test_first_gradients_of_the_kernel_path_in_other_layouts() -> None:
    leaves, _, channel_dim = problem("dsno")
    exact = torch.autograd.grad(
        chain(leaves[0], 2, *leaves[1:], channel_dim=channel_dim).sum(), leaves
    )
    x = leaves[0].movedim(2, -1).contiguous().movedim(-1, 2)  # channels last
    for channels_last in (False, True):
        y = through_the_function(x, *leaves[1:], channels_last=channels_last)
        assert y.stride() == x.stride()
        for grad, wanted in zip(torch.autograd.grad(y.sum(), leaves), exact, strict=True):
            assert_close(grad, wanted, 5 * BUDGET)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "broadcast", "empty"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_opcheck(layout: str, channels_last: bool) -> None:
    x, (scale, shift) = torch.randn(2, 3, 6, 5, 4), torch.randn(2, 2, 3, 6)
    weight, bias = torch.randn(2, 6)
    if layout == "channels_last":
        x = x.movedim(2, -1).contiguous().movedim(-1, 2)
    elif layout == "broadcast":
        x, scale = x[:, :1].expand(-1, 3, -1, -1, -1), scale[:1].expand(2, -1, -1)
    elif layout == "empty":
        x, scale, shift = x[:0], scale[:0], shift[:0]
    for s, h, dtype in ((scale, shift, torch.bfloat16), (None, shift, torch.float32)):
        forward = (x, 3, weight, bias, s, h, EPS, True, channels_last, dtype, "")
        torch.library.opcheck(op, forward)
        y, mean, rstd = op(*forward)
        torch.library.opcheck(backward_op, (y, x, mean, rstd, weight, bias, s, h, True, ""))


def test_compile_has_no_graph_break_and_the_same_numbers() -> None:
    torch._dynamo.reset()
    leaves, groups, channel_dim = problem("one_image_for_all_times")

    def layer(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return 2 * dk.group_norm_silu(
            x, groups, weight, bias, scale=scale, shift=shift, channel_dim=channel_dim
        )

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y, expected = compiled(*leaves), layer(*leaves)
    assert_close(y, expected, BUDGET)
    for grad, wanted in zip(
        torch.autograd.grad(y.sum(), leaves),
        torch.autograd.grad(expected.sum(), leaves),
        strict=True,
    ):
        assert_close(grad, wanted, 5 * BUDGET)


def test_compiled_backward_is_the_op() -> None:
    """Not the formulas that serve a second differentiation."""
    torch._dynamo.reset()
    leaves, groups, _ = problem("odd")
    names: list[str] = []

    def note(graph: torch.fx.GraphModule, _: object) -> Any:
        names.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    from functorch.compile import aot_module_simplified, make_boxed_func

    def backend(graph: Any, inputs: Any) -> Any:
        def compiler(g: torch.fx.GraphModule, i: object) -> Any:
            return make_boxed_func(note(g, i))

        return aot_module_simplified(graph, inputs, fw_compiler=compiler, bw_compiler=compiler)

    compiled = torch.compile(
        lambda x, w, b: dk.group_norm_silu(x, groups, w, b), fullgraph=True, backend=backend
    )
    compiled(*leaves[:3]).sum().backward()
    assert sum("group_norm_silu_backward" in name for name in names) == 1


def test_torch_func_runs_the_reference() -> None:
    leaves, groups, _ = problem("odd", torch.float64)
    x, weight, bias, scale, shift = (leaf.detach() for leaf in leaves)

    def ours(x: Tensor, scale: Tensor) -> Tensor:
        return dk.group_norm_silu(x, groups, weight, bias, scale=scale, shift=shift)

    def exact(x: Tensor, scale: Tensor) -> Tensor:
        return chain(x, groups, weight, bias, scale, shift)

    tangents = torch.randn_like(x), torch.randn_like(scale)
    assert_close(
        torch.func.jvp(ours, (x, scale), tangents)[1],
        torch.func.jvp(exact, (x, scale), tangents)[1],
        FLOAT64,
    )
    stacked = torch.stack([x, x.flip(0)])
    assert_close(
        torch.func.vmap(ours, (0, None))(stacked, scale),
        torch.stack([exact(one, scale) for one in stacked]),
        FLOAT64,
    )
    with pytest.raises(NotImplementedError, match=r"torch.func transforms"):
        torch.func.grad(
            lambda x: dk.group_norm_silu(x, groups, weight, bias, backend="triton").sum()
        )(x)


def test_autocast_changes_nothing() -> None:
    (x, weight, bias, scale, shift), groups, _ = problem("odd")
    y = dk.group_norm_silu(x, groups, weight, bias, scale=scale, shift=shift)
    with torch.autocast("cpu", torch.bfloat16):
        under = dk.group_norm_silu(x, groups, weight, bias, scale=scale, shift=shift)
    assert torch.equal(under, y) and under.dtype == torch.float32


def test_an_empty_batch_gives_empty_results_and_zero_gradients() -> None:
    x = torch.randn(0, 6, 4, 4, requires_grad=True)
    weight, bias = (torch.randn(6, requires_grad=True) for _ in range(2))
    y = dk.group_norm_silu(x, 3, weight, bias)
    assert y.shape == x.shape
    grads = torch.autograd.grad(y.sum(), (x, weight, bias))
    assert grads[0].shape == x.shape and not grads[1].any() and not grads[2].any()


def test_explain_names_the_backend_and_why_not_the_others() -> None:
    (x, weight, bias, *_), groups, _ = problem("odd")
    lines = dk.explain("group_norm_silu", x, groups, weight, bias).splitlines()
    assert lines[0].endswith(": reference")
    reasons = {line.split()[0]: line for line in lines[1:]}
    assert "does not have group_norm_silu" in reasons["cpu"]
    assert "does not have group_norm_silu" in reasons["cuda"]


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"x": torch.zeros(2, 6, 4, dtype=torch.int64)}, TypeError, r"x must be real floating"),
        ({"x": torch.zeros(6)}, ValueError, r"x must have shape \(N, C, ...\).* got \(6,\)"),
        ({"channel_dim": 3}, ValueError, r"channel_dim=3"),
        ({"num_groups": 4}, ValueError, r"num_groups must divide the 6 channels of x, got 4"),
        ({"num_groups": 0}, ValueError, r"num_groups must divide"),
        ({"num_groups": 2.0}, TypeError, r"num_groups must be an integer, got 2.0"),
        ({"weight": torch.zeros(5)}, ValueError, r"weight must have shape \(6,\), got \(5,\)"),
        ({"bias": None}, TypeError, r"bias must be a torch.Tensor, got NoneType"),
        ({"scale": torch.zeros(3, 6)}, ValueError, r"scale must have shape \(2, 6\).*got \(3, 6\)"),
        ({"shift": torch.zeros(6)}, ValueError, r"shift must have shape \(2, 6\).*got \(6,\)"),
        ({"activation": "relu"}, ValueError, r"accepted: None, 'silu'"),
        ({"eps": "1"}, TypeError, r"eps must be a number, got '1'"),
        ({"out_dtype": torch.int8}, TypeError, r"out_dtype must be one of"),
        ({"backend": "cpu"}, NotImplementedError, r"does not have group_norm_silu"),
        ({"backend": "gpu"}, ValueError, r"unknown backend 'gpu'"),
        ({"weight": torch.zeros(6, device="meta")}, ValueError, r"on one device"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_named(
    changes: dict[str, Any], error: type[Exception], match: str
) -> None:
    arguments = {
        "x": torch.zeros(2, 6, 4, 4),
        "num_groups": 3,
        "weight": torch.ones(6),
        "bias": torch.zeros(6),
    } | changes
    with pytest.raises(error, match=match):
        dk.group_norm_silu(**arguments)
