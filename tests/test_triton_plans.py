"""What a call of the Triton backend plans: launches, their bytes, rows of the tables, splits."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from dsno_kernels.backends import triton as backend
from dsno_kernels.backends.triton import configs, launch, weight_grad, weights
from tests import triton_aot
from tests.test_triton_launch import doubled

AXES = {"time_dim": 1, "channel_dim": 2}


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


# (T, K, batch, side of the image) of 256 channels -> launches forward, of dx, of dW
COUNTS = {
    "dsno_8x8": ((4, 2, 16, 8), (1, 1, 2)),
    "dsno_8x8_of_32": ((4, 2, 32, 8), (1, 1, 2)),
    "dsno_32x32": ((4, 2, 32, 32), (2, 2, 2)),
    "medium_small": ((16, 8, 1, 8), (3, 3, 4)),
    "medium": ((16, 8, 32, 16), (3, 3, 4)),
    "medium_long": ((64, 16, 8, 16), (3, 3, 4)),
}


@pytest.mark.parametrize(("shape", "expected"), COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("precision", ["fp32", "bf16x3", "tf32", "bf16"])
def test_launch_counts(
    shape: tuple[int, int, int, int], expected: tuple[int, int, int], precision: str
) -> None:
    T, K, batch, side = shape
    x, bits = meta(batch, T, 256, side, side), meta(batch, T, 256, side**2 // 8, dtype=torch.uint8)
    weight = meta(256, 256, K, 2)
    common = {"precision": precision, "negative_slope": 0.1, **AXES}
    calls = (
        lambda: backend.spectral_conv(x, weight, n=T, residual=x, save_positive=True, **common),
        lambda: backend.spectral_conv(x, weight, n=T, adjoint=True, x_positive=bits, **common),
        lambda: backend.spectral_conv_weight_grad(x, x, K, grad_positive=bits, **common),
    )
    table = configs.ARCHITECTURES[9, 0]
    assert tuple(len(triton_aot.launches_of(table, 90, call)) for call in calls) == expected


@pytest.mark.parametrize(
    ("precision", "expected"), [("fp32", 6.0), ("bf16x3", 6.0), ("tf32", 4.0), ("bf16", 4.0)]
)
def test_bytes_between_the_kernels_of_medium_lengths(precision: str, expected: float) -> None:
    """In tensors of x's size, at T = 2K: x and y, and both spectra written and read once."""
    x, weight = torch.randn(1, 16, 32, 64), torch.randn(32, 32, 8, 2)
    with doubled() as record:
        backend.spectral_conv(x, weight, n=16, precision=precision, **AXES)
        rfft, mix, irfft = (arguments for _, _, arguments in record.named)
    moved = (
        *(rfft["x_ptr"], rfft["spectrum_ptr"], mix["z_ptr"], mix["y_ptr"]),
        *(irfft["spectrum_ptr"], irfft["y_ptr"]),
    )
    assert sum(tensor.nbytes for tensor in moved) / x.nbytes == expected


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0)], ids="sm_{0[0]}{0[1]}".format)
@pytest.mark.parametrize("kernel", ["spectral_conv", "spectral_conv_mix"])
def test_wide_tiles_and_packed_weights_serve_more_than_one_wave(
    kernel: str, capability: tuple[int, int]
) -> None:
    table = configs.ARCHITECTURES[capability]
    kind = "3" if kernel == "spectral_conv" else ""
    wide = table.rows[kernel, "tf32", kind]
    narrow = table.rows[kernel, "tf32", f"{kind} narrow".strip()]
    P, _, O = wide.tile
    wave = table.multiprocessors

    def chosen(rows: int, channels: int, planes: int = 1) -> tuple[configs.Config, bool]:
        return weights.choose_row(table, kernel, "tf32", kind, rows, channels, planes=planes)

    assert chosen(wave * P, O) == chosen(wave * P // 2, 2 * O) == (narrow, False)
    assert chosen(wave * P + 1, O) == chosen(wave * P, O + 1) == (wide, True)
    assert chosen(1, O, planes=wave + 1) == (wide, True)


@pytest.mark.parametrize(
    ("tiles", "steps", "splits"),
    [
        (16, 512, 8),  # 17 would make a third wave, and 16 two of half the steps
        (36, 512, 7),  # two waves of 74 steps; one of 3 x 36 programs takes 171
        (144, 512, 2),  # three waves of 256 steps; alone, two of 512
        (132, 512, 1),
        (133, 512, 2),
        (1000, 512, 1),
        (1, 512, 128),  # no program has fewer than four steps
        (1, 8, 2),
        (1, 3, 1),
    ],
)
def test_reductions_are_split_into_whole_waves(tiles: int, steps: int, splits: int) -> None:
    rows = 32 * steps - 5
    per_split, found = weight_grad.split_rows(rows, 32, tiles, 132)
    assert found == splits and per_split % 32 == 0
    assert (found - 1) * per_split < rows <= found * per_split


def test_a_gpu_without_a_table_takes_the_safe_rows_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    launch.architecture.cache_clear()
    device = torch.device("cuda", 0)
    with pytest.warns(UserWarning, match=r"capability 12\.0: .* sm_86"):
        assert launch.architecture(device) is configs.SAFE
    launch.architecture.cache_clear()
