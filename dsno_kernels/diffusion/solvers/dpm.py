r"""DPM-Solver and DPM-Solver++, multistep, with their SDE variants.

In log-SNR, with theta = 0..1 over the step and S, z of :func:`._problem.exponential`,

.. math:: x' = a x + S z \left(\varphi_1(z) m_0 + \varphi_2(z) D_1 + 2 \varphi_3(z) D_2\right)

where D_1 and D_2 are the first derivative and the second divided difference of the history at the
start of the step. The published solvers differ in the weights of D_1 and D_2:

* "midpoint": :math:`\varphi_1/2` on D_1; "heun": exact, :math:`\varphi_2`.
* third order "as shipped" by the official code, diffusers and k-diffusion: half the exact weight
  of D_2, so that it converges with order 2; "exact": the one above, order 3.
* "diffusers_sde": diffusers' SDE-DPM-Solver++ of order 3, whose sign of 1/2 is wrong.

With noise (eta > 0, x0 history only): z = -(1 + eta) h, a times :math:`e^{-\eta h}`, and
:math:`s = \sigma' \sqrt{1 - e^{-2 \eta h}}`.

Source: arXiv 2206.00927, 2211.01095 (sections 4 and 5.3); k-diffusion's ``sample_dpmpp_3m_sde``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsno_kernels.diffusion.solvers._phi import phi
from dsno_kernels.diffusion.solvers._problem import Problem, Rows, by_order, exponential, transfer


def multistep(problem: Problem, order: int, second: str, third: str, eta: float = 0.0) -> Rows:
    """Orders 1 to 3.

    Args:
        second: weights of order 2, "midpoint" or "heun".
        third: weights of order 3, "shipped", "exact" or "diffusers_sde".
        eta: amount of noise; 0 is the ODE.
    """
    orders = problem.orders(order)
    begin, end = problem.points.part(slice(-1)), problem.points.part(slice(1, None))
    a, total = transfer(problem.history, begin, end)
    h = problem.span()
    infinite = torch.isinf(h)
    finite_h = torch.where(infinite, 1.0, h)
    S, z = exponential(problem.history, end, finite_h * (1.0 + eta))
    s = torch.zeros_like(a)
    if eta > 0:
        a = torch.where(infinite, 0.0, a * torch.exp(-eta * finite_h))
        total = torch.where(infinite, end.alpha, S * torch.expm1(z))
        s = end.sigma * torch.sqrt(torch.where(infinite, 1.0, -torch.expm1(-2 * eta * finite_h)))
    log_snr = problem.nodes(lambda points: points.log_snr, int(orders.max()))

    def weights(rows: Tensor, q: int) -> Tensor:
        p = total[rows]
        if q == 1:
            return p[:, None]
        step, S_, z_ = finite_h[rows], S[rows], z[rows]
        r0 = (log_snr[rows, 0] - log_snr[rows, 1]) / step
        exact = S_ * z_ * phi(2, z_)
        if q == 2:
            slope = (0.5 * p if second == "midpoint" else exact) / r0
            return torch.stack([p + slope, -slope], 1)
        r1 = (log_snr[rows, 1] - log_snr[rows, 2]) / step
        curvature = S_ * z_ * phi(3, z_)
        if third == "exact":
            curvature = 2.0 * curvature
        elif third == "diffusers_sde":
            curvature = curvature + S_
        # of the divided differences: D_1 = d0 + r0/(r0+r1) (d0 - d1), D_2 = (d0 - d1)/(r0+r1)
        mixed = (exact * r0 + curvature) / (r0 + r1)
        d0, d1 = (exact + mixed) / r0, -mixed / r1
        return torch.stack([p + d0, d1 - d0, -d1], 1)

    c = by_order(orders, int(orders.max()), weights, like=a)
    return Rows.multistep(problem.points, a, c, s)
