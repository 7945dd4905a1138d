"""Rows in place, chosen by an index on the device: one code for all rows.

So `torch.compile` makes one graph of it, and one CUDA graph of it is replayed for each row. The
history is a ring buffer; no gradients are recorded. What differs between plans and calls (rows,
their number, a guidance scale) is read from tensors of the same shapes, so that a compiled graph
serves them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from dsno_kernels import _cuda_graph
from dsno_kernels.diffusion._rows import Setting
from dsno_kernels.functional import exp_step, solver_step, step_checks


def padded(rows: Tensor) -> Tensor:
    """These rows, and rows of 0 that are not read, up to a multiple of 64."""
    return torch.cat([rows, rows.new_zeros(-len(rows) % 64, *rows.shape[1:])])


class DeviceRows:
    """A state and all rows of a plan in memory that stays where it is.

    Attributes:
        base: the state; overwritten by the next row.
    """

    def __init__(self, setting: Setting, x: Tensor, check_finite: bool) -> None:
        plan, device = setting.plan, setting.device
        self.setting, self.calls = setting, setting.calls
        self.R, self.K = plan.evaluations, plan.history_length
        self.table = padded(plan.table.detach()).to(device)
        c_in = torch.cat([plan.initial_c_in.reshape(1), plan.column("c_in")[:-1]])
        self.c_in = padded(c_in.detach()).to(device) if setting.scaled else None
        self.times = padded(setting.times.detach())
        self.seeds = setting.seeds
        self.options = dict(setting.options)
        guidance = self.options["guidance"]
        if guidance is not None and not isinstance(guidance, Tensor):
            (value,) = step_checks.numbers("guidance", [guidance])
            self.options["guidance"] = torch.full((), value, dtype=torch.float64, device=device)
        self.base = self.point = torch.zeros_like(x, dtype=setting.dtype)
        self.ahead = bool(plan.looks_ahead.any())
        if self.ahead:
            self.point = self.base.clone()
        self.noise = torch.zeros_like(self.base) if setting.noise and plan.stochastic() else None
        self.ring: Tensor | None = None
        if self.K > 1 or setting.keep_entry:
            strides = (max(self.base.numel(), 1), *self.base.stride())
            shape = (self.K, *self.base.shape)
            self.ring = torch.empty_strided(shape, strides, dtype=setting.dtype, device=device)
            self.ring.zero_()
        self.index = torch.zeros(1, dtype=torch.int64, device=device)
        self.check_finite = check_finite
        self._count = torch.full((1,), self.R, device=device)
        self._numbers = torch.arange(len(self.table), device=device)
        self._sums = torch.zeros(len(self.table), dtype=setting.dtype, device=device)
        self._noisy = (plan.column("s") != 0).tolist()

    def begin(self, x: Tensor, history: Sequence[Tensor]) -> None:
        """To the first row, with this state at ``grid[0]``."""
        start, _ = self.setting.begin(x)
        self.base.copy_(start)
        if self.ahead:
            self.point.copy_(start)
        if self.ring is not None:
            self.ring.zero_()
            for j, entry in enumerate(history[: self.K - 1]):
                self.ring[-j % self.K].copy_(entry)
        self.index.zero_()

    def row(self) -> Tensor:
        """The row at `index`, and on to the next, the first after the last."""
        setting, index, x = self.setting, self.index, self.point
        if self.c_in is not None:
            c_in = self.c_in.index_select(0, index)
            x = exp_step(x, (), c_in, out_dtype=setting.model_dtype, backend=self.backend)
        output, unconditional = self.calls(x, self.times.index_select(0, index)[0], None)
        if self.check_finite:
            total = output.sum(dtype=setting.dtype)
            if unconditional is not None:
                total = total + unconditional.sum(dtype=setting.dtype)
            self._sums.copy_(torch.where(self._numbers == index, total, self._sums))
        stored = self.ring is not None
        new = solver_step(
            self.point,
            output,
            self.table.index_select(0, index)[0],
            () if self.ring is None else self.ring,
            base=self.base if self.ahead else None,
            unconditional=unconditional,
            head=index[0] if stored else None,
            noise=self.noise,
            seed=None if self.seeds is None else self.seeds.index_select(0, index + 1)[0],
            looks_ahead=self.ahead,
            keep_entry=stored,
            store=stored,
            inplace=True,
            **self.options,
        )
        if self.ahead:
            self.point.copy_(new.point)
        index.copy_((index + 1) % self._count)
        return self.base

    @property
    def backend(self) -> str | None:
        return self.options["backend"]

    def compiled(self) -> Callable[[], object]:
        """The compiled row. Where the process has as many graphs of it as `torch.compile` keeps,
        such as of other models or shapes, it forgets them.
        """
        row = torch.compile(self.row, fullgraph=True, dynamic=False)

        def run() -> object:
            try:
                return row()
            except torch._dynamo.exc.FailOnRecompileLimitHit:
                # Private, so imported where it is needed: the rest works without it.
                from torch._C._dynamo.eval_frame import reset_code

                reset_code(DeviceRows.row.__code__)
                return row()

        return run

    def captured(self) -> Callable[[], object]:
        """A replay of the row as a CUDA graph; `begin` anew afterwards."""
        if self.base.device.type != _cuda_graph.DEVICE:
            raise ValueError(
                f"a CUDA graph needs x_T on a CUDA device, got {self.base.device}; sample without"
                " a graph there"
            )
        with torch.cuda.device(self.base.device):
            graph, _ = _cuda_graph.record(self.row)
        return graph.replay

    def states(self, run: Callable[[], object]) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """As `Rows.states`: copies where somebody may keep them, else base
        itself, which the next row overwrites.
        """
        for i in range(self.R):
            if self.noise is not None and self._noisy[i]:
                assert self.setting.noise is not None
                self.noise.copy_(self.setting.noise(i))
            run()
            if self.ring is not None and self.setting.keep_entry:
                yield i, self.base.clone(), self.ring[(i + 1) % self.K].clone()
            else:
                yield i, self.base, None

    def finite(self) -> Tensor:
        """As `Rows.finite`."""
        return self._sums[: self.R].isfinite()
