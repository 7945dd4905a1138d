"""Recording a CUDA graph, for whatever is replayed: a model, or a sampler's step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

DEVICE = "cuda"
# Runs before the capture: kernels are compiled and workspaces allocated in them.
_WARM_UP = 3


def record(run: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """The graph of `run`, and the tensor that its replays write."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # A stream of this device: the default of torch.cuda.graph stays on that of the first capture.
    with torch.cuda.graph(graph, stream=side):
        output = run()
    return graph, output
