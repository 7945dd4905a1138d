"""EDM's Heun sampler around a raw network: two fused passes a step, preconditioning included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import dsno_kernels as dk
from benchmarks.bench_denoising import HEUN_STEPS, edm_sampler, heun_plan, network
from dsno_kernels.backends import cpu
from tests.helpers import FLOAT64, assert_close

SHAPE = (2, 3, 4, 5)


def raw(x: Tensor, t: Tensor) -> Tensor:
    return network(x, t.log() / 4)


def test_it_is_edms_own_sampler() -> None:
    plan = heun_plan()
    x = 80 * torch.randn(SHAPE, dtype=torch.float64)
    assert_close(dk.diffusion.sample(raw, x, plan), edm_sampler(x, plan.grid, x.dtype), FLOAT64)


def test_a_step_is_two_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass of the kernel for each call of the network, and one before the first, which scales
    its input. Nothing else of the size of the state runs.
    """
    passes: list[str] = []
    for name in ("solver_step", "exp_step"):
        original = getattr(cpu, name)

        def counted(*args: Any, name: str = name, original: Any = original, **given: Any) -> Any:
            passes.append(name)
            return original(*args, **given)

        monkeypatch.setattr(cpu, name, counted)
    calls: list[Tensor] = []
    x, output = 80 * torch.randn(SHAPE), torch.randn(SHAPE)

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        calls.append(x)
        return output

    with torch.no_grad(), Launches(x.numel()) as launches:
        dk.diffusion.sample(denoiser, x, heun_plan(), check_finite=False)
    assert len(calls) == 2 * HEUN_STEPS - 1
    assert passes == ["solver_step"] * (len(calls) + 1)
    assert not launches.names


class Launches(torch.utils._python_dispatch.TorchDispatchMode):
    """Operators of PyTorch that read or write elements of tensors as large as the state."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.names = size, list[str]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        ours = func.namespace == "dsno_kernels"
        made = result if isinstance(result, (tuple, list)) else (result,)
        large = any(isinstance(t, Tensor) and t.numel() == self.size for t in made)
        moves = func.name() not in ("aten::empty_strided", "aten::empty_like", "aten::empty")
        if large and moves and not ours and not func.is_view:
            self.names.append(func.name())
        return result
