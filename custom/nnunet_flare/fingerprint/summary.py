"""What one site tells about its training cases, so that merging the sites equals extracting from the pooled cases.

nnU-Net configures itself from a fingerprint of the data set: spacings, shapes and intensity statistics. The published
system averages standard deviations, medians and percentiles over sites, which is not what pooling gives. Here every
field is one that can be added up exactly:

    shapes, spacings            multiset of pairs; the union
    mean, standard deviation    first and second moments per case, summed as fractions: cases weigh equally
    percentiles, median         counts in public buckets, of the same number of draws from every case
    minimum, maximum            minimum, maximum
    sizes after cropping        multiset; the union

``a + b`` is therefore associative and commutative to the last bit, and equals the summary of the cases of both.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import reduce
from operator import add
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from nnunet_flare.errors import DatasetError, UpdateError
from nnunet_flare.fingerprint.buckets import BucketCounts

__all__ = ["CaseValues", "ChannelSummary", "FingerprintSummary", "merge_summaries"]

Number = TypeVar("Number", int, float)
Shape = tuple[int, int, int]
Spacing = tuple[float, float, float]

_FRACTION = re.compile(r"-?\d{1,700}/\d{1,700}")
_ROUNDING = Fraction(1, 10**9)
_LARGEST = 2**1000


@dataclass(frozen=True, kw_only=True)
class CaseValues:
    """What nnU-Net's extractor finds in one training case.

    Args:
        shape: Voxels along each axis after cropping to the non-zero region.
        spacing_mm: Millimetres between voxels along the same axes.
        relative_size: Voxels after cropping / voxels before, in (0, 1].
        intensities: One array of draws from the foreground per channel; all empty where a case has no foreground.
    """

    shape: Sequence[int]
    spacing_mm: Sequence[float]
    relative_size: float
    intensities: Sequence[NDArray[Any]]


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
            raise _refusal("draws per case", f"{self.draws_per_case} as elsewhere", str(other.draws_per_case))
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
        values = _object(sent, "channel", set(cls().to_json()))
        num_cases = values["num_cases"]
        if type(num_cases) is not int or num_cases < 0:
            raise _refusal("num_cases", "a count", _kind(num_cases))
        if not num_cases:
            if values != cls().to_json():
                raise _refusal("num_cases", "cases, where there are intensities", "none")
            return cls()
        mean_sum, mean_square_sum = (_fraction(values[name], name) for name in ("mean_sum", "mean_square_sum"))
        buckets = BucketCounts.from_json(values["buckets"])
        minimum, maximum = (_number(values[name], name) for name in ("minimum", "maximum"))
        if not buckets.total or buckets.total % num_cases:
            raise _refusal("buckets", "equally many draws from every case", "a total that the cases do not divide")
        if mean_square_sum * num_cases * (1 + _ROUNDING) < mean_sum**2 or minimum > maximum:
            raise _refusal("mean_square_sum", "moments and limits of one distribution", "impossible ones")
        return cls(
            num_cases=num_cases,
            mean_sum=mean_sum,
            mean_square_sum=mean_square_sum,
            minimum=minimum,
            maximum=maximum,
            buckets=buckets,
        )


@dataclass(frozen=True, kw_only=True)
class FingerprintSummary:
    """One site's, or the whole federation's, training cases; sorted, so that the order of cases does not show.

    Args:
        geometries: (shape after cropping, spacing in mm) of every case.
        relative_sizes: Voxels after cropping / voxels before, of every case.
        channels: Intensities by channel.
    """

    geometries: tuple[tuple[Shape, Spacing], ...]
    relative_sizes: tuple[float, ...]
    channels: tuple[ChannelSummary, ...]

    @property
    def num_training(self) -> int:
        return len(self.geometries)

    @classmethod
    def from_cases(cls, cases: Iterable[CaseValues]) -> FingerprintSummary:
        """Summarise at least one case; cases are taken one at a time."""
        return merge_summaries(
            cls(
                geometries=((_triple(map(int, case.shape)), _triple(map(float, case.spacing_mm))),),
                relative_sizes=(float(case.relative_size),),
                channels=tuple(map(ChannelSummary.from_case, case.intensities)),
            )
            for case in cases
        )

    def __add__(self, other: FingerprintSummary) -> FingerprintSummary:
        """The summary of the cases of both.

        Raises:
            UpdateError: they have different numbers of channels or of draws per case.
        """
        if len(self.channels) != len(other.channels):
            raise _refusal("channels", f"{len(self.channels)} as elsewhere", str(len(other.channels)))
        return FingerprintSummary(
            geometries=tuple(sorted(self.geometries + other.geometries)),
            relative_sizes=tuple(sorted(self.relative_sizes + other.relative_sizes)),
            channels=tuple(map(add, self.channels, other.channels)),
        )

    def to_nnunet(self) -> dict[str, Any]:
        """The content of nnU-Net's ``dataset_fingerprint.json``, as read back from that file.

        Raises:
            DatasetError: no case has foreground.
        """
        return {
            "spacings": [list(spacing) for _, spacing in self.geometries],
            "shapes_after_crop": [list(shape) for shape, _ in self.geometries],
            "foreground_intensity_properties_per_channel": {
                str(index): channel.to_nnunet() for index, channel in enumerate(self.channels)
            },
            "median_relative_size_after_cropping": float(np.median(self.relative_sizes)),
        }

    def to_json(self) -> dict[str, Any]:
        return {
            "geometries": [[list(shape), list(spacing)] for shape, spacing in self.geometries],
            "relative_sizes": list(self.relative_sizes),
            "channels": [channel.to_json() for channel in self.channels],
        }

    @classmethod
    def from_json(cls, sent: object) -> FingerprintSummary:
        """Read a summary that came over the wire.

        Raises:
            UpdateError: a value is missing, of the wrong type, or contradicts the others.
        """
        values = _object(sent, "summary", {"geometries", "relative_sizes", "channels"})
        geometries = tuple(sorted(map(_geometry, _list(values["geometries"], "geometries"))))
        sizes = _list(values["relative_sizes"], "relative_sizes")
        relative_sizes = tuple(sorted(_number(size, "relative_sizes") for size in sizes))
        channels = tuple(map(ChannelSummary.from_json, _list(values["channels"], "channels")))
        if len(relative_sizes) != len(geometries):
            raise _refusal("relative_sizes", f"{len(geometries)}, one per case", str(len(relative_sizes)))
        if not all(0 < size <= 1 for size in relative_sizes):
            raise _refusal("relative_sizes", "numbers in (0, 1]", "others")
        if any(channel.num_cases > len(geometries) for channel in channels):
            raise _refusal("num_cases", f"{len(geometries)} at most", "more cases with foreground than cases")
        return cls(geometries=geometries, relative_sizes=relative_sizes, channels=channels)


def merge_summaries(summaries: Iterable[FingerprintSummary]) -> FingerprintSummary:
    """The summary of all cases of at least one summary; their order does not matter.

    Raises:
        UpdateError: they have different numbers of channels or of draws per case.
    """
    return reduce(add, summaries)


def _refusal(name: str, expected: str, found: str) -> UpdateError:
    return UpdateError(
        field=f"fingerprint: {name}",
        expected=expected,
        found=found,
        remedy="run the same version of nnunet-flare with the same job at every site",
    )


def _kind(value: object) -> str:
    return repr(value) if isinstance(value, int | float) else type(value).__name__


def _object(sent: object, name: str, keys: set[str]) -> Mapping[str, Any]:
    if not isinstance(sent, Mapping) or set(sent) != keys:
        raise _refusal(name, f"an object with the keys {', '.join(sorted(keys))}", "another")
    return sent


def _list(sent: object, name: str) -> list[Any]:
    if not isinstance(sent, list) or not sent:
        raise _refusal(name, "a list with at least one entry", "another value")
    return sent


def _number(sent: object, name: str) -> float:
    if type(sent) not in (int, float) or not -_LARGEST < sent < _LARGEST:  # type: ignore[operator]
        raise _refusal(name, "a finite number", _kind(sent))
    return float(sent)  # type: ignore[arg-type]


def _fraction(sent: object, name: str) -> Fraction:
    # the pattern keeps out 1e999999999, which Fraction would write out in full
    if not isinstance(sent, str) or not _FRACTION.fullmatch(sent) or not int(sent.partition("/")[2]):
        raise _refusal(name, "a fraction such as 3/4", _kind(sent))
    value = Fraction(sent)
    if abs(value) > _LARGEST:
        raise _refusal(name, "a fraction in the range of a float", "a larger one")
    return value


def _geometry(sent: object) -> tuple[Shape, Spacing]:
    expected = "pairs of three voxel counts and three spacings, all positive"
    if not isinstance(sent, list) or len(sent) != 2 or any(len(_list(part, "geometries")) != 3 for part in sent):
        raise _refusal("geometries", expected, "something else")
    shape, spacing_mm = sent[0], [_number(mm, "geometries") for mm in sent[1]]
    if any(type(n) is not int for n in shape) or not 0 < min(shape) <= max(shape) < 2**31 or min(spacing_mm) <= 0:
        raise _refusal("geometries", expected, "others")
    return _triple(shape), _triple(spacing_mm)


def _triple(items: Iterable[Number]) -> tuple[Number, Number, Number]:
    z, y, x = items
    return z, y, x
