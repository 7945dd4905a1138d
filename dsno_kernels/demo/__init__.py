"""The demo: train a small DSNO on real images, sample in one evaluation, compare the layers; one
picture, one table.

python -m dsno_kernels demo [--data FOLDER] [--out demo_output] [--seed 0] [--steps N] [--device
auto]
"""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from pathlib import Path

_EXTRAS = {
    "sklearn": "scikit-learn",
    "tqdm": "tqdm",
    "matplotlib": "matplotlib",
    "PIL": "pillow",
    "numpy": "numpy",
}

STEPS = 900


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        prog="python -m dsno_kernels demo",
        description="Train a small DSNO on real images, sample in one step, compare the layers.",
    )
    options.add_argument(
        "--data", type=Path, metavar="FOLDER", help="PNG or JPEG images; default: real 8x8 digits"
    )
    options.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        default=Path("demo_output"),
        help="default: %(default)s",
    )
    options.add_argument(
        "--size",
        type=int,
        choices=(8, 16),
        default=8,
        help="pixels a side, for --data (16: 4x slower)",
    )
    options.add_argument(
        "--steps",
        type=_positive,
        default=STEPS,
        metavar="N",
        help="training steps; default: %(default)s",
    )
    options.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    options.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s"
    )
    return options


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


def main(argv: list[str] | None = None) -> int:
    """Run the demo.

    Args:
        argv: the arguments after ``demo``; None takes those of the process.

    Returns:
        0; 2 for input that cannot be used or a package that is missing, with one line on stderr;
        130 after Ctrl-C.
    """
    options = parser().parse_args(argv)
    try:
        if missing := missing_extras():
            return _fail(f"missing {', '.join(missing)}; run: pip install dsno-kernels[demo]")
        return _run(options)
    except KeyboardInterrupt:
        print("\ndemo: interrupted", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace) -> int:
    """The demo, with its warnings on stderr."""
    from dsno_kernels.demo.data import DemoError
    from dsno_kernels.demo.run import run

    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("demo: warning: %(message)s"))
    logger = logging.getLogger(__name__)
    logger.addHandler(handler)
    try:
        run(options)
    except DemoError as error:
        return _fail(str(error))
    finally:
        logger.removeHandler(handler)
    return 0


def _fail(message: str) -> int:
    print(f"demo: {message}", file=sys.stderr)
    return 2
