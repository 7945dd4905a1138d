"""The compiled extension. Pointers are addresses, strides count elements, the stream is a `cudaStream_t`."""

from collections.abc import Sequence

build_info: str
cuda_version: str
cuda_archs: str

def cuda_driver_version() -> int: ...
def cuda_truncated_fft_kernels() -> list[str]: ...
def cuda_truncated_fft(
    kernel: int, grid: int, input: int, output: int, table: int, numbers: Sequence[int], stream: int
) -> None: ...
