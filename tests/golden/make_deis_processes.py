r"""Writes deis_processes.npz: DEIS coefficients and trajectories of VPCosine and DiscreteVP.

Everything is computed with 40 digits by mpmath, from the definitions alone, and rounded to float64
at the end; nothing is imported from dsno_kernels. The keys are those of deis_vp_linear.npz:

    <process>/N<steps>/<grid>/rev_ts           the times, float64
    <process>/N<steps>/<grid>/<method>/coef    a, c_0 (newest) .. c_r; of v = x / alpha where the
                                               method is rho_ab
    <process>/N<steps>/<grid>/<method>/traj    the state at each model call, then the sample, from
                                               the first x_T of deis_vp_linear.npz

Time integrals are taken by parts, so that no derivative of rho is needed:

.. math:: \int (t - t_i)^k d\rho = [(t - t_i)^k \rho] - k \int (t - t_i)^{k-1} \rho\, dt

Run it as `python tests/golden/make_deis_processes.py`; it takes a minute.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import mpmath as mp
import numpy as np

HERE = Path(__file__).parent
STEPS, DEGREE = (5, 10, 20), 3
QUADRATURE = mp.mpf("1e-28")  # what mpmath may estimate as an error, of an integral near 1
Number = mp.mpf
# Adams-Bashforth with equal steps, newest first
IPNDM = (
    ((1,), 1),
    ((3, -1), 2),
    ((23, -16, 5), 12),
    ((55, -59, 37, -9), 24),
)


class Cosine:
    """alpha = cos(theta), over cos(theta(0)) where normalized (arXiv 2102.09672, equation 17)."""

    def __init__(self, normalized: bool, t_min: str, t_max: str) -> None:
        self.first = self.theta(mp.mpf(0)) if normalized else mp.mpf(0)
        self.ends = mp.mpf(t_max), mp.mpf(t_min)
        self.grids = ("t1", "t2", "log1", "rho7")

    def theta(self, t: Number) -> Number:
        return (t + mp.mpf(0.008)) / (1 + mp.mpf(0.008)) * mp.pi / 2

    def alpha(self, t: Number) -> Number:
        return mp.cos(self.theta(t)) / mp.cos(self.first)

    def time(self, rho: Number) -> Number:
        theta = mp.acos(mp.cos(self.first) / mp.sqrt(1 + rho**2))
        return theta / (mp.pi / 2) * (1 + mp.mpf(0.008)) - mp.mpf(0.008)

    def cuts(self) -> list[Number]:
        return []


class Discrete:
    """log alpha is linear between the integer times, at which alpha^2 is given."""

    def __init__(self, signals: np.ndarray) -> None:
        self.exponents = [-mp.log(mp.mpf(float(a))) for a in signals]
        self.ends = mp.mpf(len(signals) - 1), mp.mpf(0)
        self.grids = ("t1", "t2", "log1")

    def alpha(self, t: Number) -> Number:
        y, n = self.exponents, min(int(t), len(self.exponents) - 2)
        return mp.exp(-(y[n] + (t - n) * (y[n + 1] - y[n])) / 2)

    def time(self, rho: Number) -> Number:
        y, at = self.exponents, mp.log(1 + rho**2)
        n = min(max(sum(value <= at for value in y) - 1, 0), len(y) - 2)
        return n + (at - y[n]) / (y[n + 1] - y[n])

    def cuts(self) -> list[Number]:
        return [mp.mpf(n) for n in range(len(self.exponents))]


Process = Cosine | Discrete


def rho(process: Process, t: Number) -> Number:
    alpha = process.alpha(t)
    return mp.sqrt(1 - alpha**2) / alpha


def grid(process: Process, kind: str, steps: int) -> list[Number]:
    """N + 1 decreasing times; rounded to float64, in which a plan takes them."""
    begin, end = process.ends
    along = [mp.mpf(i) / steps for i in range(steps + 1)]
    if kind in ("t1", "t2"):
        power = int(kind[1])
        lows = [mp.root(t, power) for t in (begin, end)]
        times = [(lows[0] + (lows[1] - lows[0]) * s) ** power for s in along]
    else:
        ends = [rho(process, t) for t in (begin, end)]
        if kind == "log1":
            ratios = [ends[0] * (ends[1] / ends[0]) ** s for s in along]
        else:
            lows = [mp.root(r, 7) for r in ends]
            ratios = [(lows[0] + (lows[1] - lows[0]) * s) ** 7 for s in along]
        times = [process.time(r) for r in ratios]
    times[0], times[-1] = begin, end
    return [mp.mpf(float(t)) for t in times]


def time_moments(process: Process, begin: Number, end: Number) -> list[Number]:
    """The integrals of (t - begin)^k d rho, k = 0 .. DEGREE."""
    inside = sorted((t for t in process.cuts() if end < t < begin), reverse=True)
    ends = [rho(process, t) for t in (begin, end)]
    moments = [ends[1] - ends[0]]
    for k in range(1, DEGREE + 1):
        total = (end - begin) ** k * ends[1]
        for high, low in pairwise([begin, *inside, end]):
            total -= k * integral(
                lambda t, k=k: (t - begin) ** (k - 1) * rho(process, t), high, low
            )
        moments.append(total)
    return moments


def integral(f: Callable[[Number], Number], begin: Number, end: Number) -> Number:
    method = "gauss-legendre" if abs(end - begin) == 1 else "tanh-sinh"
    value, error = mp.quad(f, [begin, end], error=True, method=method)
    assert error <= QUADRATURE * max(1, abs(value)), (begin, end, error)
    return value


def rho_moments(begin: Number, end: Number) -> list[Number]:
    """The integrals of (rho - begin)^k d rho."""
    return [(end - begin) ** (k + 1) / (k + 1) for k in range(DEGREE + 1)]


def log_moments(begin: Number, end: Number) -> list[Number]:
    """The integrals of (log(rho / begin))^k d rho: by parts, from k = 0."""
    span, moments = mp.log(end / begin), [end - begin]
    for k in range(1, DEGREE + 1):
        moments.append(span**k * end - k * moments[-1])
    return moments


def weights(nodes: list[Number], moments: list[Number]) -> list[Number]:
    """The integral of each Lagrange polynomial; nodes and moments are about the first node."""
    found = []
    for j, own in enumerate(nodes):
        polynomial = [mp.mpf(1)]  # lowest power first
        for k, other in enumerate(nodes):
            if k != j:
                shifted = [mp.mpf(0), *polynomial]
                scaled = [-other * c for c in polynomial] + [mp.mpf(0)]
                polynomial = [(a + b) / (own - other) for a, b in zip(shifted, scaled, strict=True)]
        found.append(mp.fdot(polynomial, moments[: len(polynomial)]))
    return found


def rows(process: Process, times: list[Number]) -> dict[str, list[list[Number]]]:
    """Of each method, a row (a, c_0, .., c_r) a step, for x."""
    ratios = [rho(process, t) for t in times]
    alphas = [process.alpha(t) for t in times]
    logs = [mp.log(r) for r in ratios]
    variables = {"t_ab": times, "rho_ab": ratios, "logrho_ab": logs}
    made: dict[str, list[list[Number]]] = {}
    for i in range(len(times) - 1):
        moments = {
            "t_ab": time_moments(process, times[i], times[i + 1]),
            "rho_ab": rho_moments(ratios[i], ratios[i + 1]),
            "logrho_ab": log_moments(ratios[i], ratios[i + 1]),
        }
        a = alphas[i + 1] / alphas[i]
        for family, u in variables.items():
            for degree in range(DEGREE + 1):
                count = min(i, degree) + 1
                nodes = [u[i - k] - u[i] for k in range(count)]
                c = [alphas[i + 1] * w for w in weights(nodes, moments[family])]
                row = [a, *c, *[mp.mpf(0)] * (degree + 1 - count)]
                made.setdefault(f"{family}{degree}", []).append(row)
        b, divisor = IPNDM[min(i, 3)]
        total = alphas[i + 1] * (ratios[i + 1] - ratios[i])
        c = [total * value / divisor for value in b] + [mp.mpf(0)] * (4 - len(b))
        made.setdefault("ipndm", []).append([a, *c])
    return made


def trajectory(
    process: Process, times: list[Number], table: list[list[Number]], toy: dict[str, list[Number]]
) -> list[list[Number]]:
    """States on the way of x_T by the exact eps of Gaussian data N(mu, diag(s^2))."""
    states, history = [toy["x_T"]], []
    for t, (a, *c) in zip(times, table, strict=False):
        alpha, x = process.alpha(t), states[-1]
        sigma = mp.sqrt(1 - alpha**2)
        eps = [
            sigma * (value - alpha * mu) / ((alpha * s) ** 2 + sigma**2)
            for value, mu, s in zip(x, toy["mu"], toy["s"], strict=True)
        ]
        history = [eps, *history]
        states.append(
            [
                a * value + mp.fsum(w * h[n] for w, h in zip(c, history, strict=False))
                for n, value in enumerate(x)
            ]
        )
    return states


def main() -> None:
    mp.mp.dps = 40
    linear = np.load(HERE / "deis_vp_linear.npz")
    vectors = {"x_T": linear["x_T"][0], "mu": linear["mu"], "s": linear["s"]}
    toy = {name: [mp.mpf(float(v)) for v in vector] for name, vector in vectors.items()}
    signals = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))  # DDPM
    processes: dict[str, Process] = {
        "vp_cos": Cosine(normalized=False, t_min="1e-3", t_max="0.98"),  # the official DEIS code's
        "vp_cos_normalized": Cosine(normalized=True, t_min="1e-3", t_max="0.98"),
        "vp_discrete": Discrete(signals),
    }
    values: dict[str, np.ndarray] = {"alphas_cumprod": signals}
    for name, process in processes.items():
        for steps in STEPS:
            for kind in process.grids:
                key, times = f"{name}/N{steps}/{kind}", grid(process, kind, steps)
                values[f"{key}/rev_ts"] = np.array(times, dtype=np.float64)
                for method, table in rows(process, times).items():
                    states = trajectory(process, times, table, toy)
                    if method.startswith("rho"):
                        alphas = [process.alpha(t) for t in times]
                        table = [
                            [mp.mpf(1), *(c / alphas[i + 1] for c in row[1:])]
                            for i, row in enumerate(table)
                        ]
                    values[f"{key}/{method}/coef"] = np.array(table, dtype=np.float64)
                    values[f"{key}/{method}/traj"] = np.array(states, dtype=np.float64)
        print(name, len(values), flush=True)
    np.savez_compressed(HERE / "deis_processes.npz", **values)


if __name__ == "__main__":
    main()
