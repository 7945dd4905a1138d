"""Swapping this library's kernels into a model that exists, and back.

A layer is recognized by structure, never by import: the words of its class name, its exact
parameters and attributes, and a trial, in which its own forward and ours must agree on a small
input, on a copy with random weights. What is swapped is the `forward` of that one instance.
Parameters, state dict, hooks, optimizers and `isinstance` stay as they are, and restoring deletes
what was added. Known layers:

    DSNO             `SpectralConv1d` (weights1 in real pairs), `TimeConv` (one fused call)
    FNO              `SpectralConv1d` (weights1 complex or in real pairs), x (B, I, L)
    neuraloperator   `SpectralConv` in one dimension with a plain dense weight, x (B, I, L)

A call that our kernels do not serve (more modes than the input has, float64 weights, tensor
subclasses, ..) goes to the original forward, so a swapped layer fails only where the original does.
One cast to half precision, where the original fails, returns that dtype, as `dsno_kernels.nn` does.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dsno_kernels import _swap_kernels as kernels
from dsno_kernels import nn as layers
from dsno_kernels import precision as precisions

logger = logging.getLogger(__name__)

_FORWARD = "forward"
_REPLICATE = "_replicate_for_data_parallel"

# The trial tells formulas apart: a wrong axis, scale or conjugate is an error of about 1, a ReLU in
# place of LeakyReLU(0.01) one of 1e-2; tf32, which the original may take on a GPU, is one of 6e-4.
_TRIAL_TOLERANCE = 3e-3


class SwappedForward:
    """The `forward` in the `__dict__` of one module: our kernel, or where it declines the class's.

    It follows its module through `copy.deepcopy`, pickle and `nn.DataParallel`, whose copies would
    otherwise call the forward, and so the weights, of the first one. The module is held weakly: a
    cycle would keep a deleted model's memory until the garbage collector runs. So a `forward` that
    is kept on its own (``f = layer.forward``) raises ReferenceError once the layer is gone.
    """

    def __init__(self, module: nn.Module, kernel: kernels.Kernel, precision: str | None) -> None:
        self._module = weakref.ref(module)
        self.kernel = kernel
        self.precision = precision

    @property
    def module(self) -> nn.Module:
        module = self._module()
        if module is None:
            raise ReferenceError("the module of this forward no longer exists")
        return module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.module
        y = self.kernel(module, self.precision, None, *args, **kwargs)
        return type(module).forward(module, *args, **kwargs) if y is None else y

    def __deepcopy__(self, memo: dict[int, Any]) -> SwappedForward:
        return SwappedForward(copy.deepcopy(self.module, memo), self.kernel, self.precision)

    def __getstate__(self) -> dict[str, Any]:
        return {"module": self.module, "kernel": self.kernel, "precision": self.precision}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def replicate(self) -> nn.Module:
        """A copy of the module for another device; stands in for the module's own method."""
        module = self.module
        replica: nn.Module = type(module)._replicate_for_data_parallel(module)
        _bind(replica, self.kernel, self.precision)
        return replica


def swap_layers(model: nn.Module, *, precision: str | None = None) -> int:
    """Run the spectral convolutions of a model on this library's kernels, in place.

    Layers that look like one of the known ones but compute something else are left alone; the
    logger ``dsno_kernels.swap`` says why, at level INFO. Scripted and traced modules are passed
    over. Swapping twice changes nothing. Keep a swapped layer, not its ``forward`` alone, which
    raises ReferenceError once the layer is gone.

    Args:
        model: any module; wrappers such as DDP or DataParallel may be around it or come later.
        precision: of the channel mixing. None gives the original's numbers, "fp32", whatever
            PyTorch's float32 matmul setting (the original follows it on a GPU only,
            :mod:`dsno_kernels.nn` everywhere); a layer cast to half precision takes that of its
            dtype. "bf16x3", "tf32" and "bf16" have the errors of :mod:`dsno_kernels.precision`.

    Returns:
        The number of layers swapped by this call. A `TimeConv` counts once, with the convolution in
        it; a module that occurs several times counts once.

    Raises:
        TypeError: model is not a module. ValueError: an unknown precision.

    Example:
        >>> dk.swap_layers(model)                      # the published CIFAR-10 network
        22
    """
    return len(_outermost(_swap(model, precision)))


