"""The compiled extension: addresses, sizes, strides in elements, and a stream (`cudaStream_t`).

The tuple of a tensor is (address, dtype, stride_b, stride_t, stride_c, stride_p).
"""

from collections.abc import Sequence

build_info: str
cuda_version: str
cuda_archs: str
cpu_api: int
cuda_api: int

def cpu_spectral_conv(
    sizes: tuple[int, ...],
    x: tuple[int, ...],
    y: tuple[int, ...],
    residual: tuple[int, ...],
    weight: tuple[int, ...],
    bias: int,
    x_positive: int,
    positive: int,
    x_slope: float,
    negative_slope: float,
    activation: bool,
    adjoint: bool,
    precision: int,
    threads: int,
    /,
) -> None: ...
def cpu_spectral_conv_weight_grad(
    sizes: tuple[int, ...],
    x: tuple[int, ...],
    grad: tuple[int, ...],
    out: int,
    grad_positive: int,
    negative_slope: float,
    precision: int,
    threads: int,
    /,
) -> None: ...
def cpu_spectral_conv_backward(
    sizes: tuple[int, ...],
    x: tuple[int, ...],
    grad: tuple[int, ...],
    weight: tuple[int, ...],
    grad_x: tuple[int, ...],
    out: int,
    grad_positive: int,
    negative_slope: float,
    precision: int,
    threads: int,
    /,
) -> None: ...
def cpu_truncated_rfft(
    sizes: tuple[int, ...],
    x: tuple[int, ...],
    spectrum: int,
    strides: tuple[int, ...],
    threads: int,
    /,
) -> None: ...
def cpu_truncated_irfft(
    sizes: tuple[int, ...],
    x: tuple[int, ...],
    spectrum: int,
    strides: tuple[int, ...],
    threads: int,
    /,
) -> None: ...
def cpu_isas() -> list[str]: ...
def cpu_isa() -> str: ...
def cpu_set_isa(name: str, /) -> None: ...
def cuda_driver_version() -> int: ...
def cuda_truncated_fft_kernels() -> list[str]: ...
def cuda_truncated_fft(
    kernel: int,
    grid: int,
    input: int,
    output: int,
    table: int,
    numbers: Sequence[int],
    stream: int,
) -> None: ...
def cuda_step_kernels() -> list[str]: ...
def cuda_step(kernel: int, grid: int, params: bytes, stream: int, /) -> None: ...
def cpu_exp_step(
    samples: int,
    size: int,
    terms: tuple[int, ...],
    out: tuple[int, ...],
    rows: tuple[int, ...],
    row: tuple[float, ...],
    threads: int,
    /,
) -> None: ...
def cpu_exp_step_backward(
    samples: int,
    size: int,
    g: tuple[int, ...],
    terms: tuple[int, ...],
    grads: tuple[int, ...],
    rows: tuple[int, ...],
    row: tuple[float, ...],
    dots: int,
    threads: int,
    /,
) -> None: ...
def cpu_solver_step(
    samples: int,
    size: int,
    order: int,
    inputs: tuple[int, ...],
    history: tuple[int, ...],
    outputs: tuple[int, ...],
    rows: tuple[int, ...],
    row: tuple[float, ...],
    guidance_rows: tuple[int, ...],
    guidance: float,
    scale: int,
    low: float,
    high: float,
    seed: int,
    looks_ahead: bool,
    threads: int,
    /,
) -> None: ...
def cpu_abs_rank(
    samples: int, size: int, rank: int, x: tuple[int, ...], indices: int, threads: int, /
) -> None: ...
def cpu_noised(
    samples: int,
    size: int,
    tensors: tuple[int, ...],
    seeds: int,
    coefficients: tuple[float | tuple[int, int, int], ...],
    threads: int,
    /,
) -> None: ...
def cpu_denoising_loss(
    samples: int,
    size: int,
    tensors: tuple[int, ...],
    seeds: int,
    coefficients: tuple[float | tuple[int, int, int], ...],
    ceiling: float,
    mean: bool,
    loss: int,
    threads: int,
    /,
) -> None: ...
