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

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from nnunet_flare.fingerprint.channel import ChannelSummary
from nnunet_flare.fingerprint.wire import filled_list, finite_number, object_with, refusal

__all__ = ["CaseValues", "ChannelSummary", "FingerprintSummary", "merge_summaries"]

Number = TypeVar("Number", int, float)
Shape = tuple[int, int, int]
Spacing = tuple[float, float, float]


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
            raise refusal("channels", f"{len(self.channels)} as elsewhere", str(len(other.channels)))
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
        values = object_with(sent, "summary", {"geometries", "relative_sizes", "channels"})
        geometries = tuple(sorted(map(_geometry, filled_list(values["geometries"], "geometries"))))
        sizes = filled_list(values["relative_sizes"], "relative_sizes")
        relative_sizes = tuple(sorted(finite_number(size, "relative_sizes") for size in sizes))
        channels = tuple(map(ChannelSummary.from_json, filled_list(values["channels"], "channels")))
        if len(relative_sizes) != len(geometries):
            raise refusal("relative_sizes", f"{len(geometries)}, one per case", str(len(relative_sizes)))
        if not all(0 < size <= 1 for size in relative_sizes):
            raise refusal("relative_sizes", "numbers in (0, 1]", "others")
        if any(channel.num_cases > len(geometries) for channel in channels):
            raise refusal("num_cases", f"{len(geometries)} at most", "more cases with foreground than cases")
        return cls(geometries=geometries, relative_sizes=relative_sizes, channels=channels)


def merge_summaries(summaries: Iterable[FingerprintSummary]) -> FingerprintSummary:
    """The summary of all cases of at least one summary; their order does not matter.

    Raises:
        UpdateError: they have different numbers of channels or of draws per case.
    """
    return reduce(add, summaries)


def _geometry(sent: object) -> tuple[Shape, Spacing]:
    expected = "pairs of three voxel counts and three spacings, all positive"
    if not isinstance(sent, list) or len(sent) != 2 or any(len(filled_list(part, "geometries")) != 3 for part in sent):
        raise refusal("geometries", expected, "something else")
    shape, spacing_mm = sent[0], [finite_number(mm, "geometries") for mm in sent[1]]
    if any(type(n) is not int for n in shape) or not 0 < min(shape) <= max(shape) < 2**31 or min(spacing_mm) <= 0:
        raise refusal("geometries", expected, "others")
    return _triple(shape), _triple(spacing_mm)


def _triple(items: Iterable[Number]) -> tuple[Number, Number, Number]:
    z, y, x = items
    return z, y, x
