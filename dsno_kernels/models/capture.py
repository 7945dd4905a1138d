"""A model whose forward is one CUDA graph: captured once for one shape, then replayed.

A replay costs the host one launch, so that it no longer limits the small levels of the U-Net.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor, nn

from dsno_kernels import _cuda_graph


class CapturedModel:
    """The forward of a model without gradients, as a CUDA graph for one shape of its inputs.

    The graph reads the parameters where they lie: weights that are updated in place (an optimizer
    step, ``load_state_dict``) are seen by the next call; a model whose parameters are replaced
    (``.to(dtype)``) must be captured again, and says so. Autocast and the float32 matmul setting
    are those of the time of capture.

    Args:
        model: a module in evaluation mode, all of it on one CUDA device.
        inputs: example tensors, as its ``forward`` takes them; their shapes, dtypes and device are
            those that every call must have.

    Returns of a call:
        The output of the model, in a tensor of its own. Calls from several threads or streams run
        one after the other.

    Raises:
        TypeError: a model that is not a module, inputs or an output that are not tensors, dtypes
            other than captured. ValueError: a model on the CPU or in training mode; shapes, devices
            or parameters other than captured.

    Equivalent to: ``model(*inputs)`` under ``torch.no_grad()``.

    Example:
        >>> sampler = dk.models.CapturedModel(model.cuda().eval(), noise, logsnr)
        >>> images = sampler(torch.randn_like(noise), logsnr)[:, -1]
    """

    def __init__(self, model: nn.Module, *inputs: Tensor) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        _check_tensors(inputs)
        self.model = model
        self._check_mode()
        for name, module in model.named_modules():
            if module.training:
                raise ValueError(f"{name!r} of the model is in training mode; call model.eval()")
        state = [*model.parameters(), *model.buffers()]
        devices = sorted({str(tensor.device) for tensor in (*state, *inputs)})
        if len(devices) != 1 or not devices[0].startswith(_cuda_graph.DEVICE):
            raise ValueError(
                "a CUDA graph needs the model and its inputs on one CUDA device, got"
                f" {', '.join(devices)}; call the model itself elsewhere"
            )
        self._places = [
            (table, name, tensor.data_ptr())
            for module in model.modules()
            for table in (module._parameters, module._buffers)
            for name, tensor in table.items()
            if tensor is not None
        ]
        self._lock = threading.Lock()
        self._inputs = tuple(tensor.detach().clone() for tensor in inputs)
        kind = self._inputs[0].device.type
        dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)

        def run() -> Tensor:
            # Without autocast's cache: it would keep the weights of now, rounded, for every replay.
            with torch.no_grad(), torch.autocast(kind, dtype, enabled, cache_enabled=False):
                return model(*self._inputs)

        self._device = self._inputs[0].device
        with torch.cuda.device(self._device):
            self._graph, self._output = _cuda_graph.record(run)
            self._done = torch.cuda.Event()  # of the last call: the next may be on another stream
        if not isinstance(self._output, Tensor):
            raise TypeError(f"the model must return one tensor, got {type(self._output).__name__}")

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The output for new inputs; the inputs are copied, the output is not reused."""
        self._check_mode()
        self._check_inputs(inputs)
        for table, name, address in self._places:
            tensor = table.get(name)
            if tensor is None or tensor.data_ptr() != address:
                raise ValueError(
                    f"the tensor {name!r} of the model is no longer where it was captured;"
                    " update weights in place, or capture the model again"
                )
        with self._lock, torch.no_grad(), torch.cuda.device(self._device):
            self._done.wait()
            for captured, given in zip(self._inputs, inputs, strict=True):
                captured.copy_(given)
            self._graph.replay()
            output = self._output.clone()
            self._done.record()
        return output

    def _check_mode(self) -> None:
        if self.model.training:
            raise ValueError("the model is in training mode; call model.eval() first")

    def _check_inputs(self, inputs: tuple[Tensor, ...]) -> None:
        _check_tensors(inputs)
        if len(inputs) != len(self._inputs):
            raise ValueError(f"captured with {len(self._inputs)} inputs, got {len(inputs)}")
        for place, (captured, given) in enumerate(zip(self._inputs, inputs, strict=True)):
            if given.dtype != captured.dtype:
                raise TypeError(
                    f"input {place} was captured as {captured.dtype}, got {given.dtype}"
                )
            if given.shape != captured.shape or given.device != captured.device:
                raise ValueError(
                    f"input {place} was captured with shape {tuple(captured.shape)} on"
                    f" {captured.device}, got {tuple(given.shape)} on {given.device};"
                    " capture the model for that shape"
                )


def _check_tensors(inputs: tuple[Tensor, ...]) -> None:
    if not inputs:
        raise ValueError("pass the inputs of the model, at least one tensor")
    for place, tensor in enumerate(inputs):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"input {place} must be a torch.Tensor, got {type(tensor).__name__}")
