"""The tables of sampler steps of order 3: the fused step alone, and diffusers' schedulers with it.

Each entry is one of ours beside one peer; a row holds those of one shape, step and thread count.
"""

from __future__ import annotations

import math
import statistics

from benchmarks.report_data import Entry, Result, caption, milliseconds, table

# Speed-ups aimed at on a CPU; that over torch.compile is of the bare combination, without guidance.
AIMS = {"torch.compile": 2.0, "DEIS-3": 10.0, "DPM++3M": 8.0, "UniPC-3": 15.0}
COPY_SHAPE, COPY_AIM = (8, 3, 256, 256), 0.85  # share of this machine's copy bandwidth there
HOST_AIMS = {"exp_step": 25e-6, "scheduler": 60e-6}  # seconds of the host a call

Case = tuple[tuple[int, ...], bool, int]  # shape, whether guided, threads
Cases = dict[Case, dict[str, Entry]]


def judged(text: str, met: bool) -> str:
    return f"{text}, {'met' if met else '**missed**'}"


def short(peer: str) -> str:
    return peer.removeprefix("diffusers ")


def cases(entries: list[Entry]) -> Cases:
    """The entries of each case by the short name of the peer, small shapes first."""
    found: Cases = {}
    for entry in entries:
        case = tuple(entry.get("shape", ())), entry.get("guided", False), entry.get("threads", 1)
        found.setdefault(case, {})[short(entry["peer"])] = entry
    return dict(sorted(found.items(), key=lambda item: (math.prod(item[0][0]), *item[0])))


def middle(peers: dict[str, Entry], key: str) -> float:
    """Our own number, which was measured once beside each peer."""
    return statistics.median(entry[key] for entry in peers.values())


def limit(entry: Entry) -> str:
    """The speed-up of a copy that moves as many bytes as ours, where one was timed."""
    if "copy_seconds" not in entry:
        return ""
    return f" of {entry['baseline_seconds'] / entry['copy_seconds']:.1f}x"


def own_time(seconds: float, in_kernel: float | None) -> str:
    """Our time and, where it was measured, the part of it that the kernel takes."""
    text = milliseconds(seconds)
    return text if in_kernel is None else f"{text} ({milliseconds(in_kernel)})"


def speedup(peers: dict[str, Entry], name: str, aims: bool, timed: bool = False) -> str:
    """The speed-up over a peer, whether it is what was aimed at, if not its limit, and first our
    time if `timed`.
    """
    if name not in peers:
        return ""
    entry = peers[name]
    text = f"{entry['ratio']:.1f}x"
    if timed:
        text = f"{own_time(entry['seconds'], entry.get('kernel_seconds'))}, {text}"
    aimed = aims and name in AIMS and not (name == "torch.compile" and entry["guided"])
    if not aimed:
        return text
    met = entry["ratio"] >= AIMS[name]
    return judged(text if met else text + limit(entry), met)


def step_table(found: Cases, on_gpu: bool, own_times: bool) -> str:
    """A row a case; `own_times`: each peer has a counterpart of ours, with a time of its own."""
    names = list(dict.fromkeys(name for peers in found.values() for name in peers))
    rows = []
    for (shape, guided, threads), peers in found.items():
        row = [" x ".join(map(str, shape)), "guided" if guided else "plain"]
        row += [] if on_gpu else [str(threads)]
        if not own_times:
            share = middle(peers, "share_of_copy")
            aimed = not on_gpu and shape == COPY_SHAPE
            measured = all("kernel_seconds" in entry for entry in peers.values())
            in_kernel = middle(peers, "kernel_seconds") if measured else None
            row.append(own_time(middle(peers, "seconds"), in_kernel))
            row.append(judged(f"{share:.0%}", share >= COPY_AIM) if aimed else f"{share:.0%}")
        rows.append(row + [speedup(peers, name, not on_gpu, own_times) for name in names])
    head = ["shape", "step", *([] if on_gpu else ["threads"])]
    head += [] if own_times else ["time", "of copy"]
    aims = {} if on_gpu else AIMS
    return table([*head, *(f"{n} (≥ {aims[n]:g}x)" if n in aims else n for n in names)], rows)


