"""The short way to a compiled kernel, with a double in the place of Triton's; and launch counts.

A first call of a plan goes through Triton with every argument by name; the double that it returns
records what later calls pass by position. Both must say the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from triton import knobs

from dsno_kernels.backends import _launch
from dsno_kernels.backends import triton as backend
from dsno_kernels.backends.triton import configs, launch

AXES = {"time_dim": 1, "channel_dim": 2}
STREAM = 7
HOOKS = (None, None, None)  # of a launch that nobody observes


class Triton37:
    """A launcher with the parameters of Triton 3.7; notes what follows the hooks."""

    def __init__(self, calls: list[tuple[Any, ...]]) -> None:
        self.calls = calls

    def __call__(
        self, gridX, gridY, gridZ, stream, function, kernel_metadata, launch_metadata,
        launch_enter_hook, launch_exit_hook, *args,
    ) -> None:  # type: ignore[no-untyped-def]  # fmt: skip
        assert (gridY, gridZ, stream) == (1, 1, STREAM)
        assert (function, kernel_metadata) == ("function", "metadata")
        assert (launch_metadata, launch_enter_hook, launch_exit_hook) == HOOKS
        self.calls.append((gridX, *args))


class Triton36(Triton37):
    """A launcher with the parameters of Triton 3.6."""

    def __call__(self, gridX, gridY, gridZ, stream, function, *args) -> None:  # type: ignore[no-untyped-def,override]
        super().__call__(gridX, gridY, gridZ, stream, function, *args)


class Unknown(Triton37):
    """A launcher that expects something else."""

    def __call__(self, grid, stream, args) -> None:  # type: ignore[no-untyped-def,override]
        raise AssertionError("must not be called")


class Compiled:
    """What Triton returns from a launch."""

    function, packed_metadata = "function", "metadata"

    def __init__(self, run: Triton37) -> None:
        self.run = run


class Record:
    """Launches through Triton, by name, and launches of compiled kernels, by position."""

    def __init__(self, launcher: type[Triton37]) -> None:
        self.named: list[tuple[Any, int, dict[str, Any]]] = []
        self.direct: list[tuple[Any, ...]] = []
        self.launcher = launcher

    def submit(
        self, kernel: Any, programs: int, config: Any, device: torch.device, /, **arguments: Any
    ) -> Compiled:
        self.named.append((kernel, programs, arguments))
        return Compiled(self.launcher(self.direct))

    def take(self) -> tuple[int, int]:
        """The numbers of launches of each kind since the last call."""
        counts = len(self.named), len(self.direct)
        self.named.clear()
        self.direct.clear()
        return counts


@contextlib.contextmanager
def doubled(launcher: type[Triton37] = Triton37, multiprocessors: int = 132) -> Iterator[Record]:
    """In the place of Triton and the GPU; a table of its own, so plans of its own."""
    record = Record(launcher)
    table = dataclasses.replace(configs.ARCHITECTURES[9, 0], multiprocessors=multiprocessors)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "submit", record.submit)
        patch.setattr(launch, "architecture", lambda device: table)
        patch.setattr(_launch, "raw_stream", lambda device: STREAM)
        yield record


def by_position(kernel: Any, programs: int, arguments: dict[str, Any]) -> tuple[Any, ...]:
    """A launch by name as its launcher should see it: pointers as integers, the kernel's order."""
    assert list(arguments) and set(arguments) == set(kernel.arg_names)
    values = (arguments[name] for name in kernel.arg_names)
    return programs, *(v.data_ptr() if isinstance(v, Tensor) else v for v in values)


