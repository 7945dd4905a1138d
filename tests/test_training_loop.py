"""The training engine in one process: what an update is, exact resuming, and how a run ends."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn

pytest.importorskip("safetensors")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

from dsno_kernels.models.files import read_tensors, write_tensors
from dsno_kernels.training import checkpoint, interrupts, loop
from dsno_kernels.training.errors import CommandError
from dsno_kernels.training.history import History
from dsno_kernels.training.options import Options
from tests import training_runs
from tests.faults import full_disk
from tests.helpers import assert_close
from tests.training_runs import OPTIONS, Task, curve, losses, model, run, same_end

# Adam divides by the root of its second moment: where a gradient is rounding, its steps differ. In
# a few updates of at most 1e-3 a weight of size 0.1 moves by that in 1 of 1e3 places.
WEIGHTS = 1e-3
# The loss before that: float32 sums in another order.
LOSS = 1e-5


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing stopped."""
    out = tmp_path_factory.mktemp("whole")
    run(out)
    return out


def test_updates_are_those_of_a_plain_loop(tmp_path: Path) -> None:
    """Adam with warm-up and clipping, and a growing average, written out."""
    reference, task = model(dropout=0.0), Task()
    optimizer = torch.optim.Adam(reference.parameters(), lr=1.0)
    average = [torch.zeros_like(p) for p in reference.parameters()]
    rows = []
    for update in range(5):
        batch = task.draw(torch.Generator().manual_seed(training_runs.SEEDS[update]), OPTIONS.batch)
        optimizer.zero_grad()
        loss = task.loss(reference, batch)
        loss.backward()
        norm = torch.cat([p.grad.flatten() for p in reference.parameters()]).norm()  # type: ignore[union-attr]
        for p in reference.parameters():
            assert p.grad is not None
            p.grad *= min(1.0, 0.5 / norm.item())
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1.0, (update + 1) / 3)
        optimizer.step()
        decay = min(0.9, (update + 1) / (update + 10)) if update else 0.0
        for mean, p in zip(average, reference.parameters(), strict=True):
            mean += (1.0 - decay) * (p.detach() - mean)
        rows.append([loss.item(), norm.item()])
    result = run(tmp_path, steps=5, dropout=0.0)
    assert not result.training
    assert_close(losses(tmp_path), torch.tensor(rows), LOSS)
    assert losses(tmp_path)[:, 1].max() > 0.5  # something was clipped
    for value, expected in zip(result.parameters(), average, strict=True):
        if expected.abs().max() > 1e-2:
            assert_close(value, expected, WEIGHTS)


def test_the_learning_rate() -> None:
    options = Options(steps=100, batch=1, learning_rate=2.0, warm_up=10, milestones=(50, 80))
    rates = [options.rate(i) for i in (0, 4, 9, 49, 50, 79, 80)]
    assert rates == [0.2, 1.0, 2.0, 2.0, 1.0, 1.0, 0.5]
    options = Options(steps=100, batch=1, learning_rate=2.0, decay="cosine")
    assert [options.rate(i) for i in (0, 50)] == [2.0, 1.0]
    assert 0.0 < options.rate(99) < 1e-3


def test_the_loss_goes_down(tmp_path: Path) -> None:
    run(tmp_path, steps=60, warm_up=5, learning_rate=5e-3, clip_norm=None)
    values = losses(tmp_path)[:, 0]
    assert values[-10:].mean() < 0.7 * values[:10].mean()
    History(tmp_path, 60).draw()
    assert (tmp_path / "loss.png").stat().st_size > 5000


