"""`CapturedModel` on a machine without a GPU: its logic on stand-ins for torch.cuda, and what it
refuses. tests/test_gpu_model.py runs it on a device.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn

from dsno_kernels import _cuda_graph
from dsno_kernels.models import DSNO, CapturedModel, DSNOConfig


class Doubler(nn.Module):
    """y = w x + z, and a count of how often its Python code ran."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))
        self.runs = 0

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        self.runs += 1
        return self.weight * x + z


class FakeGraph:
    """Replays as a CUDA graph does: from the captured inputs into the captured output."""

    def __init__(self) -> None:
        self.replay: Callable[[], None] = lambda: None


def host_record(run: Callable[[], Tensor]) -> tuple[FakeGraph, Tensor]:
    """What `_cuda_graph.record` does, with a graph that runs the captured code again."""
    graph, output = FakeGraph(), run()

    def replay() -> None:
        output.copy_(run())

    graph.replay = replay
    return graph, output


def capture_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the CPU pass for a GPU in `CapturedModel`."""
    monkeypatch.setattr(_cuda_graph, "record", host_record)
    monkeypatch.setattr(_cuda_graph, "DEVICE", "cpu")
    fake = types.SimpleNamespace(device=lambda _: contextlib.nullcontext(), Event=Mock)
    monkeypatch.setattr(torch, "cuda", fake)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Doubler:
    capture_on_the_host(monkeypatch)
    return Doubler().eval()


X, Z = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.5])


def test_new_inputs_and_weights_updated_in_place_are_seen(model: Doubler) -> None:
    captured = CapturedModel(model, X, Z)
    first = captured(3 * X, Z)
    assert torch.equal(first, 6 * X + Z)
    with torch.no_grad():
        model.weight.fill_(5.0)
    assert torch.equal(captured(X, -Z), 5 * X - Z)
    model.load_state_dict({"weight": torch.tensor(7.0)})
    assert torch.equal(captured(X, Z), 7 * X + Z)
    assert torch.equal(first, 6 * X + Z)  # an output is not overwritten by later calls
    assert not first.requires_grad


def test_inputs_are_copied(model: Doubler) -> None:
    x = X.clone()
    captured = CapturedModel(model, x, Z)
    captured(5 * X, Z)
    assert torch.equal(x, X)
    assert not captured(X.clone().requires_grad_(), Z).requires_grad
    assert not captured._inputs[0].requires_grad


def test_weights_updated_in_place_are_seen_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast keeps the rounded weights until its block ends; a graph would keep them for ever."""
    capture_on_the_host(monkeypatch)
    layer = nn.Linear(2, 2, bias=False).eval()
    with torch.autocast("cpu", torch.bfloat16):
        captured = CapturedModel(layer, X)
        first = captured(X)
        with torch.no_grad():
            layer.weight.mul_(2.0)
        second = captured(X)
    assert first.dtype == torch.bfloat16
    assert torch.equal(second, 2 * first) and first.any()


def test_replaced_parameters_are_refused(model: Doubler) -> None:
    captured = CapturedModel(model, X, Z)
    model.weight = nn.Parameter(torch.tensor(3.0))
    with pytest.raises(ValueError, match=r"'weight' of the model is no longer where"):
        captured(X, Z)


def test_training_mode_is_refused(model: Doubler) -> None:
    captured = CapturedModel(model, X, Z)
    model.train()
    with pytest.raises(ValueError, match=r"call model\.eval\(\)"):
        captured(X, Z)
    with pytest.raises(ValueError, match=r"call model\.eval\(\)"):
        CapturedModel(model, X, Z)


def test_other_inputs_are_refused(model: Doubler) -> None:
    captured = CapturedModel(model, X, Z)
    runs = model.runs
    with pytest.raises(ValueError, match=r"input 1 was captured with shape \(2,\).*got \(1,\)"):
        captured(X, Z[:1])
    with pytest.raises(TypeError, match=r"input 0 was captured as torch.float32, got .*float64"):
        captured(X.double(), Z)
    with pytest.raises(ValueError, match=r"captured with 2 inputs, got 1"):
        captured(X)
    with pytest.raises(TypeError, match=r"input 1 must be a torch.Tensor, got float"):
        captured(X, 0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"on meta"):
        captured(X, Z.to("meta"))
    assert model.runs == runs


def test_the_cpu_is_refused() -> None:
    with pytest.raises(ValueError, match=r"on one CUDA device, got cpu"):
        CapturedModel(Doubler().eval(), X, Z)


def test_what_is_no_model_and_no_tensor_is_refused(model: Doubler) -> None:
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got function"):
        CapturedModel(lambda x: x, X)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"input 0 must be a torch\.Tensor"):
        CapturedModel(model, 1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"at least one tensor"):
        CapturedModel(model)
    pair = nn.Module()
    pair.forward = lambda x: (x, x)
    with pytest.raises(TypeError, match=r"must return one tensor, got tuple"):
        CapturedModel(pair.eval(), X)


def test_a_layer_left_in_training_mode_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    capture_on_the_host(monkeypatch)
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout()).eval()
    model[1].train()
    with pytest.raises(ValueError, match="'1' of the model is in training mode"):
        CapturedModel(model, X)


def test_recording_warms_up_on_a_side_stream_and_captures_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The order in which torch.cuda is used."""
    events: list[str] = []

    class Stream:
        def __init__(self, name: str = "side") -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            events.append(f"{self.name} waits for {other.name}")

    @contextlib.contextmanager
    def within(name: str) -> Iterator[None]:
        events.append(f"{name} begins")
        yield
        events.append(f"{name} ends")

    fake = types.SimpleNamespace(
        Stream=Stream,
        current_stream=lambda: Stream("current"),
        stream=lambda stream: within(stream.name),
        CUDAGraph=FakeGraph,
        graph=lambda graph, stream: within(f"graph on {stream.name}"),
    )
    monkeypatch.setattr(torch, "cuda", fake)
    graph, output = _cuda_graph.record(lambda: events.append("run") or X)
    warm = ["side begins", "run", "run", "run", "side ends"]
    wait = ["side waits for current", *warm, "current waits for side"]
    assert events == [*wait, "graph on side begins", "run", "graph on side ends"]
    assert isinstance(graph, FakeGraph) and output is X


def test_noise_levels_of_each_sample_are_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    capture_on_the_host(monkeypatch)
    config = DSNOConfig(
        image_size=4,
        image_channels=1,
        channels=32,
        channel_mult=(1,),
        num_res_blocks=1,
        attention_resolutions=(),
        embedding_dim=32,
        num_classes=3,
    )
    x, logsnr, y = torch.randn(2, 1, 4, 4), torch.randn(2, 4), torch.tensor([1, -1])
    model = DSNO(config).eval()
    with torch.no_grad():  # the last convolution starts at zero
        nn.init.normal_(model.all_modules[-1].weight)
    captured = CapturedModel(model, x, logsnr, y)
    with torch.no_grad():
        for levels in (logsnr, logsnr + 3.0):
            assert torch.equal(captured(x, levels, y), model(x, levels, y))
    with pytest.raises(ValueError, match=r"input 1 was captured with shape \(2, 4\)"):
        captured(x, logsnr[0], y)