def restore_layers(model: nn.Module) -> int:
    """Undo :func:`swap_layers`, exactly: every swapped layer has its own forward again.

    Returns:
        The number of layers restored, counted as :func:`swap_layers` counts them.

    Raises:
        TypeError: model is not a module.

    Example:
        >>> dk.restore_layers(model)
        22
    """
    return _restore([module for _, module in _named_modules(model)])


@contextlib.contextmanager
def swapped(model: nn.Module, *, precision: str | None = None) -> Iterator[int]:
    """:func:`swap_layers` for a ``with`` block; layers swapped before it stay so after it.

    Args:
        model, precision: as in :func:`swap_layers`; None gives the original's numbers.

    Yields:
        The number of layers swapped.

    Example:
        >>> with dk.swapped(model):
        ...     y = model(x, logsnr)
    """
    modules = _swap(model, precision)
    try:
        yield len(_outermost(modules))
    finally:
        _restore(modules)


def _named_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    return list(model.named_modules())


def _bind(module: nn.Module, kernel: kernels.Kernel, precision: str | None) -> None:
    forward = SwappedForward(module, kernel, precision)
    module.__dict__[_FORWARD] = forward
    module.__dict__[_REPLICATE] = forward.replicate


def _restore(modules: list[nn.Module]) -> int:
    modules = [module for module in modules if kernels.is_swapped(module)]
    count = len(_outermost(modules))
    for module in modules:
        del module.__dict__[_FORWARD], module.__dict__[_REPLICATE]
    return count


def _outermost(modules: list[nn.Module]) -> list[nn.Module]:
    """These swapped modules, less the convolutions inside a fused `TimeConv` among them."""
    fused = [module for module in modules if kernels.is_swapped(module, kernels.dsno_time_conv)]
    inner = {id(module.t_conv) for module in fused}
    return [module for module in modules if id(module) not in inner]


def _swap(model: nn.Module, precision: str | None) -> list[nn.Module]:
    precisions.choose(precision, torch.float32)
    new = []
    # Children first: a `TimeConv` is tried when its convolution has been swapped.
    for name, module in reversed(_named_modules(model)):
        ours = isinstance(module, (layers.SpectralConv1d, layers.TimeConv))
        if ours or isinstance(module, torch.jit.ScriptModule) or kernels.is_swapped(module):
            continue
        candidates = _candidates(module)
        if not candidates:
            continue
        reasons = []
        unsuited = _unsuited(module)
        for kernel, shape in candidates.items():
            reason = unsuited or _trial(module, kernel, shape)
            if reason is None:
                _bind(module, kernel, precision)
                new.append(module)
                break
            reasons.append(reason)
        else:
            logger.info("%s at %r is left alone: %s", type(module).__name__, name, reasons[0])
    return new


def _candidates(module: nn.Module) -> dict[kernels.Kernel, tuple[int, ...]]:
    """The kernels that a module may stand for, by names and weights, each with a trial shape."""
    name = type(module).__name__
    conv: Any = module._modules.get("t_conv")
    if conv is not None and kernels.is_swapped(conv, kernels.dsno_spectral_conv):
        if "TimeConv" not in name:
            return {}
        return {kernels.dsno_time_conv: (1, 2 * conv.modes1 + 1, conv.weights1.shape[0], 1, 2)}
    if "SpectralConv" not in name:
        return {}
    weight = getattr(module, "weights1", None)
    if isinstance(weight, Tensor) and weight.ndim >= 3 and hasattr(module, "modes1"):
        I, _, K = weight.shape[:3]
        signal, video = (1, I, 2 * K + 1), (1, 2 * K + 1, I, 1, 2)
        if weight.is_complex():
            return {kernels.fno_spectral_conv: signal}
        return {kernels.dsno_spectral_conv: video, kernels.fno_spectral_conv: signal}
    modes = getattr(module, "n_modes", None)
    if isinstance(modes, (list, tuple)) and hasattr(module, "weight"):
        channels = getattr(module, "in_channels", 1)
        return {kernels.neuralop_spectral_conv: (1, channels, 2 * modes[0] + 1)}
    return {}


