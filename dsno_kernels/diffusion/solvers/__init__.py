"""The solvers by name; see `solvers()`."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from dsno_kernels.diffusion.processes import integer
from dsno_kernels.diffusion.solvers import adams, dpm, runge_kutta, unipc
from dsno_kernels.diffusion.solvers._problem import Problem, Rows

Make = Callable[[Problem], Rows]


@dataclass(frozen=True)
class Solver:
    """A named solver.

    Args:
        name: as in `solvers()`.
        histories: the history types it works on, the default first.
        make: its coefficients.
        noise: the amount of noise (eta) by default; None for a solver without it.
        churn: whether it takes the churn of EDM.
        about: what it is.
    """

    name: str
    histories: tuple[str, ...]
    make: Make
    about: str
    noise: float | None = None
    churn: bool = False


_ANY = ("eps", "x0", "flow")
_TWO = ("eps", "x0")
# Degrees that `solvers()` lists; any other with at most 8 history entries is accepted as well.
_LISTED_DEGREES = range(4)
_MAX_DEGREE = 7


def _adams(name: str, variable: str, degree: int, about: str) -> Solver:
    return Solver(name, _ANY, lambda p: adams.adams(p, degree, variable), about)


def _ipndm(order: int) -> Solver:
    about = f"iPNDM: the weights of {order} equal steps, whatever the grid"
    return Solver(f"ipndm{order}", _ANY, lambda p: adams.ipndm(p, order), about)


def _dpm(prefix: str, history: str, title: str) -> list[Solver]:
    other = "x0" if history == "eps" else "eps"
    kinds = [
        *((f"{k}s", f"singlestep, order {k}") for k in (1, 2, 3)),
        ("1m", "multistep, order 1"),
        ("2m", "multistep, order 2, midpoint"),
        ("2m_heun", "multistep, order 2, exact in log-SNR"),
        ("3m", "multistep, order 3 as shipped by its authors, diffusers and k-diffusion (order 2)"),
        ("3m_exact", "multistep, order 3, exact in log-SNR"),
    ]

    def make(kind: str) -> Make:
        order = int(kind[0])
        if kind.endswith("s"):
            return lambda p: runge_kutta.dpm_singlestep(p, order)
        second = "heun" if kind.endswith(("heun", "exact")) else "midpoint"
        third = "exact" if kind.endswith("exact") else "shipped"
        return lambda p: dpm.multistep(p, order, second, third)

    return [
        Solver(f"{prefix}_{kind}", (history, other), make(kind), f"{title} {about}")
        for kind, about in kinds
    ]


def _sde(name: str, order: int, second: str, third: str, about: str) -> Solver:
    def make(p: Problem) -> Rows:
        return dpm.multistep(p, order, second, third, eta=1.0 if p.eta is None else p.eta)

    return Solver(name, ("x0",), make, f"SDE-DPM-Solver++ {about}", noise=1.0)


def _unipc(name: str, order: int, variant: str, corrector: bool) -> Solver:
    make = unipc.unipc if corrector else unipc.unip
    about = "predictor and corrector" if corrector else "predictor"
    return Solver(
        name, ("x0", "eps"), lambda p: make(p, order, variant), f"UniPC {about}, order {order}"
    )


def _rho_rk(name: str, tableau: str, about: str, churn: bool) -> Solver:
    return Solver(name, ("eps",), lambda p: runge_kutta.rho_rk(p, tableau), about, churn=churn)


def _all() -> dict[str, Solver]:
    found = [Solver("ddim", _TWO, adams.ddim, "DDIM, with noise if eta > 0", noise=0.0)]
    found += [_degree("tab", r) for r in _LISTED_DEGREES]
    found += [_degree("rhoab", r) for r in _LISTED_DEGREES]
    found += [_degree("logrhoab", r) for r in _LISTED_DEGREES]
    found += [
        _adams(f"deis{k}", "log_snr", k - 1, f"diffusers' DEIS of order {k}: logrhoab{k - 1}")
        for k in (1, 2, 3)
    ]
    found += [_ipndm(k) for k in (1, 2, 3, 4)]
    found += [
        _rho_rk(f"rhork_{name}", name, f"Runge-Kutta {name} in rho (DEIS)", churn=False)
        for name in runge_kutta.TABLEAUS
    ]
    found += [
        _rho_rk("euler", "1euler", "Euler in rho, with churn (EDM)", churn=True),
        _rho_rk("heun", "2heun", "Heun in rho, with churn (EDM)", churn=True),
        Solver("flow_euler", ("flow",), lambda p: adams.adams(p, 0, "t"), "Euler on the velocity"),
    ]
    found += _dpm("dpm", "eps", "DPM-Solver") + _dpm("dpmpp", "x0", "DPM-Solver++")
    found += [
        _sde("sde_dpmpp_1", 1, "midpoint", "shipped", "of order 1"),
        _sde("sde_dpmpp_2", 2, "midpoint", "shipped", "of order 2, midpoint"),
        _sde("sde_dpmpp_2_heun", 2, "heun", "shipped", "of order 2, exact in log-SNR"),
        _sde("sde_dpmpp_3", 3, "heun", "shipped", "of order 3 as shipped by k-diffusion"),
        _sde("sde_dpmpp_3_exact", 3, "heun", "exact", "of order 3, exact in log-SNR"),
        _sde(
            *("sde_dpmpp_3_diffusers", 3, "midpoint", "diffusers_sde"),
            "of order 3 as shipped by diffusers, with its wrong sign",
        ),
    ]
    for k in (1, 2, 3):
        for variant in ("bh2", "bh1"):
            found.append(_unipc(f"unip{k}_{variant}", k, variant, corrector=False))
            found.append(_unipc(f"unipc{k}_{variant}", k, variant, corrector=True))
    return {solver.name: solver for solver in found}


def _degree(family: str, degree: int) -> Solver:
    variable = {"tab": "t", "rhoab": "rho", "logrhoab": "log_snr"}[family]
    title = {"tab": "time", "rhoab": "rho", "logrhoab": "log(rho)"}[family]
    about = f"exponential Adams-Bashforth, degree {degree} in {title} (DEIS)"
    return _adams(f"{family}{degree}", variable, degree, about)


_SOLVERS = _all()


def solvers() -> dict[str, str]:
    """What each solver is, by name.

    "tab", "rhoab" and "logrhoab" take any degree up to 7 after their name; a number that a name
    leaves out can be given as `order` to `SolverPlan.build`. UniPC without "_bh1" or "_bh2" is bh2.

    Example:
        >>> dk.diffusion.solvers()["tab3"]
        'exponential Adams-Bashforth, degree 3 in time (DEIS)'
    """
    return {name: solver.about for name, solver in _SOLVERS.items()}


def find(name: str, order: int | None = None) -> Solver:
    """The solver of this name, with `order` as its number where the name has none.

    Raises:
        ValueError: no such solver (lists the known ones), a degree above 7, or a number that
            contradicts the name's.
    """
    full = name
    if order is not None and isinstance(name, str):
        number = re.search(r"\d+", name.partition("_bh")[0])
        if number is None:
            full = _with_number(name, order)
        elif int(number[0]) != order:
            raise ValueError(f"order={order} contradicts the {number[0]} of solver {name!r}")
    for candidate in (full, f"{full}_bh2"):
        if candidate in _SOLVERS:
            return _SOLVERS[candidate]
    family = re.fullmatch(r"(tab|rhoab|logrhoab)(\d+)", str(full))
    if family:
        degree = int(family[2])
        if degree > _MAX_DEGREE:
            raise ValueError(
                f"the degree of solver {family[1]!r} must be at most {_MAX_DEGREE}, got {degree}:"
                " a row reads no more than 8 history entries"
            )
        return _degree(family[1], degree)
    raise ValueError(f"unknown solver {full!r}; known are {', '.join(_SOLVERS)}")


def _with_number(name: str, order: int) -> str:
    """ "unipc_bh1" and 3 make "unipc3_bh1"; "sde_dpmpp" and 2 make "sde_dpmpp_2"."""
    stem, bh, variant = name.partition("_bh")
    joint = "_" if stem == "sde_dpmpp" else ""
    return f"{stem}{joint}{integer('order', order)}{bh}{variant}"