def test_an_interrupted_run_continues_to_the_bit(tmp_path: Path, whole: Path) -> None:
    def interrupt(update: int) -> None:
        if update == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match=r"of step 3 is in .*; the same command continues"):
        run(tmp_path, Task(interrupt))
    # As kill -9 may leave a folder: half a checkpoint, and half a row of a loss that is not saved.
    gone = subprocess.Popen(["true"])
    gone.wait()
    (tmp_path / f"{checkpoint.NAME}.{gone.pid}.part").write_bytes(b"half")
    with open(tmp_path / "loss.csv", "a") as file:
        file.write("4,0.5,0.1,0.001\n5,0.")
    task = Task()
    result = run(tmp_path, task)
    assert task.updates == [3, 4, 5, 6]
    assert same_end(tmp_path, whole)
    assert not list(tmp_path.glob("*.part"))
    state = read_tensors(tmp_path / checkpoint.NAME)[0]
    for name, value in result.state_dict().items():
        assert torch.equal(value, state[f"average.{name}"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_a_signal_saves_what_was_done(number: signal.Signals, tmp_path: Path, whole: Path) -> None:
    def send(update: int) -> None:
        if update == 4:
            signal.raise_signal(number)

    with pytest.raises(KeyboardInterrupt, match=r"of step 5 is in .*; the same command continues"):
        run(tmp_path, Task(send))
    assert all(signal.getsignal(n) == handler for n, handler in interrupts.DEFAULTS.items())
    task = Task()
    run(tmp_path, task)
    assert task.updates == [5, 6]
    assert same_end(tmp_path, whole)


def test_a_second_ctrl_c_does_not_wait(tmp_path: Path) -> None:
    def press(update: int) -> None:
        for _ in range(2 if update == 4 else 0):
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match=r"of step 3 is in"):
        run(tmp_path, Task(press))


def test_without_a_checkpoint_the_command_starts_anew(tmp_path: Path) -> None:
    def interrupt(update: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match=r"^no checkpoint .* yet; the same command starts"):
        run(tmp_path, Task(interrupt))
    task = Task()
    task.factor = float("nan")
    error = r"update 1 is not finite; no checkpoint was written yet; start again with a smaller"
    with pytest.raises(CommandError, match=error):
        run(tmp_path, task)


def test_a_run_in_another_thread(tmp_path: Path) -> None:
    """Where nothing can listen to signals."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(run, tmp_path, steps=1).result()
    assert (tmp_path / checkpoint.NAME).exists()


def test_a_run_that_was_done_is_not_done_again(whole: Path) -> None:
    before, task = curve(whole), Task()
    result = run(whole, task)
    assert task.updates == []
    assert curve(whole) == before
    state = read_tensors(whole / checkpoint.NAME)[0]
    assert all(torch.equal(v, state[f"average.{k}"]) for k, v in result.state_dict().items())


def test_more_steps_continue_the_same_curve(tmp_path: Path, whole: Path) -> None:
    run(tmp_path, steps=4)
    run(tmp_path, steps=7)
    assert same_end(tmp_path, whole)
    cosine = tmp_path / "cosine"
    run(cosine, steps=4, decay="cosine")
    with pytest.raises(CommandError, match=r"of another run: steps was 4, now it is 7"):
        run(cosine, steps=7, decay="cosine")


def test_the_random_numbers_of_the_caller_are_its_own(tmp_path: Path) -> None:
    start, task = model(), Task()
    torch.manual_seed(5)
    expected = torch.get_rng_state()
    loop.fit(start, task, dataclasses.replace(OPTIONS, steps=1), tmp_path, {})
    assert (tmp_path / "loss.png").exists()
    assert torch.equal(torch.get_rng_state(), expected)


def test_accumulated_parts_are_one_batch(tmp_path: Path) -> None:
    run(tmp_path / "one", dropout=0.0)
    run(tmp_path / "four", dropout=0.0, accumulate=4)
    assert_close(losses(tmp_path / "four"), losses(tmp_path / "one"), LOSS)


def test_with_dropout_other_parts_are_another_run(tmp_path: Path) -> None:
    run(tmp_path, steps=2)
    with pytest.raises(CommandError, match=r"of another run: accumulate was 1, now it is 2"):
        run(tmp_path, accumulate=2)
    with (
        mock.patch("dsno_kernels.training.distributed.size", return_value=2),
        pytest.raises(CommandError, match=r"of another run: processes was 1, now it is 2"),
        mock.patch("dsno_kernels.training.distributed.parallelize", lambda model, kind: model),
        mock.patch("torch.distributed.broadcast_object_list"),
    ):
        run(tmp_path)
    task = Task()
    run(tmp_path, task, accumulate=2, resume="changed")
    assert task.updates == [2, 3, 4, 5, 6]
    run(tmp_path / "without", dropout=0.0, steps=2)
    run(tmp_path / "without", dropout=0.0, steps=3, accumulate=2)


def test_activation_checkpointing_computes_the_same_again(tmp_path: Path, whole: Path) -> None:
    """To the bit, dropout included; every block runs twice, and is itself again after the run."""
    calls = []
    start = model()
    block = next(layer for layer in start.all_modules if any(layer.children()))
    block.Conv_0.register_forward_hook(lambda *args: calls.append(1))
    options = dataclasses.replace(OPTIONS, activation_checkpointing=True)
    with mock.patch.object(History, "draw"):
        result = loop.fit(start, Task(), options, tmp_path, {})
    assert len(calls) == 2 * OPTIONS.steps
    assert curve(tmp_path) == curve(whole)
    for trained in (start, result):
        assert all("forward" not in vars(layer) for layer in trained.modules())


def test_bf16_is_autocast(tmp_path: Path, whole: Path) -> None:
    seen = []

    class Watching(Task):
        def loss(self, model: nn.Module, part: dict[str, torch.Tensor]) -> torch.Tensor:
            seen.append(torch.is_autocast_enabled("cpu"))
            return super().loss(model, part)

    result = run(tmp_path, Watching(), precision="bf16")
    assert all(seen) and all(p.dtype == torch.float32 for p in result.parameters())
    # Some 10 layers whose operands have 8 bits of mantissa.
    assert_close(losses(tmp_path)[:, 0], losses(whole)[:, 0], 2e-2)
    assert curve(tmp_path) != curve(whole)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_stops_the_run(what: str, tmp_path: Path, whole: Path) -> None:
    def poison(update: int) -> None:
        task.factor = 1.0 if update != 4 else float("nan") if what == "loss" else 1e38

    task = Task(poison)
    error = rf"the {what} of update 5 is not finite; the checkpoint of step 3 is in .*--resume"
    with pytest.raises(CommandError, match=error):
        run(tmp_path, task)
    run(tmp_path)
    assert same_end(tmp_path, whole)


def test_changed_options_continue_only_on_request(tmp_path: Path) -> None:
    run(tmp_path, steps=3)
    with pytest.raises(CommandError, match=r"learning_rate was 0.001, now it is 0.0005; give the"):
        run(tmp_path, learning_rate=5e-4)
    task = Task()
    run(tmp_path, task, learning_rate=5e-4, resume="changed")
    assert task.updates == [3, 4, 5, 6]
    assert [row.split(",")[3] for row in curve(tmp_path).splitlines()[3:5]] == ["0.001", "0.0005"]


def test_a_checkpoint_of_another_run(tmp_path: Path) -> None:
    run(tmp_path, steps=1)
    before = (tmp_path / checkpoint.NAME).read_bytes()
    for changed, match in (
        ({"batch": 4}, r"batch was 8, now it is 4"),
        ({"seed": 1}, r"seed was 0, now it is 1"),
    ):
        with pytest.raises(CommandError, match=match):
            run(tmp_path, resume="changed", **changed)
    with pytest.raises(CommandError, match=r"of another run: config\.channels was 32, now it is 6"):
        loop.fit(model(), Task(), OPTIONS, tmp_path, {"config": {"channels": 64}})
    assert (tmp_path / checkpoint.NAME).read_bytes() == before


def test_a_broken_checkpoint(tmp_path: Path) -> None:
    run(tmp_path, steps=1)
    path = tmp_path / checkpoint.NAME
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CommandError, match=r"cannot be continued .*; remove it, or give another"):
        run(tmp_path)


@pytest.mark.parametrize(
    "name", ["model.all_modules.0.weight", "optimizer.exp_avg_sq.all_modules.0.weight"]
)
def test_a_checkpoint_that_lacks_a_tensor(name: str, tmp_path: Path) -> None:
    run(tmp_path, steps=1)
    path = tmp_path / checkpoint.NAME
    tensors, metadata = read_tensors(path)
    value = tensors.pop(name)
    for changed in (tensors, {**tensors, name: value[1:]}):
        write_tensors(path, changed, metadata)
        with pytest.raises(CommandError, match=rf"has no {name} of shape \(32, 32\)\); remove it"):
            run(tmp_path)


@pytest.mark.parametrize(
    "damage", [None, b"", b"\x00\xff\xfe\n1,\n\xb2,0.5,0.1,0.1\n"], ids=["none", "empty", "bytes"]
)
def test_a_finished_run_needs_no_loss_curve(damage: bytes | None, tmp_path: Path) -> None:
    options = dataclasses.replace(OPTIONS, steps=1)
    expected = loop.fit(model(), Task(), options, tmp_path, {}).state_dict()
    (tmp_path / "loss.csv").unlink()
    if damage is not None:
        (tmp_path / "loss.csv").write_bytes(damage)
    result = loop.fit(model(), Task(), options, tmp_path, {})
    assert all(torch.equal(v, expected[k]) for k, v in result.state_dict().items())
    assert curve(tmp_path) == "update,loss,gradient_norm,learning_rate\n"


def test_fewer_steps_than_were_done(tmp_path: Path) -> None:
    run(tmp_path, steps=4)
    before = curve(tmp_path)
    with pytest.raises(
        CommandError, match=r"has 4 updates behind it, --steps is 2; give --steps 4"
    ):
        run(tmp_path, steps=2)
    assert curve(tmp_path) == before


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path, whole: Path) -> None:
    with contextlib.ExitStack() as stack:

        def fill(update: int) -> None:
            if update == 5:
                stack.enter_context(full_disk(100_000))

        error = r"File too large; the checkpoint of step 3 is in .*; when that is mended, the same"
        with pytest.raises(CommandError, match=error):
            run(tmp_path, Task(fill))
    assert not list(tmp_path.glob("*.part"))
    run(tmp_path)
    assert same_end(tmp_path, whole)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CommandError, match=r"--out .*file cannot be written"):
        run(tmp_path / "file")


def test_two_runs_in_one_folder(tmp_path: Path, whole: Path) -> None:
    """The second is refused while the first trains; the first is as if it had been alone."""
    refused = []

    def start_another(update: int) -> None:
        if update in (2, 5):
            with pytest.raises(CommandError, match=r"another run writes into --out .*; wait until"):
                run(tmp_path)
            refused.append(update)

    run(tmp_path, Task(start_another))
    assert refused == [2, 5]
    assert same_end(tmp_path, whole)


def test_a_batch_that_does_not_divide(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match=r"--batch 8 does not divide .* a multiple of 3"):
        run(tmp_path, accumulate=3)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"steps": 0}, r"steps must be at least 1, got 0"),
        ({"seed": 2**70}, r"seed must be below 2\*\*63, got 1180591620717411303424"),
        ({"warm_up": -1}, r"warm_up must be at least 0"),
        ({"learning_rate": float("nan")}, r"learning_rate must be positive, got nan"),
        ({"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\)"),
        ({"clip_norm": 0.0}, r"clip_norm must be positive"),
        ({"precision": "fp8"}, r"precision must be one of fp32, bf16, got 'fp8'"),
        ({"decay": "step"}, r"decay must be one of constant, cosine"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_options_are_named(changes: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        dataclasses.replace(OPTIONS, **changes)