def _unsuited(module: nn.Module) -> str | None:
    """Why a candidate must not even be tried; None where it may be."""
    if _FORWARD in module.__dict__:
        return "something else has already replaced the forward of this instance"
    known = {"weights1", "weight", "bias", "t_conv", "act"}
    parts = {**module._parameters, **module._buffers, **module._modules}
    extra = sorted(name for name, part in parts.items() if part is not None and name not in known)
    if extra:
        return f"it has parts that the known layers lack: {', '.join(extra)}"
    wide = (torch.float64, torch.complex128)
    if any(part.dtype in wide for part in module.parameters()):
        return "its weights are float64, which the original forward serves"
    if any(kernels.has_hooks(part) for part in module.children()):
        return "a part of it has hooks, which a fused call would pass over"
    return kernels.neuralop_unsupported(module) if hasattr(module, "n_modes") else None


def _trial(module: nn.Module, kernel: kernels.Kernel, shape: tuple[int, ...]) -> str | None:
    """The module's own forward against a kernel on a small input: what differs, None if nothing.

    Both run on a twin of the module with weights of size 1: at the official initialization the
    convolution is a thousandth of the residual, and would vanish in it.
    """
    parameter = next(module.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    if device.type == "meta":
        device = torch.device("cpu")
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            x = _normal(shape, torch.float32, device, generator)
            twin = _twin(module, device, generator)
            outputs = [_forward(twin, x, training) for training in (True, False)]
            if kernel is kernels.dsno_time_conv:
                _bind(twin.get_submodule("t_conv"), kernels.dsno_spectral_conv, None)
            actual = kernel(twin, "fp32", "reference", x)
            if actual is None:
                return "our kernels do not serve its configuration"
            for output in outputs:
                if not isinstance(output, Tensor) or output.shape != actual.shape:
                    return "its forward returns something else"
                if output.dtype != actual.dtype:
                    return "its forward returns something else"
                convolved = actual - x if kernel is kernels.dsno_time_conv else actual
                scale, error = convolved.norm().item(), (output - actual).norm().item()
                if not (scale > 0 and error <= _TRIAL_TOLERANCE * scale):
                    return "its forward computes something else"
    except Exception as error:
        return f"it does not take an input of shape {shape} ({type(error).__name__}: {error})"
    return None


def _twin(module: nn.Module, device: torch.device, generator: torch.Generator) -> nn.Module:
    """A module that shares everything with this one but its weights, random ones in float32.

    Its forward, and that of its parts, is that of the class. Nothing of the module is written to.
    """
    twin: nn.Module = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    for name in (_FORWARD, _REPLICATE):
        twin.__dict__.pop(name, None)

    def weight(tensor: Tensor) -> Tensor:
        dtype = torch.complex64 if tensor.is_complex() else torch.float32
        values = _normal(tensor.shape, dtype, device, generator)
        # So that a sum over the input channels, the first axis, has size 1.
        return values * tensor.shape[0] ** -0.5 if tensor.ndim >= 3 else values

    twin.__dict__["_parameters"] = {
        name: None if part is None else nn.Parameter(weight(part), requires_grad=False)
        for name, part in module._parameters.items()
    }
    twin.__dict__["_buffers"] = {
        name: None if part is None else weight(part) for name, part in module._buffers.items()
    }
    twin.__dict__["_modules"] = {
        name: None if part is None else _twin(part, device, generator)
        for name, part in module._modules.items()
    }
    return twin


def _normal(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=dtype, device="cpu").to(device)


def _forward(twin: nn.Module, x: Tensor, training: bool) -> Any:
    for part in twin.modules():
        part.training = training
    with _NoRandomNumbers():  # type: ignore[no-untyped-call]
        return type(twin).forward(twin, x)


class _NoRandomNumbers(TorchDispatchMode):
    """An operation that would draw from PyTorch's generators fails instead, in this thread."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise RuntimeError("it draws random numbers")
        return func(*args, **(kwargs or {}))
