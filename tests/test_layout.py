"""Canonical axes: shape decides what is batch and pixels, strides decide the memory order."""

from __future__ import annotations

import pytest
import torch

from dsno_kernels import _layout

# shape, time_dim, channel_dim -> B, T, C, P
CASES = {
    "BTCHW": ((2, 4, 8, 5, 7), 1, 2, (2, 4, 8, 35)),
    "BCTHW": ((2, 8, 4, 5, 7), 2, 1, (2, 4, 8, 35)),
    "BCL": ((3, 8, 16), 2, 1, (1, 16, 8, 3)),
    "BTC": ((3, 16, 8), 1, 2, (1, 16, 8, 3)),
    "BTHWC": ((2, 4, 5, 7, 8), 1, 4, (2, 4, 8, 35)),
    "TC": ((4, 8), 0, 1, (1, 4, 8, 1)),
    "two batch axes": ((2, 3, 4, 8, 5), 2, 3, (6, 4, 8, 5)),
    "axes in all three places": ((2, 4, 3, 8, 5), 1, 3, None),
}


@pytest.mark.parametrize(("shape", "time_dim", "channel_dim", "sizes"), CASES.values(), ids=CASES)
def test_axes(
    shape: tuple[int, ...], time_dim: int, channel_dim: int, sizes: tuple[int, ...] | None
) -> None:
    x = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)
    axes = _layout.find_axes(x.shape, x.stride(), time_dim, channel_dim)
    assert (axes and axes[:4]) == sizes
    copy, axes = _layout.canonical(x, time_dim, channel_dim)
    assert torch.equal(copy, x)
    batch_group, pixel_group = _layout.axis_groups(x.ndim, time_dim, channel_dim)
    expected = x.permute(*batch_group, time_dim, channel_dim, *pixel_group).reshape(axes[:4])
    assert torch.equal(copy.as_strided(axes[:4], axes.strides, copy.storage_offset()), expected)


def test_a_slice_with_a_gap_between_rows_is_copied_and_a_plain_view_is_not() -> None:
    x = torch.randn(2, 4, 8, 5, 9)
    assert _layout.canonical(x[..., 1:8], 1, 2)[0].data_ptr() != x[..., 1:8].data_ptr()
    for view in (x[1:], x[:, ::2], x[:, :, 1:3], x.transpose(1, 2).transpose(1, 2)):
        assert _layout.canonical(view, 1, 2)[0].data_ptr() == view.data_ptr()


def test_outputs_are_dense_in_the_memory_order_of_the_input() -> None:
    x = torch.randn(2, 5, 7, 4, 8).permute(0, 3, 4, 1, 2)
    y = _layout.empty(x, 1, 2, 6, 3, torch.float32)
    assert y.shape == (2, 6, 3, 5, 7) and y.permute(0, 3, 4, 1, 2).is_contiguous()
    expanded = torch.randn(1, 1, 1, 1).expand(2, 4, 8, 5)
    assert _layout.empty(expanded, 1, 2, 4, 8, torch.float32).is_contiguous()