def traffic_table(found: Cases) -> str:
    """What a step reads and writes, ours and each peer's, in tensors of the state's size."""
    rows: dict[str, dict[str, str]] = {}
    for (_, guided, _), peers in found.items():
        row = rows.setdefault("guided" if guided else "plain", {})
        for name, entry in peers.items():
            if "traffic" in entry:
                own, other = (sum(entry[key].values()) for key in ("traffic", "peer_traffic"))
                row[name] = f"{own:.3g} : {other:.3g}"
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = [[step, *(row.get(name, "") for name in names)] for step, row in rows.items() if row]
    return table(["tensors moved, ours : theirs", *names], lines) if lines else ""


def host_table(found: Cases, op: str) -> str:
    """What the host takes for a call on 256 elements, a row a peer."""
    aim, rows = HOST_AIMS[op], []
    for (_, guided, _), peers in found.items():
        for name, entry in peers.items():
            time = milliseconds(entry["seconds"])
            # The guided step is `solver_step`: the aim of `exp_step` is not its own.
            aimed = op != "exp_step" or not guided
            rows.append(
                [
                    name,
                    "guided" if guided else "plain",
                    milliseconds(entry["baseline_seconds"]),
                    judged(time, entry["seconds"] <= aim) if aimed else time,
                    f"**{entry['ratio']:.1f}x**",
                ]
            )
    head = ("256 elements", "step", "host time", f"ours (≤ {aim * 1e6:g} µs)", "speed-up")
    return table(head, rows)


def loop_table(found: Cases, on_gpu: bool) -> str:
    """Whole runs whose model costs nothing."""
    names = list(dict.fromkeys(name for peers in found.values() for name in peers))
    steps = next(iter(next(iter(found.values())).values()))["steps"]
    rows = [
        [
            " x ".join(map(str, shape)),
            *([] if on_gpu else [str(threads)]),
            *(speedup(peers, name, aims=False, timed=True) for name in names),
        ]
        for (shape, _, threads), peers in found.items()
    ]
    return table([f"{steps} steps", *([] if on_gpu else ["threads"]), *names], rows)


def parts(result: Result, op: str) -> list[str]:
    """Caption and tables of a machine that has measured something of `op`."""
    ops = (op, f"{op}_loop", f"{op}_overhead")
    step, loop, host = (cases(result.select(op=name)) for name in ops)
    on_gpu = result.machine["device"] == "cuda"
    made = [caption(result, *ops)]
    if step:
        made.append(step_table(step, on_gpu, own_times=op == "scheduler"))
        made.append(traffic_table(step))
    if loop:
        made.append(loop_table(loop, on_gpu))
    if host:
        made.append(host_table(host, op))
    return [part for part in made if part]


def limits(results: list[Result]) -> str:
    """What the text below the tables says of kernels and limits; both are those of a CPU."""
    if all(result.machine["device"] == "cuda" for result in results):
        return ""
    text = (
        " Beside a missed aim stands its limit: the speed-up over the same peer of a copy that"
        " reads and writes as many bytes in all as our step, timed in turns with that peer."
    )
    if any("kernel_seconds" in entry for result in results for entry in result.entries):
        text = (
            " In brackets the part of our time in the kernel; the rest is the host's, in caches"
            " that the step's own tensors leave cold." + text
        )
    return text


def exp_step(results: list[Result]) -> str:
    """One step of order 3 beside the same arithmetic in PyTorch and steps of diffusers."""
    text = [part for result in results for part in parts(result, "exp_step")]
    text.append(
        "`time` is that of `exp_step`, guided of `solver_step`, which also writes the new entry of"
        " history; `of copy` is the share of the rate of a copy with as many threads in the same"
        " run, above 100% where the tensors stay in the caches. Then the speed-up over each peer,"
        " timed in turns with it: the same arithmetic in PyTorch, and whole steps of diffusers'"
        " schedulers." + limits(results)
    )
    return "\n\n".join(text)


def schedulers(results: list[Result]) -> str:
    """Steps of diffusers' schedulers beside ours, which take their place."""
    text = [part for result in results for part in parts(result, "scheduler")]
    text.append(
        "In each column the time of our scheduler and its speed-up over that of diffusers, timed in"
        " turns with it; a guided step combines the model's two outputs too, ours in the same pass."
        + limits(results)
    )
    return "\n\n".join(text)
