"""Sampling with a DSNO: noise in, one forward pass, images out."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dsno_kernels._noise import standard_normal
from dsno_kernels.models import DSNO, CapturedModel, ModelFileError, load, read_metadata
from dsno_kernels.models.dsno import logsnr_schedule

PRECISIONS = ("fp32", "bf16")
# Noise of samples, apart from any stream that noise of training data is drawn from: a student must
# not be judged by the noise it learned from.
STREAM = 0x53414D50


def generate(
    model: DSNO | str | Path,
    count: int,
    *,
    logsnr: Tensor | Sequence[float] | None = None,
    times: int | None = None,
    labels: int | Sequence[int] | Tensor | None = None,
    seed: int = 0,
    batch: int = 256,
    frames: bool = False,
    device: str | torch.device | None = None,
    precision: str = "fp32",
    cuda_graph: bool = False,
) -> Tensor:
    """Images from noise, one evaluation each.

    Args:
        model: a :class:`dk.models.DSNO` in evaluation mode, the file of one, or the name of a model
            that comes with the package ("digits").
        count: how many samples.
        logsnr: log-SNR of the times, ``(T,)``, from noise to image; that of a file by default.
        times: another number of times than `logsnr` has, see :func:`resampled`.
        labels: classes: one for all samples, or a sequence that is gone through again and again;
            all classes in turn by default. A model without classes takes none.
        seed: sample i depends on the seed, on i and on its label, not on count or batch.
        batch: samples an evaluation.
        frames: return the states at all times instead of the image, which is the last one.
        device: of the model of a file; a model stays where it is.
        precision: "fp32" or "bf16" (autocast).
        cuda_graph: replay one CUDA graph for all batches.

    Returns:
        float32 on the model's device: ``(count, C, H, W)`` in [-1, 1], or ``(count, T, C, H, W)``.

    Raises:
        TypeError, ValueError: arguments that do not fit the model (a ModelFileError is a
        ValueError).

    Source: DSNO (arXiv 2211.13449), section 3.

    Example:
        >>> images = dk.generate("digits", 16, labels=range(10))
        >>> images.shape
        torch.Size([16, 1, 8, 8])
    """
    if isinstance(model, DSNO):
        network = model
        if device is not None:
            raise ValueError("device is for a model file; move the model with model.to(device)")
    else:
        network = load(model, device, kind="dsno")
        logsnr = read_logsnr(model) if logsnr is None else logsnr
    if logsnr is None:
        raise ValueError("pass logsnr, the log-SNR of the times the model was trained on")
    logsnr = torch.as_tensor(logsnr, dtype=torch.float32)
    if times is not None:
        logsnr = resampled(logsnr, times, network)
    classes = class_labels(network, labels, count)
    parts = batches(network, logsnr, classes, count, seed, batch, precision, cuda_graph)
    if frames:
        return torch.cat([states for _, states in parts])
    return torch.cat([states[:, -1] for _, states in parts]).clamp_(-1, 1)


def batches(
    model: DSNO,
    logsnr: Tensor,
    labels: Tensor | None,
    count: int,
    seed: int,
    batch: int,
    precision: str = "fp32",
    cuda_graph: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Noise ``(b, C, H, W)`` and states ``(b, T, C, H, W)`` of samples 0, 1, .. in order.

    Args and errors are those of :func:`generate`.
    """
    if count < 1 or batch < 1:
        raise ValueError(f"count and batch must be at least 1, got {count} and {batch}")
    if model.training:
        raise ValueError("the model is in training mode; call model.eval() first")
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    device = next(model.parameters()).device
    logsnr, batch = logsnr.to(device), min(batch, count)
    run: DSNO | CapturedModel = model
    for start in range(0, count, batch):
        size = min(batch, count - start)
        # A graph has one shape: the last batch is filled up with the samples that would follow.
        rows = range(start, start + (batch if cuda_graph else size))
        inputs = [noise_of(model, rows, seed).to(device), logsnr]
        if labels is not None:
            inputs.append(labels[torch.tensor(rows).clamp_max(count - 1)].to(device))
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, precision == "bf16"):
            if cuda_graph and start == 0:
                run = CapturedModel(model, *inputs)
            states = run(*inputs)
        yield inputs[0][:size], states[:size].float()


def noise_of(model: DSNO, indices: range, seed: int) -> Tensor:
    """The noise of samples, float32 ``(len(indices), C, H, W)`` on the CPU."""
    config = model.config
    shape = (config.image_channels, config.image_size, config.image_size)
    return standard_normal(shape, indices, seed, STREAM)


def class_labels(
    model: DSNO, labels: int | Sequence[int] | Tensor | None, count: int
) -> Tensor | None:
    """The class of each sample, int64 ``(count,)``; None for a model without classes."""
    classes = model.config.num_classes
    if classes == 0:
        if labels is not None:
            raise ValueError("labels were given, but the model has no classes")
        return None
    given = torch.atleast_1d(torch.as_tensor(range(classes) if labels is None else labels))
    if given.ndim != 1 or len(given) == 0 or given.is_floating_point():
        raise ValueError(f"labels must be one integer, or integers in a row, got {labels!r}")
    if int(given.min()) < 0 or int(given.max()) >= classes:
        raise ValueError(f"labels must be in 0..{classes - 1}, got {given.tolist()}")
    return given.long().repeat(-(-count // len(given)))[:count]


def resampled(logsnr: Tensor, times: int, model: DSNO) -> Tensor:
    r"""The log-SNRs of another number of times on the same way from noise to image.

    The T times stand at 1/T, 2/T, .. 1 of the way, the noise at 0; N times stand at 1/N, 2/N, .. 1
    of it. Between, the time of the model's cosine schedule is interpolated. The last one, the
    image, stays.

    Args:
        logsnr: ``(T,)``, increasing.
        times: N.
        model: has the schedule; its temporal layers must be able to hold their modes in N times.

    Returns:
        float32 ``(N,)``.

    Raises:
        ValueError: N < 1, or log-SNRs that do not increase.
    """
    if times < 1:
        raise ValueError(f"times must be at least 1, got {times}")
    T, values = len(logsnr), logsnr.double().cpu()
    if bool((values.diff() <= 0).any()):
        raise ValueError(f"logsnr must increase from noise to image, got {values.tolist()}")
    low, high = model.config.logsnr_min, model.config.logsnr_max
    b = math.atan(math.exp(-0.5 * high))
    a = math.atan(math.exp(-0.5 * low)) - b
    cosine_time = (torch.exp(-0.5 * values).atan() - b) / a  # the inverse of logsnr_schedule
    known = [1.0, *cosine_time.tolist()]
    wanted = np.interp(np.arange(1, times + 1) / times, np.arange(T + 1) / T, known)
    return logsnr_schedule(torch.from_numpy(wanted), low, high).float()


def read_logsnr(path: str | Path) -> Tensor:
    """The log-SNRs that a model file was trained on, float32 ``(T,)``.

    Raises:
        ModelFileError: the file has none, or something else.
    """
    text = read_metadata(path).get("logsnr")
    if text is None:
        raise ModelFileError(f"{path} does not say at which times it was trained; pass logsnr")
    try:
        values = torch.tensor(json.loads(text), dtype=torch.float32)
    except (TypeError, ValueError):
        values = torch.empty(0)
    if values.ndim != 1 or len(values) == 0 or bool(values.isnan().any()):
        raise ModelFileError(f"{path}: its times, logsnr, must be a list of numbers, got {text}")
    return values
