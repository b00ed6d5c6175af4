"""Weighted mean of the sites' layers, summed exactly as replies arrive."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nnunet_flare.aggregation.layers import Layers
from nnunet_flare.errors import ParticipationError

__all__ = ["STEP", "WeightedSum"]

STEP = 2.0**-40
"""Fixed-point step of the sum, in weight units."""
_BLOCK = 8192
"""Values at a time: their float64 and int64 forms stay in the processor's cache."""


class WeightedSum:
    """Weighted mean over sites, layer by layer, in int64 fixed point (step 2**-40).

    Integer addition is exact, so the mean does not depend on the order in which replies arrive, and memory (8 bytes
    a value) does not grow with the number of sites. A site may send any subset of layers: each layer is divided by
    the weights of the sites that sent it (FedAvg, McMahan et al. 2017, Algorithm 1, where all send all).

    Args:
        total_weight: Sum of the weights of all sites that were asked; only its size matters, it keeps every
            contribution below one site's own magnitude.

    >>> total = WeightedSum(total_weight=4)
    >>> total.add({"w": np.float32([1.0])}, weight=3)
    >>> total.add({"w": np.float32([5.0])}, weight=1)
    >>> total.mean()["w"]
    array([2.], dtype=float32)
    """

    def __init__(self, *, total_weight: int) -> None:
        self._total_weight = total_weight
        self._sums: dict[str, NDArray[np.int64]] = {}
        self._weights: dict[str, int] = {}
        self._sites: dict[str, int] = {}

    def add(self, layers: Layers, *, weight: int) -> None:
        """Add one site's layers, checked before (``check_layers``), with a positive integer weight."""
        share = np.float64(weight / self._total_weight / STEP)
        for name, array in layers.items():
            if name not in self._sums:
                self._sums[name] = np.zeros(array.shape, np.int64)
            values, sums = array.reshape(-1), self._sums[name].reshape(-1)
            for start in range(0, values.size, _BLOCK):
                block = slice(start, start + _BLOCK)
                sums[block] += np.rint(values[block] * share).astype(np.int64)
            self._weights[name] = self._weights.get(name, 0) + weight
            self._sites[name] = self._sites.get(name, 0) + 1

    def mean(self, *, min_sites: int = 1) -> dict[str, NDArray[np.float32]]:
        """The weighted mean of every layer that at least ``min_sites`` sites sent, as float32; the sum is then empty.

        Raises:
            ParticipationError: no site has sent anything.
        """
        if not self._sums:
            raise ParticipationError(
                field="round", expected="at least one update", found="none", remedy="see the sites' logs"
            )
        return {
            name: (self._sums.pop(name) * (STEP * self._total_weight / self._weights.pop(name))).astype(np.float32)
            for name, number in self._sites.items()
            if number >= min_sites
        }
