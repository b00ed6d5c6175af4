"""Cases along one axis from which nnU-Net plans as from the true ones, made of unpaired spacings and extents.

nnU-Net's planner reads shapes and spacings per axis: percentiles of the spacings, the median of
``round(spacing / target * shape)``, which the extents decide, and the median of the shapes, for a threshold (has an
axis fewer than a third of the voxels of the others?). The first is the same for every pairing of spacings with extents.
The second is that of the true cases if the one or two in the middle have their true extent and the others stay on
their side. The third then follows from how many voxels the others have, which is free within their side.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

__all__ = ["pair"]

_ROUNDING = 1e-5  # of extents in mm and in voxels, where spacings are float32; far below every grid


def pair(
    spacings_mm: NDArray[np.float64], extents_mm: NDArray[np.float64], *, median_shape: float
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Shapes in voxels, and the spacing of each, for cases whose extents ascend.

    Args:
        spacings_mm: One per case, ascending.
        extents_mm: As many, ascending: spacing * shape of the true cases.
        median_shape: Median of the shapes of the true cases.
    """
    first, last = (len(extents_mm) - 1) // 2, len(extents_mm) // 2
    partners = _cheapest_columns(
        np.stack([_costs_of_partners(spacings_mm, extents_mm[rank], rank) for rank in sorted({first, last})])
    )
    others = np.delete(spacings_mm, partners)
    spacings = np.concatenate([others[:first], spacings_mm[partners], others[first:]])
    shapes = np.maximum(np.round(extents_mm / spacings), 1)
    below, middle, above = shapes[:first], shapes[first : last + 1], shapes[last + 1 :]
    most_below = np.floor(middle[0] * spacings[first] / spacings[:first] + _ROUNDING)
    least_above = np.ceil(middle[-1] * spacings[last] / spacings[last + 1 :] - _ROUNDING)

    def on_their_side(below: NDArray[np.float64] | int, above: NDArray[np.float64] | int) -> NDArray[np.float64]:
        parts = (np.minimum(below, most_below), middle, np.maximum(above, least_above))
        return np.concatenate(parts).clip(min=1)

    def around(twice_shape: int) -> NDArray[np.float64]:
        return on_their_side(twice_shape // 2, (twice_shape + 1) // 2)

    shapes = on_their_side(below, above)
    if np.median(shapes) != median_shape:
        candidates = range(2, int(4 * median_shape) + 3)
        index = bisect_left(candidates, median_shape, key=lambda twice_shape: float(np.median(around(twice_shape))))
        shapes = around(candidates[min(index, len(candidates) - 1)])
    return shapes.astype(np.int64), spacings


def _costs_of_partners(spacings: NDArray[np.float64], extent: float, rank: int) -> NDArray[np.float64]:
    """How far the extent is from a whole multiple of each spacing; among equals, how far the ranks are apart."""
    misfits = np.abs(extent - np.maximum(np.round(extent / spacings), 1) * spacings)
    return np.round(misfits / _ROUNDING) * len(spacings) + np.abs(np.arange(len(spacings)) - rank)


def _cheapest_columns(costs: NDArray[np.float64]) -> list[int]:
    """A column of its own for each of one or two rows, at the least sum: one row gets its best, the other what is left.

    >>> _cheapest_columns(np.array([[0.0, 1.0], [0.0, 9.0]]))
    [1, 0]
    """

    def take_in_turn(rows: Iterable[int]) -> dict[int, int]:
        free, columns = costs.copy(), {}
        for row in rows:
            columns[row] = int(free[row].argmin())
            free[:, columns[row]] = np.inf
        return columns

    choices = map(take_in_turn, permutations(range(len(costs))))
    best = min(choices, key=lambda columns: sum(costs[row, column] for row, column in columns.items()))
    return [best[row] for row in sorted(best)]
