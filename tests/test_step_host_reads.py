"""No step reads a device tensor on the host, nor copies numbers there: either would wait for the
device, and neither can be captured in a CUDA graph. Tensors on "meta" stand for those of a device.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import dsno_kernels as dk
from dsno_kernels.backends import reference_steps
from dsno_kernels.backends._solver_step import Memory, Step

SHAPE = (3, 5)


class OnTheDevice(TorchDispatchMode):
    """Fails where a number of a tensor is asked for, or tensors of the host take part."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert op is not torch.ops.aten._local_scalar_dense.default
        for x in tree_flatten((args, kwargs))[0]:
            on_host = isinstance(x, Tensor) and x.device.type == "cpu"
            assert not on_host or x.ndim == 0, f"{op} takes a tensor of the host"
        return op(*args, **kwargs or {})


@pytest.fixture(autouse=True)
def no_numbers_from_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Any, **options: Any) -> Tensor:
        raise AssertionError("torch.tensor copies from the host")

    monkeypatch.setattr(torch, "tensor", refused)


def empty(*shape: int, grad: bool = False) -> Tensor:
    return torch.empty(shape, device="meta", requires_grad=grad)


def integers(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64, device="meta")


INDICES = {"none": None, "scalar": (), "per_sample": SHAPE[:1]}


@pytest.mark.parametrize("index", INDICES)
def test_the_reference(index: str) -> None:
    K, sizes = 3, INDICES[index]
    rows = {"index": None if sizes is None else integers(*sizes)}
    table = empty(12) if sizes is None else empty(7, 12)
    ring, x, m = empty(3, *SHAPE), empty(*SHAPE), empty(*SHAPE)
    with OnTheDevice():
        columns = table[..., : 2 + len(ring)]
        step = {"coefficients": columns, "values": [], **rows}
        reference_steps.exp_step([x, m, *ring], head=integers(), ring=3, **step)
        reference_steps.exp_step_backward(
            x, [x, m], columns=[0, 1], dtypes=[x.dtype] * 2, per_sample=False, **step
        )
        for head in (None, integers()):
            solver = Step(
                x, m, unconditional=m, base=x, history=list(ring)[: K - 1], head=head,
                seed=integers(2), table=table, guidance=empty(), low=-1.0, high=1.0,
                looks_ahead=True, **rows,
            )  # fmt: skip
            memory = Memory(ring=ring, slot=1)
            found = reference_steps.solver_step(solver, [x.dtype] * 4, memory)
        assert all(new is not None and new.is_meta for new in found)
        assert reference_steps.abs_rank(x, 2).shape == (3, 2)


@pytest.mark.parametrize("index", INDICES)
def test_gradients_of_every_order(index: str) -> None:
    sizes = INDICES[index]
    rows = {"index": None if sizes is None else integers(*sizes)}
    shape = (12,) if sizes is None else (7, 12)
    table, x, m = empty(*shape, grad=True), empty(*SHAPE, grad=True), empty(*SHAPE, grad=True)
    ring = empty(3, *SHAPE)
    with OnTheDevice():
        coefficients: Any = table[..., :4] * 1
        y = dk.exp_step(x, ring, coefficients, head=integers(), **rows)
        if sizes is None:
            y = y + dk.exp_step(m, ring, [1.0, 2.0, 3.0, 4.0], head=integers())
        step = dk.solver_step(
            x, m, table, ring, head=integers(), looks_ahead=True, input_dtype=x.dtype,
            seed=integers(2), threshold=(0.9, 1.0, "dpm_solver"), **rows,
        )  # fmt: skip
        loss = y.sum() + step.point.sum() + step.model_input.sum()
        grads = torch.autograd.grad(loss, (table, x, m), create_graph=True)
        again = torch.autograd.grad(sum(g.square().sum() for g in grads), (table, x))
    assert all(g.is_meta for g in again)