def problem(T: int = 4, pixels: int = 64, I: int = 32, O: int = 48) -> dict[str, Tensor]:
    x, y = torch.randn(2, T, I, pixels), torch.randn(2, T, O, pixels)
    bits = torch.zeros(2, T, O, -(-pixels // 8), dtype=torch.uint8)
    weight, bias = torch.randn(I, O, 2, 2), torch.randn(O)
    return {"x": x, "y": y, "bits": bits, "weight": weight, "bias": bias}


def forward(p: dict[str, Tensor], **options: Any) -> None:
    given = {"n": p["x"].shape[1], "bias": p["bias"], "residual": p["y"], "negative_slope": 0.1}
    backend.spectral_conv(
        p["x"], p["weight"], **AXES, **(given | {"save_positive": True} | options)
    )


def backward_input(p: dict[str, Tensor]) -> None:
    backend.spectral_conv(
        p["y"], p["weight"], n=p["x"].shape[1], adjoint=True, x_positive=p["bits"],
        negative_slope=0.1, **AXES,
    )  # fmt: skip


def backward_weight(p: dict[str, Tensor]) -> None:
    backend.spectral_conv_weight_grad(p["x"], p["y"], 2, grad_positive=p["bits"], **AXES)


def transforms(p: dict[str, Tensor]) -> None:
    pairs = backend.truncated_rfft(p["x"], 2, dim=1)
    backend.truncated_irfft(pairs, 4, dim=1)


OPS = {f.__name__: f for f in (forward, backward_input, backward_weight, transforms)}


@pytest.mark.parametrize("launcher", [Triton36, Triton37])
@pytest.mark.parametrize("multiprocessors", [1, 132], ids=["packed", "direct"])
@pytest.mark.parametrize("T", [4, 9])
@pytest.mark.parametrize("op", OPS)
def test_a_warm_call_passes_what_triton_would(
    op: str,
    T: int,
    multiprocessors: int,
    launcher: type[Triton37],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with doubled(launcher, multiprocessors) as record:
        OPS[op](problem(T))
        record.take()
        again = problem(T)
        OPS[op](again)
        direct = list(record.direct)
        assert direct and not record.named
        # The same call through Triton, with the memory that the allocator gave the warm one.
        monkeypatch.setattr(launch, "_observed", lambda kernel: True)
        inputs = {tensor.data_ptr() for tensor in again.values()}
        OPS[op](again)
        expected = [by_position(*one) for one in record.named]
    assert len(expected) == len(direct)
    for wanted, got, (kernel, _, arguments) in zip(expected, direct, record.named, strict=True):
        assert len(wanted) == len(got)
        names = ["programs", *kernel.arg_names]
        for name, w, g in zip(names, wanted, got, strict=True):
            if isinstance(arguments.get(name), Tensor) and w not in inputs:
                continue  # an output or workspace: a new one in each call
            assert type(w) is type(g) and w == g, name


def shifted(tensor: Tensor) -> Tensor:
    """The same values and strides, four bytes off an alignment of 16."""
    return torch.empty(tensor.numel() + 1).as_strided(tensor.shape, tensor.stride(), 1)


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.transpose(2, 3).contiguous().transpose(2, 3)


# What the code of a kernel, or an argument that it is launched with, depends on.
CHANGES: dict[str, Callable[[dict[str, Tensor]], None]] = {
    "alignment_of_x": lambda p: forward(p | {"x": shifted(p["x"])}),
    "alignment_of_weight": lambda p: forward(p | {"weight": shifted(p["weight"])}),
    "alignment_of_bias": lambda p: forward(p | {"bias": shifted(p["bias"])}),
    "alignment_of_residual": lambda p: forward(p | {"y": shifted(p["y"])}),
    "stride_of_one": lambda p: forward(p | {"x": channels_last(p["x"])}),
    "strides_of_weight": lambda p: forward(p | {"weight": p["weight"].mT.contiguous().mT}),
    "pixels_no_multiple_of_16": lambda p: forward(problem(pixels=63)),
    "one_channel": lambda p: forward(problem(I=1)),
    "no_bias": lambda p: forward(p, bias=None),
    "no_residual": lambda p: forward(p, residual=None),
    "no_sign_bits": lambda p: forward(p, save_positive=False),
    "dtype_of_x": lambda p: forward(p | {"x": p["x"].half()}),
    "dtype_of_weight": lambda p: forward(p | {"weight": p["weight"].half()}),
    "dtype_of_bias": lambda p: forward(p | {"bias": p["bias"].half()}),
    "dtype_of_y": lambda p: forward(p, out_dtype=torch.float16),
    "slope": lambda p: forward(p, negative_slope=0.2),
    "activation": lambda p: forward(p, negative_slope=None),
    "length": lambda p: forward(p, n=3, residual=None),
    "precision": lambda p: forward(p, precision="tf32"),
    "length_of_x": lambda p: forward(problem(T=3)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_the_kernel_or_its_arguments_goes_through_triton_once(change: str) -> None:
    with doubled() as record:
        p = problem()
        forward(p)
        forward(p)
        named, direct = record.take()
        assert named == direct
        CHANGES[change](p)
        assert record.take()[0] > 0
        CHANGES[change](p)
        assert record.take()[0] == 0
        forward(p)
        assert record.take()[0] == 0


def test_another_table_is_another_plan() -> None:
    p = problem()
    for _ in range(2):
        with doubled() as record:
            forward(p)
            assert record.take()[0] > 0


def test_a_table_lives_as_long_as_its_plans() -> None:
    """So that no other table takes its place, and its plans."""
    with doubled() as record:
        forward(problem())
        table = weakref.ref(launch.architecture(torch.device("cpu")))
        assert record.take()[0] > 0
    gc.collect()
    assert table() is not None and table() != dataclasses.replace(table())


def test_a_launcher_with_other_parameters_stays_on_tritons_path() -> None:
    with doubled(Unknown) as record:
        for _ in range(2):
            forward(problem())
            assert record.take()[0] > 0


def test_the_installed_triton_has_a_launcher_that_is_known() -> None:
    from triton.backends.nvidia.driver import CudaLauncher

    assert launch.known_launcher(CudaLauncher.__call__)


def test_a_profiler_sees_every_launch() -> None:
    def hook(metadata: object) -> None:
        pass

    with doubled() as record:
        for _ in range(2):
            forward(problem())
        record.take()
        knobs.runtime.launch_enter_hook.add(hook)
        try:
            forward(problem())
            named, direct = record.take()
            assert named > 0 and direct == 0
        finally:
            knobs.runtime.launch_enter_hook.remove(hook)
        forward(problem())
        named, direct = record.take()
        assert named == 0 and direct > 0


def test_launches_on_the_device_of_the_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []

    def on_device(device: torch.device) -> contextlib.AbstractContextManager[None]:
        asked.append(device)
        return contextlib.nullcontext()

    with doubled() as record:
        forward(problem())
        record.take()
        monkeypatch.setattr(_launch, "on_device", on_device)
        forward(problem())
        assert asked == [torch.device("cpu")] * record.take()[1]


def test_strides_of_axes_of_one_element_do_not_matter() -> None:
    axes = launch.axes_of(((1, 4, 1, 9), (5, 9, 7, 1), torch.float32), 1, 2)[0]
    assert launch.named_strides("x", axes) == {
        "stride_xb": 0, "stride_xt": 9, "stride_xc": 0, "stride_xp": 1,
    }  # fmt: skip
