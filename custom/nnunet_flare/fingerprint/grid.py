"""Public grids of millimetres, voxels and shares, on which every site counts its cases alike.

A value counts at a grid point, and the point stands for it afterwards. Points are decimal numbers as people write them
(``7812 / 10000`` is the float of ``0.7812``), so that spacings such as 0.8 or 2.5 mm come back to the last bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from nnunet_flare.errors import DatasetError

__all__ = ["Grid", "extent_grid", "relative_size_grid", "shape_grid", "spacing_grid"]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Ascending points of one quantity.

    Args:
        quantity: What is counted, as errors call it.
        points: The values that stand for all others.
        thresholds: Values from the i-th on count at point i + 1 or above.
    """

    quantity: str
    points: NDArray[np.float64]
    thresholds: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.points)

    def count(self, values: NDArray[np.float64]) -> NDArray[np.int64]:
        """Values at each point.

        Raises:
            DatasetError: a value lies outside the grid.
        """
        lowest, highest = self.points[0], self.points[-1]
        if not ((lowest <= values) & (values <= highest)).all():
            raise DatasetError(
                field=self.quantity,
                expected=f"{lowest:g} to {highest:g} for every training case",
                found="others",
                remedy="correct the images' geometry, or remove these cases",
            )
        where = np.searchsorted(self.thresholds, values, side="right")
        return np.bincount(where, minlength=len(self)).astype(np.int64)


@cache
def spacing_grid() -> Grid:
    """1e-4 mm apart up to 10 mm, and coarser above; finer below 0.1 mm.

    Multiples of 1/2048 mm are on it too: a field of view divided by 256 or 512 voxels is one, such as 0.78125 mm.
    2d images have a spacing of 999 mm along their first axis.
    """
    decimal = _linear((0, 0.01, 1_000_000), (0.01, 0.1, 100_000), (0.1, 10, 10_000))
    coarse = _linear((10, 20, 1000), (20, 100, 100), (100, 1000, 10))
    return _nearest("spacing in mm", np.unique(np.concatenate([decimal, _linear((0.1, 10, 2048)), coarse])))


@cache
def extent_grid() -> Grid:
    """2.5e-3 mm apart up to 320 mm, and coarser above; finer below 1 mm."""
    fine = _linear((0, 1, 10_000), (1, 320, 400), (320, 1000, 50))
    return _nearest("extent in mm", np.concatenate([fine, _linear((1000, 4000, 4), (4000, 20_000, 1))]))


@cache
def shape_grid() -> Grid:
    """Voxels along one axis: every number up to 4096, and coarser above."""
    return _nearest("shape in voxels", _linear((0, 4096, 1), (4096, 2**16, 1 / 16), (2**16, 2**24, 1 / 2**16)))


@cache
def relative_size_grid() -> Grid:
    """1e-4 apart; rounded down, because nnU-Net asks whether the median is below 3/4."""
    points = _linear((0, 1, 10_000))
    return Grid(quantity="relative size after cropping", points=points, thresholds=points[1:])


def _linear(*pieces: tuple[float, float, float]) -> NDArray[np.float64]:
    """Multiples of 1 / steps in (start, end], for each (start, end, steps per unit)."""
    return np.concatenate([np.arange(int(a * n) + 1, int(b * n) + 1) / n for a, b, n in pieces])


def _nearest(quantity: str, points: NDArray[np.float64]) -> Grid:
    return Grid(quantity=quantity, points=points, thresholds=(points[1:] + points[:-1]) / 2)
