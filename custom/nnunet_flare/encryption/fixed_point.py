"""Values as signed integers of a fixed step, and two of them in one slot of a plaintext."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nnunet_flare.encryption.parameters import Parameters

__all__ = ["FixedPoint", "pack", "unpack"]

_RESERVE = 64
Integers = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class FixedPoint:
    """Integers for values of a given range, such that the weighted sum of K sites fits its field.

    Args:
        parameters: Of the scheme; they decide the width of a field.
        max_abs: Values lie between ``-max_abs`` and ``max_abs``, a power of two; what lies beyond is clipped.
        num_sites: K, whose roundings add up.
    """

    parameters: Parameters
    max_abs: float
    num_sites: int

    @property
    def step(self) -> float:
        """Distance of two integers, in units of the values; the sum is off by at most ``num_sites * step / 2``."""
        return self.max_abs / (1 << (self.parameters.field_bits - 1))

    @property
    def largest_sum(self) -> int:
        """Bound of the sum's integers: ``largest / step + K / 2 <= 2^(bits - 1) - 64``."""
        return (1 << (self.parameters.field_bits - 1)) - _RESERVE

    @property
    def largest(self) -> float:
        """Values are clipped to this magnitude."""
        return (self.largest_sum - (self.num_sites + 1) // 2) * self.step

    def encode(self, values: NDArray[np.floating], *, share: float) -> tuple[Integers, int, float]:
        """``round(share * clip(values) / step)``.

        Args:
            values: Finite, any shape.
            share: The site's public part of the weighted mean, 0 to 1: applied before rounding, so that the server
                need only add.

        Returns:
            Integers of the same shape, how many values were clipped, and the largest rounding error in units of
            the weighted values.
        """
        wide = values.astype(np.float64)
        clipped = np.clip(wide, -self.largest, self.largest)
        exact = clipped * (share / self.step)
        integers = np.rint(exact)
        error = float(np.abs(integers - exact).max(initial=0.0)) * self.step
        return integers.astype(np.int64), int(np.count_nonzero(clipped != wide)), error

    def decode(self, sums: Integers, *, share: float) -> NDArray[np.float32]:
        """The mean: ``sums * step / share``, with ``share`` of the sites whose values are in the sum."""
        return (sums * (self.step / share)).astype(np.float32)


def pack(values: Integers, bits: int) -> Integers:
    """Two signed fields to a slot: ``hi * 2^bits + lo``, the even entries low and the odd ones high.

    >>> pack(np.array([-1, 3]), 25).tolist() == [3 * 2**25 - 1]
    True
    """
    return values[0::2] + (values[1::2] << bits)


def unpack(slots: Integers, bits: int) -> Integers:
    """Inverse of ``pack``, also of a sum of packed slots.

    >>> unpack(pack(np.array([-1, 3]), 25) + pack(np.array([-4, -5]), 25), 25)
    array([-5, -2])
    """
    half = 1 << (bits - 1)
    low = ((slots + half) & ((1 << bits) - 1)) - half
    values = np.empty(2 * slots.size, np.int64)
    values[0::2], values[1::2] = low, (slots - low) >> bits
    return values
