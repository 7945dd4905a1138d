"""The command `sample`."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from dsno_kernels.models import load
from dsno_kernels.sampling.files import Target, check_channels, check_target, to_bytes
from dsno_kernels.sampling.generation import (
    PRECISIONS,
    batches,
    class_labels,
    read_logsnr,
    resampled,
)
from dsno_kernels.training.distributed import choose_device
from dsno_kernels.training.errors import CommandError

PACKAGED = "digits"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `sample`."""

    def add(flag: str, text: str, **options: Any) -> None:
        parser.add_argument(flag, help=f"{text}; default: %(default)s", **options)

    add("--model", "a DSNO's file, or the packaged one", metavar="FILE", default=PACKAGED)
    parser.add_argument(
        "--out",
        type=Path,
        metavar="PATH",
        default=Path("samples.png"),
        help="FILE.png (all in one picture), FILE.npz, or a folder of PNGs; default: %(default)s",
    )
    add("--count", "how many images", type=positive, metavar="N", default=64)
    add("--batch", "images an evaluation", type=positive, metavar="N", default=256)
    add("--seed", "image i depends on it and on i", type=int, metavar="N", default=0)
    parser.add_argument(
        "--labels",
        "--label",
        type=int,
        nargs="+",
        metavar="N",
        help="classes, gone through again and again; default: all in turn",
    )
    parser.add_argument(
        "--strip", action="store_true", help="draw each sample's way from noise to image as a row"
    )
    parser.add_argument(
        "--times", type=positive, metavar="N", help="times on that way; default: as in training"
    )
    add("--device", "where", choices=("auto", "cpu", "cuda"), default="auto")
    add("--precision", "bf16 is autocast", choices=PRECISIONS, default="fp32")
    parser.add_argument(
        "--cuda-graph", action="store_true", help="capture the evaluation once and replay it"
    )


def run(arguments: argparse.Namespace) -> None:
    """The command `sample`.

    Raises:
        CommandError: arguments that do not fit the model, or a place that cannot be written.
        ModelFileError: a file that is no DSNO.
    """
    from tqdm import tqdm

    out, count = arguments.out, arguments.count
    check_target(out, arguments.strip)
    device = choose_device(arguments.device)
    model = load(arguments.model, device, kind="dsno")
    check_channels(out, model.config.image_channels)
    logsnr = read_logsnr(arguments.model)
    try:
        if arguments.times is not None:
            logsnr = resampled(logsnr, arguments.times, model)
        labels = class_labels(model, arguments.labels, count)
        options = (arguments.seed, arguments.batch, arguments.precision, arguments.cuda_graph)
        parts = batches(model, logsnr, labels, count, *options)
        with tqdm(total=count, unit="image", dynamic_ncols=True) as bar:
            target = Target(out, labels)
            seconds = 0.0
            started = time.perf_counter()
            for noise, states in parts:
                images = (
                    torch.cat([noise[:, None], states], 1) if arguments.strip else states[:, -1:]
                )
                if not bool(images.isfinite().all()):
                    raise CommandError(f"{arguments.model} made values that are not finite")
                pixels = to_bytes(images)
                seconds += time.perf_counter() - started
                target.add(pixels)
                bar.update(len(pixels))
                started = time.perf_counter()
            target.close()
    except ValueError as error:
        raise CommandError(str(error)) from None
    except OSError as error:
        raise CommandError(
            f"--out {out} cannot be written ({error.strerror}); give a place that can"
        ) from None
    print(
        f"{out}: {count} images, one evaluation each, in {seconds:.2f} s:"
        f" {count / seconds:.1f} images/s ({device}, {arguments.precision})"
    )


def positive(text: str) -> int:
    """An argument of a command that must be at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value
