"""The demo: train a small DSNO on real images, sample in one evaluation, compare the layers; one
picture, one table.

python -m dsno_kernels demo [--data FOLDER] [--out demo_output] [--seed 0] [--steps N] [--device
auto]
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from dsno_kernels.training.errors import CommandError

_EXTRAS = {
    "sklearn": "scikit-learn",
    "tqdm": "tqdm",
    "matplotlib": "matplotlib",
    "PIL": "pillow",
    "numpy": "numpy",
}

STEPS = 900


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the demo."""
    parser.add_argument(
        "--data", type=Path, metavar="FOLDER", help="PNG or JPEG images; default: real 8x8 digits"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        default=Path("demo_output"),
        help="default: %(default)s",
    )
    parser.add_argument(
        "--size",
        type=int,
        choices=(8, 16),
        default=8,
        help="pixels a side, for --data (16: 4x slower)",
    )
    parser.add_argument(
        "--steps",
        type=_positive,
        default=STEPS,
        metavar="N",
        help="training steps; default: %(default)s",
    )
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s"
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def missing_extras() -> list[str]:
    """The packages the demo needs and this interpreter does not have."""
    missing = []
    for module, package in _EXTRAS.items():
        try:
            importlib.import_module(module)
        except ImportError:
            missing.append(package)
    return missing


def run(arguments: argparse.Namespace) -> None:
    """The command `demo`.

    Raises:
        CommandError: input that cannot be used, or a package that is missing.
    """
    if missing := missing_extras():
        raise CommandError(f"missing {', '.join(missing)}; run: pip install dsno-kernels[demo]")
    from dsno_kernels.demo import steps

    steps.run(arguments)
