"""Small networks for the tests of commands: written as files, with weights that do something."""

from __future__ import annotations

from pathlib import Path

import torch

import dsno_kernels as dk

LOGSNR = dk.models.logsnr_schedule(torch.linspace(1, 0, 5)[1:])


def network(classes: int = 0, time_conv: bool = True, channels: int = 1) -> dk.models.DSNO:
    """A DSNO for 8x8 images."""
    config = dk.models.DSNOConfig(
        image_size=8,
        image_channels=channels,
        channels=32,
        channel_mult=(1,),
        num_res_blocks=1,
        attention_resolutions=(),
        embedding_dim=32,
        num_classes=classes,
        time_conv=time_conv,
        init_scale=1.0,
    )
    generator = torch.Generator().manual_seed(0)
    model = dk.models.DSNO(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def write_student(path: Path, classes: int = 0) -> Path:
    dk.models.save(network(classes), path, logsnr=LOGSNR.tolist())
    return path


def write_teacher(path: Path, classes: int = 0, **metadata: object) -> Path:
    dk.models.save(dk.models.EDMDenoiser(network(classes, time_conv=False)), path, **metadata)
    return path
