r"""The warm-up of a loss whose weights depend on the noise level.

In a warm-up of N updates the weight of update n has the ceiling

.. math:: first\, \left(\frac{last}{first}\right)^{n/N}, \quad n < N

and none from update N on: weights then are as large as they come, beyond `last` too. It depends on
the number of the update alone, which a checkpoint holds, and neither on how many processes train
nor on the parts in which they accumulate gradients.

Source: FDM (arXiv 2306.06991), the official ``loss.py``, which counts the calls of its loss in each
process, one more by a rounding, and starts anew where a run continues.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dsno_kernels.diffusion.processes import integer, one_number


@dataclass(frozen=True)
class WeightWarmUp:
    """The ceiling of a loss's weights in the first updates.

    Args:
        updates: N; 0 is no ceiling.
        first, last: the ceiling of the first update, and where it ends.

    Raises:
        TypeError: updates that are no integer, ceilings that are no numbers. ValueError: updates <
            0; not 0 < first < last, or infinite.

    Example:
        >>> WeightWarmUp(200).ceiling(100)
        50.0
    """

    updates: int = 0
    first: float = 5.0
    last: float = 500.0

    def __post_init__(self) -> None:
        if integer("updates", self.updates) < 0:
            raise ValueError(f"updates must be at least 0, got {self.updates}")
        first, last = (one_number(name, getattr(self, name)) for name in ("first", "last"))
        if not 0.0 < first < last < math.inf:
            raise ValueError(
                f"0 < first < last < inf is required, got first={self.first}, last={self.last}"
            )

    def ceiling(self, update: int) -> float:
        """Of an update, counted from 0; infinite where there is none."""
        if update >= self.updates:
            return math.inf
        return self.first * (self.last / self.first) ** (update / self.updates)


NO_WARM_UP = WeightWarmUp()
