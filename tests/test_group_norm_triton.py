"""The Triton kernels of `group_norm_silu` without a GPU: interpreted in a process of their own, and
compiled for the GPUs they are meant for.
"""

from __future__ import annotations

import concurrent.futures
import functools
import multiprocessing
import os
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

from dsno_kernels.backends import triton as backend
from dsno_kernels.backends.triton import configs, group_norm, launch
from tests import interpreter, triton_aot
from tests.test_triton_aot import SHARED
from tests.test_triton_launch import by_position, doubled
from tests.triton_aot import Launch

# Channels, side and groups: CIFAR-10 and ImageNet-64 (both also with a skip beside), the smallest
# group, and one of odd sizes, whose addresses are not aligned.
SHAPES = ((256, 32, 32), (512, 32, 32), (192, 64, 32), (576, 64, 32), (1536, 8, 32), (7, 5, 7))


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def calls() -> Iterator[Callable[[], object]]:
    for C, side, groups in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            x = meta(8, 4, C, side, side, dtype=dtype)
            modulation = meta(1, 4, C, dtype=dtype).expand(8, -1, -1)
            last = x.movedim(2, -1).contiguous().movedim(-1, 2)
            yield functools.partial(both_passes, x, groups, modulation, True)
            yield functools.partial(both_passes, last, groups, modulation, True)
    x = meta(8, 4, 256, 32, 32, dtype=torch.float16)
    yield functools.partial(both_passes, x, 32, None, True)
    yield functools.partial(both_passes, x.float(), 32, None, False)
    yield functools.partial(both_passes, meta(1, 1, 4, 2**16, 2**15), 2, None, True)


def both_passes(x: Tensor, groups: int, modulation: Tensor | None, silu: bool) -> None:
    weight, statistics = meta(x.shape[2]), meta(*x.shape[:2], groups)
    options = {"scale": modulation, "shift": modulation, "silu": silu}
    backend.group_norm_silu(x, groups, weight, weight, **options)
    backend.group_norm_silu_backward(x, x, statistics, statistics, weight, weight, **options)


def test_every_kernel_in_the_interpreter() -> None:
    interpreter.run_tests("tests/group_norm_interpreted.py")


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 86, 90])
def test_every_launch_compiles_without_spills(capability: int) -> None:
    table = configs.ARCHITECTURES[divmod(capability, 10)]
    found: dict[Launch, None] = {}
    for call in calls():
        found |= dict.fromkeys(triton_aot.launches_of(table, capability, call))
    assert len(found) > 4 * len(SHAPES)
    with concurrent.futures.ProcessPoolExecutor(
        2, mp_context=multiprocessing.get_context("spawn")
    ) as pool:
        reports = list(pool.map(triton_aot.compile_launch, found))
    wrong = [
        f"{one.kernel} {dict(one.constants)} {one.num_warps} warps: {report}"
        for one, report in zip(found, reports, strict=True)
        if report.stack or report.shared > SHARED[capability]
    ]
    assert not wrong, "\n".join(wrong)
    narrow = {
        (one.kernel, dict(one.constants).get("WIDE"))
        for one, report in zip(found, reports, strict=True)
        if report.narrow_addresses
    }
    kernels = {one.kernel for one in found if "WIDE" in dict(one.constants)}
    assert narrow == {(kernel, False) for kernel in kernels}  # inside groups of fewer than 2^31


def test_groups_of_cifar_stay_on_chip() -> None:
    """So x is read once; of ImageNet-64, those at 64 x 64 are walked."""
    for channels, pixels in ((8, 1024), (16, 1024), (16, 64)):
        assert group_norm.tile_of(channels, pixels).whole
    assert not group_norm.tile_of(6, 4096).whole


def test_warm_calls_of_one_plan_launch_directly() -> None:
    """The launch record is that of test_triton_launch.py: a first call goes by name, later ones by
    position; another epilogue or memory order is another plan.
    """
    x, ones = torch.randn(2, 4, 8, 3, 5), torch.ones(8)
    scale = torch.randn(2, 4, 8)
    last = x.movedim(2, -1).contiguous().movedim(-1, 2)
    calls: list[Callable[[], object]] = [
        lambda: both_on_cpu(x, ones, None),
        lambda: both_on_cpu(x, ones, scale),
        lambda: both_on_cpu(x, ones, scale.mT.contiguous().mT),
        lambda: both_on_cpu(x, ones.half(), None),
        lambda: both_on_cpu(x.half(), ones, None),
        lambda: both_on_cpu(last, ones, None),
        lambda: both_on_cpu(x, ones, None, silu=False),
        lambda: both_on_cpu(x, ones, None, groups=4),
    ]
    group_norm.plan_forward.cache_clear()
    group_norm.plan_backward.cache_clear()
    with doubled() as record:
        for call in calls:
            call()
            assert record.take() == (3, 0)
        for call in calls:
            call()
            assert record.take() == (0, 3)
        # The direct launches pass what launches by name would, but for the outputs' addresses.
        both_on_cpu(x, ones, scale)
        direct = list(record.direct)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(launch, "_observed", lambda kernel: True)
            both_on_cpu(x, ones, scale)
        named = [by_position(*one) for one in record.named]
        for (kernel, *_), wanted, got in zip(record.named, named, direct, strict=True):
            places = [0, *(i for i, name in enumerate(kernel.arg_names, 1) if "_ptr" not in name)]
            assert [wanted[i] for i in places] == [got[i] for i in places]
            assert len(wanted) == len(got)


def both_on_cpu(
    x: Tensor, weight: Tensor, scale: Tensor | None, silu: bool = True, groups: int = 2
) -> None:
    _, mean, rstd = backend.group_norm_silu(x, groups, weight, weight, scale=scale, silu=silu)
    backend.group_norm_silu_backward(x, x, mean, rstd, weight, weight, scale=scale, silu=silu)
