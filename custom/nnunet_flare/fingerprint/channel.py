"""Intensities of one channel over the cases of a site, in a form that adds up exactly."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnunet_flare.errors import DatasetError
from nnunet_flare.fingerprint.buckets import BucketCounts
from nnunet_flare.fingerprint.wire import finite_number, fraction, kind, object_with, refusal

__all__ = ["ChannelSummary"]

_ROUNDING = Fraction(1, 10**9)
_UNDERFLOW = Fraction(1, 2**1000)  # squares that small lose their digits


@dataclass(frozen=True, kw_only=True)
class ChannelSummary:
    """Foreground intensities of one channel.

    Args:
        num_cases: Cases that have foreground.
        mean_sum: Sum over these cases of the mean intensity.
        mean_square_sum: Sum over these cases of the mean squared intensity.
        minimum: Smallest draw; infinite without cases.
        maximum: Largest draw; minus infinity without cases.
        buckets: Counts of all draws, equally many per case.
    """

    num_cases: int = 0
    mean_sum: Fraction = Fraction(0)
    mean_square_sum: Fraction = Fraction(0)
    minimum: float = math.inf
    maximum: float = -math.inf
    buckets: BucketCounts = field(default_factory=BucketCounts)

    @classmethod
    def from_case(cls, draws: NDArray[Any]) -> ChannelSummary:
        """Summarise the draws from the foreground of one case."""
        values = np.asarray(draws, dtype=np.float64)
        if not values.size:
            return cls()
        return cls(
            num_cases=1,
            mean_sum=Fraction(float(values.mean())),
            mean_square_sum=Fraction(float(np.square(values).mean())),
            minimum=float(values.min()) + 0.0,  # never -0.0
            maximum=float(values.max()) + 0.0,
            buckets=BucketCounts.from_values(values),
        )

    @property
    def draws_per_case(self) -> int:
        return self.buckets.total // self.num_cases if self.num_cases else 0

    def __add__(self, other: ChannelSummary) -> ChannelSummary:
        """The summary of the cases of both.

        Raises:
            UpdateError: the two were made with different numbers of draws per case: cases would weigh unequally.
        """
        if self.num_cases and other.num_cases and self.draws_per_case != other.draws_per_case:
            raise refusal("draws per case", f"{self.draws_per_case} as elsewhere", str(other.draws_per_case))
        return ChannelSummary(
            num_cases=self.num_cases + other.num_cases,
            mean_sum=self.mean_sum + other.mean_sum,
            mean_square_sum=self.mean_square_sum + other.mean_square_sum,
            minimum=min(self.minimum, other.minimum),
            maximum=max(self.maximum, other.maximum),
            buckets=self.buckets + other.buckets,
        )

    def to_nnunet(self) -> dict[str, float]:
        """Statistics under the names of nnU-Net's ``dataset_fingerprint.json``.

        Raises:
            DatasetError: no case has foreground.
        """
        if not self.num_cases:
            raise DatasetError(
                field="foreground",
                expected="at least one training case with foreground",
                found="none",
                remedy="check the labels of the training cases",
            )
        mean = self.mean_sum / self.num_cases
        variance = max(self.mean_square_sum / self.num_cases - mean**2, Fraction(0))
        percentiles = {"percentile_00_5": 0.005, "median": 0.5, "percentile_99_5": 0.995}
        return {
            "mean": float(mean),
            "std": math.sqrt(variance),
            "min": self.minimum,
            "max": self.maximum,
        } | {name: min(max(self.buckets.quantile(q), self.minimum), self.maximum) for name, q in percentiles.items()}

    def to_json(self) -> dict[str, Any]:
        """JSON form; fractions become text, because their integers are longer than some decoders bear."""
        return {
            "num_cases": self.num_cases,
            "mean_sum": "{}/{}".format(*self.mean_sum.as_integer_ratio()),
            "mean_square_sum": "{}/{}".format(*self.mean_square_sum.as_integer_ratio()),
            "minimum": self.minimum if self.num_cases else None,
            "maximum": self.maximum if self.num_cases else None,
            "buckets": self.buckets.to_json(),
        }

    @classmethod
    def from_json(cls, sent: object) -> ChannelSummary:
        """Read a channel that came over the wire.

        Raises:
            UpdateError: a value is missing, of the wrong type, or contradicts the others.
        """
        values = object_with(sent, "channel", set(cls().to_json()))
        num_cases = values["num_cases"]
        if type(num_cases) is not int or num_cases < 0:
            raise refusal("num_cases", "a count", kind(num_cases))
        if not num_cases:
            if values != cls().to_json():
                raise refusal("num_cases", "cases, where there are intensities", "none")
            return cls()
        mean_sum, mean_square_sum = (fraction(values[name], name) for name in ("mean_sum", "mean_square_sum"))
        buckets = BucketCounts.from_json(values["buckets"])
        minimum, maximum = (finite_number(values[name], name) for name in ("minimum", "maximum"))
        if not buckets.total or buckets.total % num_cases:
            raise refusal("buckets", "equally many draws from every case", "a total that the cases do not divide")
        largest_square_sum = mean_square_sum * (1 + _ROUNDING) + num_cases * _UNDERFLOW
        if largest_square_sum * num_cases < mean_sum**2 or minimum > maximum:
            raise refusal("mean_square_sum", "moments and limits of one distribution", "impossible ones")
        return cls(
            num_cases=num_cases,
            mean_sum=mean_sum,
            mean_square_sum=mean_square_sum,
            minimum=minimum,
            maximum=maximum,
            buckets=buckets,
        )
