"""How long a launch should take: a roofline model that ranks tiles before anything is timed.

A launch is `programs` equal programs; each runs `steps` steps that load operands from L2, round
them and multiply, and then stores its tile. With SM the multiprocessors of the GPU, q the programs
that run at once on one of them, and n the programs that the busiest of them has to run (which is
the quantization into waves),

    time = max(DRAM bytes / DRAM rate, n * program)
    program = max(L2 bytes / L2 rate, flop / product rate, operations / ALU rate, alone / min(q, n))
    alone = latency + steps * max(load, compute, latency / (stages - 1)) + store
    compute = products + operations + barrier

with the rates of one multiprocessor. Alone on its multiprocessor a program waits for memory and
stores without multiplying; q programs hide that from each other. The model leaves out shared memory
conflicts, instruction scheduling, the epilogue's arithmetic and what real bins save
(`Architecture.real_bins`): it orders candidates, no more.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from benchmarks.shapes import Shape, find
from dsno_kernels.backends.triton.configs import Config, RowKey
from dsno_kernels.backends.triton.launch import block, cdiv
from dsno_kernels.backends.triton.weight_grad import split_rows

REGISTERS = 65536  # of a multiprocessor; 255 is the most a thread can have
SHARED_RESERVED = 1024  # bytes of shared memory the system takes for each program
LATENCY = 0.8e-6  # seconds; a load from DRAM on a busy GPU (assumed)
BARRIER = 0.05e-6  # seconds; the threads of a program meet in every step (assumed)
# Instructions that round one number to the operands of a method, counted in arithmetic.py.
ROUNDING = {"ieee": 0, "tf32": 4, "tf32x3": 9, "bf16": 1, "bf16x3": 4}


class Gpu(NamedTuple):
    """Rates of a whole GPU, and what one multiprocessor holds."""

    multiprocessors: int
    shared: int  # bytes that one program may use
    shared_total: int  # bytes of a multiprocessor
    threads: int  # of a multiprocessor
    dram: float  # bytes/s
    l2: float  # bytes/s
    rates: dict[str, float]  # flop/s of one product by operand: bf16, tf32, ieee


# Sizes: CUDA programming guide, table of compute capabilities. DRAM and products: measured copy and
# matrix product rates of an H200; data sheets of the A100 80GB and the RTX A6000. L2: assumed.
GPUS = {
    (8, 0): Gpu(
        108, 166_912, 167_936, 2048, 1.9e12, 4.0e12, {"bf16": 312e12, "tf32": 156e12, "ieee": 19e12}
    ),
    (8, 6): Gpu(
        84, 101_376, 102_400, 1536, 0.77e12, 1.5e12, {"bf16": 155e12, "tf32": 77e12, "ieee": 39e12}
    ),
    (9, 0): Gpu(
        132, 232_448, 233_472, 2048, 4.3e12, 5.5e12, {"bf16": 790e12, "tf32": 390e12, "ieee": 67e12}
    ),
}


class Usage(NamedTuple):
    """What a program uses: registers a thread, bytes of shared memory; whether it loads ahead."""

    registers: int
    shared: int
    pipelined: bool


class Work(NamedTuple):
    """What a launch has to do."""

    programs: int
    steps: int
    load: float  # bytes a step loads
    flop: float  # of the products of a step
    operations: float  # other arithmetic instructions of a step
    store: float  # bytes a program stores
    dram: float  # bytes the launch must move
    kept: int  # float32 numbers a program holds from step to step
    loaded: int  # numbers a step holds


def shapes_of(key: RowKey) -> tuple[Shape, ...]:
    """The representative shapes of a row, of those in benchmarks/shapes.py."""
    kernel, _, kind = key
    narrow = kind.endswith("narrow")
    if kernel.startswith("truncated"):
        return _named("fno_k32", "fno_k64")
    if kernel in ("spectral_conv_mix", "spectral_conv_weight_grad_planes"):
        small = _named("t16_16_c64_k8", "t64_16_c128_k16")
        large = _named("t16_32_c256_k8", "t64_32_c256_k16")
        return small if narrow else large if kernel == "spectral_conv_mix" else large + small
    large = _named("cifar_b32_32", "imagenet_b8_64", "imagenet_b32_16")
    small = _named("cifar_b32_16", "cifar_b32_8", "imagenet_b8_8")
    chosen = small if narrow else large if kernel == "spectral_conv" else large + small
    if kind.startswith("4"):
        return tuple(replace(shape, name=f"{shape.name} K=3", modes=3) for shape in chosen)
    if kind.startswith("8"):
        return tuple(
            replace(shape, name=f"{shape.name} T=8 K=5", modes=5, size=_longer(shape.size))
            for shape in chosen
        )
    return chosen


def _named(*names: str) -> tuple[Shape, ...]:
    return tuple(shape for name in names if (shape := find(name)) is not None)


def _longer(size: tuple[int, ...]) -> tuple[int, ...]:
    """Eight times instead of four, in half the batch."""
    return (size[0] // 2, 8, *size[2:])


def itemsize(method: str) -> int:
    """Bytes of an element of x and y: bfloat16 products are mostly used on bfloat16 tensors."""
    return 2 if method == "bf16" else 4


def work_of(key: RowKey, tile: tuple[int, int, int], shape: Shape, multiprocessors: int) -> Work:
    """The work of a row's kernel at a shape; reductions are split as they are when launched."""
    kernel, method, _ = key
    products = 3 if method.endswith("x3") else 1
    weight_bytes = (2 if method.startswith("bf16") else 4) * (2 if products == 3 else 1)
    T, C, K, M, R = (
        shape.T,
        shape.channels,
        shape.modes,
        shape.real_coefficients,
        shape.real_products,
    )
    N = shape.elements // (T * C)
    x_item, rounding = itemsize(method), ROUNDING[method]
    z_item = 2 if method in ("bf16", "tf32") else 4  # of a number in a spectrum (planar._planes)
    x_bytes = shape.elements * x_item
    z_bytes = N * C * 2 * K * z_item
    if kernel == "spectral_conv":
        P, I, O = _clipped(tile, N, C, C)
        return Work(
            programs=cdiv(N, P) * cdiv(C, O),
            steps=cdiv(C, I),
            load=I * (T * P * x_item + M * O * weight_bytes),
            flop=2.0 * P * I * O * R * products,
            operations=P * I * M * (T + rounding),
            store=P * O * T * x_item,
            dram=2 * x_bytes + M * C * C * weight_bytes,
            kept=M * P * O,
            loaded=T * P * I,
        )
    if kernel == "spectral_conv_mix":
        P, I, O = _clipped(tile, N, C, C)
        return Work(
            programs=cdiv(N, P) * cdiv(C, O) * K,
            steps=cdiv(C, I),
            load=2 * I * (P * z_item + O * weight_bytes),
            flop=8.0 * P * I * O * products,
            operations=2 * P * I * rounding,
            store=2 * P * O * z_item,
            dram=2 * z_bytes + 2 * K * C * C * weight_bytes,
            kept=2 * P * O,
            loaded=2 * P * I,
        )
    if kernel.startswith("spectral_conv_weight_grad"):
        I, O, P = _clipped(tile, C, C, N)
        planes = kernel.endswith("planes")
        tiles = cdiv(C, I) * cdiv(C, O) * (K if planes else 1)
        per_split, splits = split_rows(N, P, tiles, multiprocessors)
        loads, kept, count = (2, 2, 4) if planes else (T, M, R)
        return Work(
            programs=tiles * splits,
            steps=per_split // P,
            load=P * (I + O) * loads * (z_item if planes else x_item),
            flop=2.0 * P * I * O * count * products,
            operations=P * (I + O) * kept * (rounding + (0 if planes else T)),
            store=kept * I * O * 4,
            dram=2 * (z_bytes if planes else x_bytes) + 2 * splits * 2 * K * C * C * 4,
            kept=kept * I * O,
            loaded=loads * P * (I + O),
        )
    count, length = (2 * K, T) if kernel == "truncated_rfft" else (T, 2 * K)
    P, A, L = _clipped(tile, N * C, count, length)
    return Work(
        programs=cdiv(N * C, P) * cdiv(count, A),
        steps=cdiv(length, L),
        load=L * (P + A) * 4,
        flop=2.0 * P * A * L * products,
        operations=(P + A) * L * rounding,
        store=P * A * 4,
        dram=shape.elements * 4 + N * C * 2 * K * 4,
        kept=P * A,
        loaded=L * (P + A),
    )


