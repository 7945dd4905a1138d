"""A double of CuPy on CPU memory, whose kernels are those of the shim."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dsno_kernels.backends import _nvrtc, _transforms
from dsno_kernels.backends import cupy as backend
from dsno_kernels.backends._transforms import Plan
from tests import shim


class Array:
    """A cupy.ndarray on CPU memory."""

    def __init__(self, tensor: Tensor, device: int = 0) -> None:
        self.tensor, self.device = tensor, SimpleNamespace(id=device)
        name = str(tensor.dtype).removeprefix("torch.")
        self.dtype = SimpleNamespace(name=name, itemsize=tensor.element_size())
        self.strides = tuple(stride * tensor.element_size() for stride in tensor.stride())
        self.shape, self.data = tuple(tensor.shape), SimpleNamespace(ptr=tensor.data_ptr())

    def __eq__(self, other: object) -> Array:  # type: ignore[override]
        return Array(self.tensor == (other.tensor if isinstance(other, Array) else other))

    __hash__ = None  # type: ignore[assignment]

    def __add__(self, other: float) -> Array:
        return Array(self.tensor + other)

    def __iadd__(self, other: float) -> Array:
        self.tensor += other
        return self

    def __setitem__(self, key: Any, value: float) -> None:
        self.tensor[key] = value

    def all(self) -> bool:
        return bool(self.tensor.all())

    def fill(self, value: float) -> None:
        self.tensor.fill_(value)

    def get(self) -> Any:
        return self.tensor.numpy()

    def transpose(self, *axes: int) -> Array:
        return Array(self.tensor.permute(axes))

    def __getitem__(self, key: Any) -> Array:
        if key != slice(None, None, -1):
            return Array(self.tensor[key])
        reverse = Array(self.tensor)  # a tensor has no negative strides
        reverse.strides = (-self.strides[0], *self.strides[1:])
        return reverse

    def __dlpack__(self, stream: int | None = None) -> Any:
        assert stream == -1  # one stream on both sides: CuPy must not wait
        return self.tensor.__dlpack__()


class Cupy(ModuleType):
    """As much of the module `cupy` as dsno_kernels uses, with what it was asked to do."""

    ndarray = Array
    complex64 = SimpleNamespace(name="complex64", itemsize=8)
    float32 = np.float32

    def __init__(self) -> None:
        super().__init__("cupy")
        self.__version__ = "14.2.0"
        self.device, self.stream = 0, 0x1230
        self.torch_device = 0  # PyTorch's current device
        self.used: list[tuple[str, Any]] = []  # PyTorch's devices and streams
        self.launches: list[tuple[int, int]] = []  # device and stream
        self.cuda = SimpleNamespace(
            Device=self.Device,
            Stream=self._stream_class(),
            get_current_stream=lambda: self.cuda.Stream(ptr=self.stream),
            function=SimpleNamespace(Module=lambda: Module(self)),
            runtime=SimpleNamespace(driverGetVersion=lambda: 13000),
        )

    def Device(self, index: int | None = None) -> Any:
        @contextlib.contextmanager
        def current() -> Iterator[None]:
            before, self.device = self.device, index or 0
            yield
            self.device = before

        device = current()
        device.id = self.device  # type: ignore[attr-defined]
        device.synchronize = lambda: None  # type: ignore[attr-defined]
        return device

    def _stream_class(self) -> Any:
        double = self

        class Stream:
            null: Any
            ptds: Any

            def __init__(self, non_blocking: bool = False, ptr: int = 0x4560) -> None:
                self.ptr = ptr

            def __enter__(self) -> None:
                self.before, double.stream = double.stream, self.ptr

            def __exit__(self, *_: object) -> None:
                double.stream = self.before

            def synchronize(self) -> None:
                pass

        Stream.null, Stream.ptds = Stream(ptr=0), Stream(ptr=2)
        return Stream

    def asarray(self, values: Any) -> Array:
        return Array(torch.from_numpy(values), self.device)

    def zeros(self, shape: Any, dtype: Any = np.float64) -> Array:
        return self.asarray(np.zeros(shape, dtype))

    def ones(self, shape: Any, dtype: Any = np.float64) -> Array:
        return self.asarray(np.ones(shape, dtype))

    def asfortranarray(self, array: Array) -> Array:
        backwards = range(len(array.shape))[::-1]
        return Array(array.tensor.permute(*backwards).contiguous().permute(*backwards))

    def from_dlpack(self, exporter: Any) -> Array:
        assert exporter.__dlpack_device__()[0] == 1  # of the CPU, where the double keeps its memory
        capsule = exporter.__dlpack__(stream=self.stream, max_version=(1, 0))
        return Array(torch.utils.dlpack.from_dlpack(capsule), self.torch_device)


class Module:
    """A loaded module whose kernels are those of the shim."""

    launch: Any = None

    def __init__(self, cupy: Cupy) -> None:
        self.cupy = cupy

    def load(self, code: bytes) -> None:
        assert code == b"device code of truncated_fft.cuh for sm_90"

    def get_function(self, name: str) -> Any:
        def function(
            grid: tuple[int], block: tuple[int], args: tuple[Any], shared: int, stream: Any
        ) -> None:
            assert block == (_transforms.THREADS,) and shared == 0
            (params,) = args
            assert params.shape == (1,)  # CuPy passes arrays of one element by value
            source, target, table, *numbers = np.frombuffer(params.tobytes(), np.int64).tolist()
            self.cupy.launches.append((self.cupy.device, stream.ptr))
            pointers = (SimpleNamespace(data_ptr=lambda p=p: p) for p in (source, target, table))
            Module.launch(Plan(name, grid[0], tuple(numbers)), *pointers)

        return function


@contextlib.contextmanager
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cupy]:
    """The double as `import cupy` finds it; PyTorch's devices and streams write into `used`."""
    double = Cupy()

    @contextlib.contextmanager
    def device(value: torch.device) -> Iterator[None]:
        double.used.append(("device", value))
        before, double.torch_device = double.torch_device, value.index
        yield
        double.torch_device = before

    @contextlib.contextmanager
    def stream(value: Any) -> Iterator[None]:
        double.used.append(("stream", value))
        yield

    monkeypatch.setitem(sys.modules, "cupy", double)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: ("default", device.index))
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda ptr, device: (ptr, device.index))
    yield double
    for cache in (backend._module, backend._function, backend._warn_once):
        cache.cache_clear()


def compile_on_the_shim(monkeypatch: pytest.MonkeyPatch, folders: pytest.TempPathFactory) -> None:
    """NVRTC that names what it compiles, for a GPU of capability 9.0."""
    if Module.launch is None:
        Module.launch = staticmethod(shim.plain_launch(folders.mktemp("shim")))
    binding = SimpleNamespace(getVersion=lambda: (13, 0), getSupportedArchs=lambda: [80, 90])
    monkeypatch.setattr(_nvrtc, "nvrtc", lambda: (binding, None))
    monkeypatch.setattr(
        _nvrtc, "compiled", lambda source, arch: f"device code of {source} for {arch}".encode()
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(backend, "raw_stream", lambda device: 0xABC)
