"""The tables of training by denoising and of EDM's sampler, each without the network."""

from __future__ import annotations

import math

from benchmarks.report_data import Entry, Result, caption, milliseconds, table

OPS = ("denoising", "denoising_copy", "heun")
AIM = 5.0  # speed-up over EDM's eager code, at these shapes on a CPU
AT, HEUN_AT = [64, 3, 32, 32], [8, 3, 256, 256]


def speedup(entry: Entry, aimed: bool) -> str:
    text = f"**{entry['ratio']:.2f}x**"
    return f"{text}, {'met' if entry['ratio'] >= AIM else 'missed'}" if aimed else text


def title(entry: Entry) -> str:
    return " x ".join(map(str, entry["shape"]))


def order(entry: Entry) -> tuple[int, bool, int, str]:
    drawn = entry.get("drawn", False)
    return math.prod(entry["shape"]), not drawn, entry.get("threads", 1), entry["peer"]


def training(result: Result, on_gpu: bool) -> str:
    rows = [
        [
            title(entry),
            "drawn" if entry["drawn"] else "given",
            *([] if on_gpu else [str(entry["threads"])]),
            entry["peer"],
            milliseconds(entry["baseline_seconds"]),
            milliseconds(entry["seconds"]),
            speedup(entry, not on_gpu and entry["peer"] == "eager" and entry["shape"] == AT),
            f"{entry['share_of_copy']:.0%}",
            f"{max(entry['errors'].values()):.1e}",
        ]
        for entry in sorted(result.select(op="denoising"), key=order)
    ]
    threads = [] if on_gpu else ["threads"]
    head = ["images", "noise", *threads, "peer", "its time", "this library"]
    gain = "speed-up" if on_gpu else f"speed-up (≥ {AIM:g}x)"
    return table([*head, gain, "of copy", "error"], rows)


def heun(result: Result, on_gpu: bool) -> str:
    rows = [
        [
            title(entry),
            *([] if on_gpu else [str(entry["threads"])]),
            milliseconds(entry["baseline_seconds"] / entry["steps"]),
            milliseconds(entry["seconds"] / entry["steps"]),
            speedup(entry, not on_gpu and entry["shape"] == HEUN_AT),
            f"{entry['errors']['peer']:.1e}",
            f"{entry['errors']['x']:.1e}",
        ]
        for entry in sorted(result.select(op="heun"), key=order)
    ]
    threads = [] if on_gpu else ["threads"]
    head = ["Heun", *threads, "EDM's sampler", "this library", "speed-up", "its error", "our error"]
    return table(head, rows)


def of_one_gib(result: Result) -> list[str]:
    """What tensors of 1 GiB say, in a sentence each."""
    return [
        f"Images of 1 GiB, noise {'drawn' if entry['drawn'] else 'given'}:"
        f" {entry['gbytes']:.0f} GB/s, {entry['share_of_copy']:.0%} of the rate of a copy."
        for entry in result.select(op="denoising_copy")
    ]


def denoising(results: list[Result]) -> str:
    """`noised`, `denoising_loss` and its backward beside EDM's code; a step of its sampler."""
    parts = []
    for result in results:
        on_gpu = result.machine["device"] == "cuda"
        parts.append(caption(result, *OPS))
        for op, make in (("denoising", training), ("heun", heun)):
            if result.select(op=op):
                parts.append(make(result, on_gpu))
        parts += of_one_gib(result)
    parts.append(
        "The input of the network, the weighted loss and its gradient by the network's output, in"
        " turns with EDM's own code; `drawn` noise is made in the kernels (`torch.randn_like` in"
        " EDM's code). `of copy` is the share of the rate of a copy in the same run, of the tensors"
        " that the kernels read and write; drawing noise is arithmetic on top. `error` is the"
        " largest relative RMS error of input, loss and gradient against float64. Heun: a step of a"
        " run of 13, two calls of the network, which costs nothing; errors of whole runs against"
        " float64, with a network in float32."
    )
    return "\n\n".join(parts)