def _clipped(tile: tuple[int, int, int], *sizes: int) -> tuple[int, int, int]:
    a, b, c = (block(size, largest) for size, largest in zip(sizes, tile, strict=True))
    return a, b, c


def occupancy(gpu: Gpu, num_warps: int, registers: int, shared: int) -> int:
    """Programs that run at once on a multiprocessor; registers are given out by eights."""
    threads = 32 * num_warps
    return min(
        REGISTERS // (cdiv(registers, 8) * 8 * threads),
        gpu.shared_total // (shared + SHARED_RESERVED),
        gpu.threads // threads,
    )


def seconds(work: Work, gpu: Gpu, method: str, num_stages: int, resident: int) -> float:
    """The time of a launch, with `resident` programs at once on a multiprocessor."""
    share = 1 / gpu.multiprocessors
    load, store = work.load / (gpu.l2 * share), work.store / (gpu.l2 * share)
    products = work.flop / (gpu.rates[method.removesuffix("x3")] * share)
    operations = work.operations / (gpu.rates["ieee"] / 2 * share)
    computing = products + operations + BARRIER
    step = (
        max(load, computing, LATENCY / (num_stages - 1))
        if num_stages > 1
        else LATENCY + load + computing
    )
    alone = LATENCY + work.steps * step + store
    n = cdiv(work.programs, gpu.multiprocessors)
    program = max(
        work.steps * load + store,
        work.steps * products,
        work.steps * operations,
        alone / min(resident, n),
    )
    return max(work.dram / gpu.dram, n * program)


