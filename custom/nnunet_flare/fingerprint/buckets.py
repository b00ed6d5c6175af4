"""Intensities as integer counts in public buckets of constant relative width.

Percentiles cannot be averaged over sites. Counts on a grid that is the same for everybody can be added, in any order
and with the same result as counting the pooled values (Masson, Rim, Lee: "DDSketch", VLDB 2019, without its collapse
of buckets, which would make the result depend on the order).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnunet_flare.errors import DatasetError, UpdateError

__all__ = ["RELATIVE_ACCURACY", "BucketCounts"]

RELATIVE_ACCURACY = 0.001
_GAMMA = (1 + RELATIVE_ACCURACY) / (1 - RELATIVE_ACCURACY)
_LOG_GAMMA = math.log(_GAMMA)
_ONE = 400_000  # the bucket of 1.0; every float64, subnormal ones too, then lies in a bucket of its own sign
_LARGEST_BUCKET = 2 * _ONE
_LARGEST_COUNT = 2**53


@dataclass(frozen=True)
class BucketCounts:
    """How many values lie in each bucket; bucket numbers rise with the values.

    Bucket 0 holds the zeros. A value x > 0 lies in bucket ``400000 + ceil(log_gamma(x))`` with
    gamma = (1 + a) / (1 - a), a value x < 0 in the negative of the bucket of -x, and every value of a bucket is
    within the relative accuracy a = ``RELATIVE_ACCURACY`` of the bucket's ``values``.

    Args:
        buckets: Numbers of the buckets that are not empty, ascending.
        counts: Values in each of them, positive.
    """

    buckets: tuple[int, ...] = ()
    counts: tuple[int, ...] = ()

    @classmethod
    def from_values(cls, values: NDArray[Any]) -> BucketCounts:
        """Count the values of an array of any shape.

        Raises:
            DatasetError: a value is NaN or infinite.

        >>> BucketCounts.from_values(np.array([1.0, 0.0, -1.0, 1.0]))
        BucketCounts(buckets=(-400000, 0, 400000), counts=(1, 1, 2))
        """
        flat = np.asarray(values, dtype=np.float64).ravel()
        if not flat.size:
            return cls()
        if not np.isfinite(flat).all():
            raise DatasetError(
                field="intensities",
                expected="finite numbers",
                found="NaN or infinite values",
                remedy="correct the images",
            )
        magnitudes = np.abs(flat)
        logs = np.log(magnitudes, out=np.zeros_like(flat), where=magnitudes > 0)
        buckets = (np.sign(flat) * (np.ceil(logs / _LOG_GAMMA) + _ONE)).astype(np.int64)
        lowest = int(buckets.min())
        counts = np.bincount(buckets - lowest)
        filled = np.flatnonzero(counts)
        return cls(tuple((filled + lowest).tolist()), tuple(counts[filled].tolist()))

    @property
    def total(self) -> int:
        return sum(self.counts)

    @property
    def values(self) -> NDArray[np.float64]:
        """The value that stands for each bucket, ascending."""
        buckets = np.array(self.buckets, dtype=np.float64)
        magnitudes = np.exp((np.abs(buckets) - _ONE) * _LOG_GAMMA) * 2 / (1 + _GAMMA)
        return np.where(buckets == 0, 0.0, np.copysign(magnitudes, buckets))

    def __add__(self, other: BucketCounts) -> BucketCounts:
        """The counts of the values of both."""
        buckets, where = np.unique(np.array(self.buckets + other.buckets, dtype=np.int64), return_inverse=True)
        counts = np.zeros(len(buckets), dtype=np.int64)
        np.add.at(counts, where, np.array(self.counts + other.counts, dtype=np.int64))
        return BucketCounts(tuple(buckets.tolist()), tuple(counts.tolist()))

    @classmethod
    def merge(cls, parts: Iterable[BucketCounts]) -> BucketCounts:
        return sum(parts, start=cls())

    def quantile(self, q: float) -> float:
        """``np.quantile(values, q)``, interpolated linearly between the two nearest ranks.

        Each of the two is known within ``RELATIVE_ACCURACY`` of its own magnitude, and so is the result where both
        have the same sign.

        Args:
            q: Share of the values below, 0 to 1.
        """
        if not 0 <= q <= 1 or not self.counts:
            raise ValueError("a quantile needs 0 <= q <= 1 and at least one value")
        rank = q * (self.total - 1)
        ends = np.cumsum(self.counts)
        below, above = (
            self.values[np.searchsorted(ends, r, side="right")] for r in (math.floor(rank), math.ceil(rank))
        )
        return float(below + (above - below) * (rank - math.floor(rank)))

    def to_json(self) -> dict[str, list[int]]:
        return {"buckets": list(self.buckets), "counts": list(self.counts)}

    @classmethod
    def from_json(cls, sent: object) -> BucketCounts:
        """Read counts that came over the wire.

        Raises:
            UpdateError: they are not two lists of integers of one length, ascending buckets and positive counts.
        """
        if not isinstance(sent, Mapping) or set(sent) != {"buckets", "counts"}:
            raise _refusal("an object with the keys buckets and counts", "another")
        buckets, counts = sent["buckets"], sent["counts"]
        if not all(isinstance(items, list) and all(type(item) is int for item in items) for items in (buckets, counts)):
            raise _refusal("two lists of integers", "something else")
        if len(buckets) != len(counts):
            raise _refusal("as many counts as buckets", f"{len(buckets)} buckets, {len(counts)} counts")
        if any(a >= b for a, b in pairwise([-_LARGEST_BUCKET - 1, *buckets, _LARGEST_BUCKET + 1])):
            raise _refusal(f"ascending bucket numbers, from -{_LARGEST_BUCKET} to {_LARGEST_BUCKET}", "others")
        if any(count <= 0 for count in counts) or sum(counts) > _LARGEST_COUNT:
            raise _refusal("positive counts, 2^53 in all at most", "others")
        return cls(tuple(buckets), tuple(counts))


def _refusal(expected: str, found: str) -> UpdateError:
    return UpdateError(
        field="fingerprint: buckets",
        expected=expected,
        found=found,
        remedy="run the same version of nnunet-flare at every site",
    )
