"""A CUDA tensor that no kernel serves: the reference runs, and says so once."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch

from dsno_kernels import backends
from dsno_kernels.backends import Request, reference

CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def capability(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The compute capability of the GPU, which is too old for every kernel."""
    found = [7, 5]
    monkeypatch.setattr(backends, "_reported", set())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: tuple(found))
    backends.unsupported.cache_clear()
    yield found
    backends.unsupported.cache_clear()


def selected(op: str, dtype: torch.dtype, name: str = "") -> tuple[object, list[str]]:
    """The backend, and the warnings of choosing it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        chosen = backends._select.__wrapped__(name, Request(op, CUDA, dtype))
    return chosen, [str(warning.message) for warning in caught]


def test_once_for_each_op_and_kind_of_gpu(capability: list[int]) -> None:
    chosen, (message,) = selected("spectral_conv", torch.float32)
    assert chosen is reference
    assert "runs spectral_conv in torch.float32 on this GPU (compute capability 7.5)" in message
    assert "triton: " in message and "cuda: " in message and "cupy: " in message
    assert selected("spectral_conv", torch.float16) == (reference, [])
    assert len(selected("truncated_rfft", torch.float32)[1]) == 1
    capability[1] = 0
    assert len(selected("spectral_conv", torch.float16)[1]) == 1


def test_an_op_of_two_others_leaves_it_to_them() -> None:
    assert selected("spectral_conv_backward", torch.float32) == (reference, [])
    assert len(selected("spectral_conv_weight_grad", torch.float32)[1]) == 1


def test_not_of_what_is_for_the_reference_by_design(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "op_without_a_kernel", object, raising=False)
    assert selected("spectral_conv", torch.float64) == (reference, [])
    assert selected("op_without_a_kernel", torch.float32) == (reference, [])
    assert selected("spectral_conv", torch.float32, "reference") == (reference, [])
