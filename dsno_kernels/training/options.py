"""How a network is trained: the options that all training commands share."""

from __future__ import annotations

import argparse
import dataclasses
import math
from dataclasses import dataclass

import torch

from dsno_kernels.training.errors import CommandError

PRECISIONS = ("fp32", "bf16")
DECAYS = ("constant", "cosine")
PARALLEL = ("ddp", "fsdp")


@dataclass(frozen=True)
class Options:
    """How :func:`dsno_kernels.training.loop.fit` trains.

    Args:
        steps: updates of the weights.
        batch: samples an update, over all processes.
        learning_rate: of Adam, after the warm-up.
        warm_up: updates in which the learning rate grows from 0, linearly.
        decay: "constant", or "cosine" down to 0 at the last update.
        milestones: updates at which the learning rate is halved.
        betas: of Adam.
        clip_norm: largest norm of the gradient; None does not clip.
        ema_decay: of the average of the weights; a young average forgets faster.
        seed: of all that is random.
        precision: "fp32", or "bf16" for autocast.
        accumulate: parts in which each process computes its share of a batch.
        parallel: "ddp" (a copy of the model in each process) or "fsdp" (its parts spread over
            them); used where there are several.
        activation_checkpointing: keep only the inputs of the blocks for the backward pass, and
            compute the rest again.
        checkpoint_every: updates between two checkpoints.
        resume: "same" continues a checkpoint of the same options only; "changed" also one with
            another learning rate, decay, clipping, average or number of steps.

    Raises:
        ValueError: a value out of range.
    """

    steps: int
    batch: int
    learning_rate: float
    warm_up: int = 0
    decay: str = "constant"
    milestones: tuple[int, ...] = ()
    betas: tuple[float, float] = (0.9, 0.999)
    clip_norm: float | None = None
    ema_decay: float = 0.999
    seed: int = 0
    precision: str = "fp32"
    accumulate: int = 1
    parallel: str = "ddp"
    activation_checkpointing: bool = False
    checkpoint_every: int = 1000
    resume: str = "same"

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("warm_up", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if any(milestone < 0 for milestone in self.milestones):
            raise ValueError(f"milestones must be at least 0, got {list(self.milestones)}")
        if self.seed >= 2**63:
            raise ValueError(f"seed must be below 2**63, got {self.seed}")
        if not 0.0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")
        if not 0.0 <= self.ema_decay < 1.0:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay}")
        if self.clip_norm is not None and not self.clip_norm > 0.0:
            raise ValueError(f"clip_norm must be positive, got {self.clip_norm}")
        choices = {
            "decay": DECAYS,
            "precision": PRECISIONS,
            "parallel": PARALLEL,
            "resume": ("same", "changed"),
        }
        for name, accepted in choices.items():
            if getattr(self, name) not in accepted:
                given = getattr(self, name)
                raise ValueError(f"{name} must be one of {', '.join(accepted)}, got {given!r}")

    def rate(self, step: int) -> float:
        """The learning rate of an update; the first is 0."""
        factor = min(1.0, (step + 1) / self.warm_up) if self.warm_up else 1.0
        if self.decay == "cosine":
            factor *= 0.5 * (1.0 + math.cos(math.pi * step / self.steps))
        return self.learning_rate * factor * 0.5 ** sum(step >= m for m in self.milestones)

    def ema_weight(self, step: int) -> float:
        """What the average takes of the weights after an update; it must not remember the random
        start for long.
        """
        return 1.0 - min(self.ema_decay, (step + 1) / (step + 10))

    def identity(self) -> dict[str, object]:
        """What decides the result up to rounding, in which a checkpoint must agree; with dropout
        also `accumulate` and the number of processes do.
        """
        free = {"accumulate", "parallel", "activation_checkpointing", "checkpoint_every", "resume"}
        if self.resume == "changed":
            free |= {"steps", "learning_rate", "warm_up", "decay", "milestones", "betas"}
            free |= {"clip_norm", "ema_decay", "precision"}
        elif self.decay == "constant":
            free |= {"steps"}  # more of them continue the same curve
        fields = dataclasses.asdict(self)
        return {name: value for name, value in fields.items() if name not in free}


def add_arguments(parser: argparse.ArgumentParser, defaults: Options) -> None:
    """The options of the learning, with the defaults of a command; see :class:`Options`."""
    group = parser.add_argument_group("learning")

    def add(name: str, kind: type, text: str, **more: object) -> None:
        value = getattr(defaults, name)
        flag, metavar = f"--{name.replace('_', '-')}", "X" if kind is float else "N"
        shown = "none" if value is None else "%(default)s"
        text = f"{text}; default: {shown}"
        group.add_argument(flag, type=kind, default=value, metavar=metavar, help=text, **more)  # type: ignore[arg-type]

    add("steps", int, "updates of the weights")
    add("batch", int, "samples an update, over all processes")
    add("learning_rate", float, "of Adam")
    add("warm_up", int, "updates in which the learning rate grows")
    group.add_argument(
        "--decay",
        choices=DECAYS,
        default=defaults.decay,
        help="of the learning rate; default: %(default)s",
    )
    group.add_argument(
        "--milestones",
        type=int,
        nargs="*",
        default=defaults.milestones,
        metavar="N",
        help="updates at which the learning rate is halved",
    )
    add("clip_norm", float, "largest norm of the gradient")
    add("ema_decay", float, "of the average of the weights, which is the result")
    add("seed", int, "of all that is random")
    group.add_argument(
        "--precision",
        choices=("auto", *PRECISIONS),
        default="auto",
        help="bf16 is autocast; auto: bf16 on a GPU that has it, else fp32",
    )
    group = parser.add_argument_group("running")
    group.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s"
    )
    add("accumulate", int, "parts in which a process computes its share of a batch")
    group.add_argument(
        "--parallel",
        choices=PARALLEL,
        default=defaults.parallel,
        help="for several processes under torchrun; default: %(default)s",
    )
    group.add_argument(
        "--activation-checkpointing",
        action="store_true",
        help="less memory, a third more work",
    )
    add("checkpoint_every", int, "updates between two checkpoints")
    group.add_argument(
        "--resume",
        choices=("same", "changed"),
        default="same",
        help="a checkpoint in --out is continued where its options are the same, or also with"
        " changed options of the learning; default: %(default)s",
    )


def from_arguments(arguments: argparse.Namespace, device: torch.device) -> Options:
    """The options of a command line.

    Raises:
        CommandError: a value out of range.
    """
    values = {
        field.name: getattr(arguments, field.name)
        for field in dataclasses.fields(Options)
        if hasattr(arguments, field.name)
    }
    values["milestones"] = tuple(values["milestones"])
    if values["precision"] == "auto":
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        values["precision"] = "bf16" if bf16 else "fp32"
    try:
        return Options(**values)
    except ValueError as error:
        name, _, rest = str(error).partition(" ")
        raise CommandError(f"--{name.replace('_', '-')} {rest}") from None
