"""The calls of the denoiser: keyword arguments, guidance in one call or two, and checks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dsno_kernels.functional import checks


@dataclass(frozen=True)
class Calls:
    """The denoiser with its keyword arguments.

    Args:
        denoiser: ``denoiser(x, t, **kwargs)``.
        kwargs: of the conditional call, or of the only one.
        unconditional: of the unconditional call; None without guidance.
        split: two calls in place of one on the doubled batch.
        batch: how many samples there are; None for a state without axes.
        joined: the arguments of both calls as those of one on the doubled batch, where they are
            made once (`joined_once`); None: in each call.
    """

    denoiser: Callable[..., Tensor]
    kwargs: Mapping[str, Any]
    unconditional: Mapping[str, Any] | None
    split: bool
    batch: int | None
    joined: Mapping[str, Any] | None = None

    def __call__(self, x: Tensor, t: Tensor, row: int | None) -> tuple[Tensor, Tensor | None]:
        """The conditional and the unconditional output; `row` is named in errors."""
        if self.unconditional is None:
            return self._output(x, t, self.kwargs, row), None
        if self.split:
            return (
                self._output(x, t, self.kwargs, row),
                self._output(x, t, self.unconditional, row),
            )
        joined = self._together() if self.joined is None else self.joined
        both = self._output(torch.cat([x, x]), t, joined, row)
        return both[: len(x)], both[len(x) :]

    def joined_once(self) -> Calls:
        """These calls on arguments as they are now; later changes in place are not seen."""
        if self.unconditional is None or self.split:
            return self
        return replace(self, joined=self._together())

    def _together(self) -> dict[str, Any]:
        assert self.unconditional is not None
        if self.batch is None:
            raise ValueError("guidance in one call needs a batch axis; give split_guidance=True")
        names = {**self.kwargs, **self.unconditional}
        return {name: self._joined(name, self.unconditional) for name in names}

    def _joined(self, name: str, unconditional: Mapping[str, Any]) -> Any:
        values = [of[name] for of in (self.kwargs, unconditional) if name in of]
        if len(values) == 2:
            first, second = values
            if first is second and not self._per_sample(first):
                return first
            if self._per_sample(first) and self._per_sample(second):
                return torch.cat([first, second])
            plain = not isinstance(first, Tensor) and not isinstance(second, Tensor)
            if plain and type(first) is type(second) and first == second:
                return first
        raise ValueError(
            f"argument {name!r} of the denoiser cannot serve a conditional and an unconditional"
            f" sample in one call: it must be the same in both, or a tensor of {self.batch} rows"
            " in each; give split_guidance=True for two calls"
        )

    def _per_sample(self, value: object) -> bool:
        return isinstance(value, Tensor) and value.ndim > 0 and len(value) == self.batch

    def _output(self, x: Tensor, t: Tensor, kwargs: Mapping[str, Any], row: int | None) -> Tensor:
        if torch.compiler.is_compiling() or x.is_inference():
            output = self.denoiser(x, t, **kwargs)
        else:
            version = x._version
            output = self.denoiser(x, t, **kwargs)
            if x._version != version:
                raise ValueError(f"the denoiser changed its input in place{_at(row)}")
        what = f"what the denoiser returns{_at(row)}"
        checks.real(what, output)
        if output.shape != x.shape or output.device != x.device:
            raise ValueError(
                f"{what} must have the shape and device of its input, {tuple(x.shape)} on"
                f" {x.device}, got {tuple(output.shape)} on {output.device}"
            )
        return output


def _at(row: int | None) -> str:
    return "" if row is None else f" at row {row} of the plan"