def row_seconds(
    key: RowKey,
    config: Config,
    gpu: Gpu,
    usage: Usage | None = None,
) -> float:
    """The geometric mean over a row's shapes; inf where not one program fits.

    Without `usage`, as compiled, it is guessed, and so is the time: too low rather than too high.
    """
    times = []
    for shape in shapes_of(key):
        work = work_of(key, config.tile, shape, gpu.multiprocessors)
        registers, shared, pipelined = usage or guess(work, config)
        if shared > gpu.shared or registers > most_registers(config.num_warps):
            return math.inf
        resident = occupancy(gpu, config.num_warps, registers, shared)
        times.append(seconds(work, gpu, key[1], config.num_stages if pipelined else 1, resident))
    return geometric_mean(times)


def geometric_mean(times: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, times)) / len(times))


def guess(work: Work, config: Config) -> Usage:
    """What a program uses at the least: 60 registers of it for addresses and the rest."""
    registers = cdiv(work.kept + work.loaded // 2, 32 * config.num_warps) + 60
    return Usage(registers, int(work.load) * (config.num_stages - 1), config.num_stages > 1)


def most_registers(num_warps: int) -> int:
    return min(255, REGISTERS // (32 * num_warps))


def candidates(key: RowKey, gpu: Gpu) -> list[Config]:
    """Every configuration that may fit, the best predicted first.

    Among times within 2 % of each other those come first that leave most registers free, then those
    near eight warps and three stages.
    """
    scored = []
    for config in _all(key[0]):
        time = row_seconds(key, config, gpu)
        if time < math.inf:
            work = work_of(key, config.tile, shapes_of(key)[0], gpu.multiprocessors)
            pressure = guess(work, config).registers / most_registers(config.num_warps)
            near = abs(config.num_warps - 8) + abs(config.num_stages - 3)
            scored.append((_class_of(time), pressure, near, config))
    return [config for *_, config in sorted(scored)]


def _class_of(time: float) -> int:
    """The same number for times that differ by less than 2 %, or nearly so."""
    return round(math.log(time) / math.log(1.02))


def _all(kernel: str) -> Iterator[Config]:
    wide, deep = (16, 32, 64, 128, 256), (16, 32, 64)
    # The axis that is summed, with small tiles, is the second of some kernels, the third of others.
    axes = (
        (wide, deep, wide)
        if kernel in ("spectral_conv", "spectral_conv_mix")
        else (wide, wide, deep)
    )
    for a, b, c, warps, stages in itertools.product(*axes, (4, 8, 16), (2, 3, 4)):
        yield Config((a, b, c), warps, stages)
