"""What this library sets out to reach on an H200, as data: the report says which aims are met."""

from __future__ import annotations

from typing import Any, NamedTuple

DSNO = ("cifar_b32_32", "cifar_b128_32")
IMAGENET = tuple(f"imagenet_b{batch}_{side}" for batch in (8, 32) for side in (64, 32, 16, 8))
LONG = ("t16_32_c256_k8", "t64_32_c256_k16")

# What a number of an entry is called in the report, and whether more of it is better.
METRICS = {
    "share_of_limit": ("share of the limit", True),
    "share_of_copy": ("share of the rate of a copy", True),
    "ratio": ("speed-up over eager", True),
    "diffusers_ratio": ("speed-up over diffusers", True),
    "peak_ratio": ("peak memory / eager", False),
    "error_ratio": ("error / eager's", False),
    "seconds": ("time", False),
}


class Target(NamedTuple):
    """A bound on one number of one entry.

    `title` is the name of a shape or a few words, `where` says which entry it is.
    """

    title: str
    where: dict[str, Any]
    metric: str
    bound: float

    def met(self, value: float) -> bool:
        return value >= self.bound if METRICS[self.metric][1] else value <= self.bound


def _conv(shapes: tuple[str, ...], precision: str, direction: str, **bounds: float) -> list[Target]:
    return [
        Target(
            shape,
            {
                "op": "spectral_conv",
                "shape": shape,
                "precision": precision,
                "direction": direction,
            },
            metric,
            bound,
        )
        for shape in shapes
        for metric, bound in bounds.items()
    ]


TARGETS = (
    *_conv(DSNO, "tf32", "forward", share_of_limit=0.75, ratio=12),
    *_conv(DSNO, "bf16_io", "forward", share_of_limit=0.60, ratio=20),
    *_conv(DSNO, "fp32", "forward", share_of_limit=0.60, ratio=5, error_ratio=1),
    *_conv(DSNO, "tf32", "forward_backward", share_of_limit=0.65, ratio=12, peak_ratio=0.4),
    *_conv(IMAGENET, "tf32", "forward", share_of_limit=0.60),
    *_conv(LONG, "tf32", "forward", share_of_limit=0.50, ratio=6),
    *_conv(("fno_k32",), "fp32", "forward", ratio=3),
    Target(
        "all 22 temporal layers of DSNO-CIFAR, B=32, in a CUDA graph",
        {"op": "temporal_layers", "precision": "tf32", "direction": "forward"},
        "seconds",
        1.2e-3,
    ),
    Target(
        "DSNO-CIFAR, whole model",
        {
            "op": "model",
            "shape": "cifar10",
            "precision": "tf32",
            "direction": "forward",
            "peer": "dsno_kernels",
        },
        "ratio",
        2,
    ),
    *(
        Target(
            f"`noised` and `denoising_loss`, images of 1 GiB, noise {noise}",
            {"op": "denoising_copy", "drawn": noise == "drawn"},
            "share_of_copy",
            0.85,
        )
        for noise in ("given", "drawn")
    ),
    Target(
        "`exp_step` of order 3, tensors of 1 GiB", {"op": "exp_step_copy"}, "share_of_copy", 0.9
    ),
    Target(
        "20 captured steps of order 3, 16 x 4 x 64 x 64",
        {"op": "exp_step_loop"},
        "diffusers_ratio",
        15,
    ),
)


def text(metric: str, value: float) -> str:
    """A number in the unit of its metric."""
    if metric.startswith("share"):
        return f"{value:.0%}"
    if metric == "seconds":
        return f"{value * 1e3:.2f} ms"
    return f"{value:.3g}" + "x" * (metric in ("ratio", "diffusers_ratio"))


def speedups(shape: str) -> dict[tuple[str, str], float]:
    """The speed-ups aimed at for a shape, for each (precision, pass)."""
    return {
        (target.where["precision"], target.where["direction"]): target.bound
        for target in TARGETS
        if target.metric == "ratio" and target.where.get("shape") == shape
    }
