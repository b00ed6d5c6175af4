"""A fingerprint summary as counts on public grids, which sites can add up under encryption.

Encryption that adds gives the sum of the sites' vectors and nothing else. So every field becomes small integers at
places that are the same for everybody, and the sum is that of the pooled cases, whatever the partition:

    spacings, extents in mm     cases at each point of a grid, along each axis; pairs and cases are not linked
    shapes in voxels            cases at each point of a grid, along each axis
    precision of spacings       cases with spacings of float32, as NIfTI stores them: if all, the points become float32
    sizes after cropping        cases at each point of a grid
    mean, standard deviation    moments as multiples of the smallest float64, without any loss
    percentiles, median         draws in the buckets of ``BucketCounts``; magnitudes below 1e-6 count as zero
    minimum, maximum            those of the filled buckets; nnU-Net's planner and normalization do not use them

Integers that may be larger than 16 bits are split into limbs of 16 bits, lowest first. A vector for one channel has
about 1.2 million entries, most of them zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from itertools import accumulate, pairwise

import numpy as np
from numpy.typing import NDArray

from nnunet_flare.errors import DatasetError
from nnunet_flare.fingerprint.buckets import BucketCounts
from nnunet_flare.fingerprint.channel import ChannelSummary
from nnunet_flare.fingerprint.grid import extent_grid, relative_size_grid, shape_grid, spacing_grid
from nnunet_flare.fingerprint.pseudo_cases import pair
from nnunet_flare.fingerprint.summary import FingerprintSummary
from nnunet_flare.fingerprint.wire import refusal

__all__ = ["LIMB_BITS", "MAX_SITES", "from_counts", "num_counts", "to_counts"]

LIMB_BITS = 16
MAX_SITES = 95

_LARGEST_LIMB = 2**LIMB_BITS - 1
_AXES = 3
_STEPS = 2**1074  # per unit: every float64 is a whole multiple of 1 / _STEPS
_SMALLEST_BUCKET, _LARGEST_BUCKET = BucketCounts.from_values(np.array([1e-6, 1e9])).buckets
_POSITIVE = np.arange(_SMALLEST_BUCKET, _LARGEST_BUCKET + 1)
_BUCKETS = np.concatenate([-_POSITIVE[::-1], [0], _POSITIVE])
_LARGEST_MEAN = 2**30  # more than the largest magnitude of the largest bucket
_MEAN_LIMBS = 71  # 16 bits of cases, 31 of mean + _LARGEST_MEAN, 1074 after the point
_MEAN_SQUARE_LIMBS = 72  # 16 bits of cases, 60 of mean square, 1074 after the point
_DRAW_LIMBS = 2
_CHANNEL_SIZES = (1, _MEAN_LIMBS, _MEAN_SQUARE_LIMBS, _DRAW_LIMBS * len(_BUCKETS))


def num_counts(num_channels: int) -> int:
    """Length of a vector; public, it depends on nothing but the channels."""
    return sum(_sizes(num_channels))


def to_counts(summary: FingerprintSummary) -> NDArray[np.int64]:
    """The summary as a vector of ``num_counts`` integers, each in [0, 2^16).

    Raises:
        DatasetError: a value lies outside the public grids, or there are more cases or draws than fit.
    """
    if summary.num_training > _LARGEST_LIMB:
        # one limb per bucket: a second one would double the vector, for sites that do not exist
        raise DatasetError(
            field="training cases",
            expected=f"{_LARGEST_LIMB} at most at one site",
            found=str(summary.num_training),
            remedy="divide the cases among several sites",
        )
    shapes, spacings = (np.array(part, dtype=np.float64) for part in zip(*summary.geometries, strict=True))
    parts = [spacing_grid().count(spacings[:, axis]) for axis in range(_AXES)]
    parts += [extent_grid().count(shapes[:, axis] * spacings[:, axis]) for axis in range(_AXES)]
    parts += [shape_grid().count(shapes[:, axis]) for axis in range(_AXES)]
    parts += [np.array([(spacings == _as_float32(spacings)).all(axis=1).sum()])]
    parts += [relative_size_grid().count(np.maximum(summary.relative_sizes, relative_size_grid().points[0]))]
    return np.concatenate([*parts, *map(_channel_to_counts, summary.channels)])


def from_counts(counts: NDArray[np.int64], *, num_channels: int) -> FingerprintSummary:
    """The summary of pseudo-cases for a sum of vectors of up to ``MAX_SITES`` sites.

    Spacings and relative sizes are those of the true cases, within their grids; extents and shapes are so in the
    median: which of them belong to one case is not known, see ``pseudo_cases``. That all sites drew equally often per
    case shows in the total at most: check it in the clear.

    Raises:
        UpdateError: the counts cannot be such a sum.
    """
    expected = f"{num_counts(num_channels)} integers from 0 to {MAX_SITES * _LARGEST_LIMB}"
    if counts.shape != (num_counts(num_channels),) or not np.issubdtype(counts.dtype, np.integer):
        raise refusal("counts", expected, f"{counts.dtype} of shape {counts.shape}")
    if counts.min() < 0 or counts.max() > MAX_SITES * _LARGEST_LIMB:
        raise refusal("counts", expected, "others")
    parts = _split(counts, num_channels)
    spacings, extents, shapes = ([next(parts) for _ in range(_AXES)] for _ in range(3))
    num_float32, relative_sizes = int(next(parts)[0]), next(parts)
    totals = {int(histogram.sum()) for histogram in (*spacings, *extents, *shapes, relative_sizes)}
    num_cases = max(totals)
    if len(totals) > 1 or not max(1, num_float32) <= num_cases <= MAX_SITES * _LARGEST_LIMB:
        raise refusal("cases", "one positive number of cases along each axis and for relative sizes", "others")
    spacing_points = _as_float32(spacing_grid().points) if num_float32 == num_cases else spacing_grid().points
    axes = [
        pair(
            np.repeat(spacing_points, spacing),
            np.repeat(extent_grid().points, extent),
            median_shape=float(np.median(np.repeat(shape_grid().points, shape))),
        )
        for spacing, extent, shape in zip(spacings, extents, shapes, strict=True)
    ]
    shapes_and_spacings = (np.stack(part, axis=1).tolist() for part in zip(*axes, strict=True))
    geometries = sorted(zip(*(map(tuple, part) for part in shapes_and_spacings), strict=True))
    channels = tuple(_channel_from_counts(*[next(parts) for _ in _CHANNEL_SIZES]) for _ in range(num_channels))
    if any(channel.num_cases > num_cases for channel in channels):
        raise refusal("num_cases", f"{num_cases} at most", "more cases with foreground than cases")
    return FingerprintSummary(
        geometries=tuple(geometries),
        relative_sizes=tuple(np.repeat(relative_size_grid().points, relative_sizes).tolist()),
        channels=channels,
    )


def _sizes(num_channels: int) -> list[int]:
    by_axis = [len(grid) for grid in (spacing_grid(), extent_grid(), shape_grid()) for _ in range(_AXES)]
    return by_axis + [1, len(relative_size_grid())] + list(_CHANNEL_SIZES) * num_channels


def _split(counts: NDArray[np.int64], num_channels: int) -> Iterator[NDArray[np.int64]]:
    for start, end in pairwise(accumulate(_sizes(num_channels), initial=0)):
        yield counts[start:end]


def _channel_to_counts(channel: ChannelSummary) -> NDArray[np.int64]:
    filled, draws = np.array(channel.buckets.buckets, dtype=np.int64), np.array(channel.buckets.counts, dtype=np.int64)
    if (np.abs(filled) > _LARGEST_BUCKET).any():
        raise DatasetError(
            field="intensities",
            expected="-1e9 to 1e9",
            found="others",
            remedy="scale the images of every site alike",
        )
    where = np.searchsorted(_BUCKETS, np.where(np.abs(filled) < _SMALLEST_BUCKET, 0, filled))
    counts = np.zeros(len(_BUCKETS), dtype=np.int64)
    np.add.at(counts, where, draws)
    if counts.max() >= 2 ** (_DRAW_LIMBS * LIMB_BITS):
        raise DatasetError(
            field="num_foreground_voxels",
            expected=f"fewer than 2^{_DRAW_LIMBS * LIMB_BITS} draws of about one intensity at one site",
            found="more",
            remedy="lower num_foreground_voxels",
        )
    mean = (channel.mean_sum + channel.num_cases * _LARGEST_MEAN) * _STEPS
    return np.concatenate(
        [
            [channel.num_cases],
            _limbs(mean, _MEAN_LIMBS),
            _limbs(channel.mean_square_sum * _STEPS, _MEAN_SQUARE_LIMBS),
            *(counts >> (LIMB_BITS * limb) & _LARGEST_LIMB for limb in range(_DRAW_LIMBS)),
        ]
    )


def _channel_from_counts(
    num_cases: NDArray[np.int64],
    mean: NDArray[np.int64],
    mean_square: NDArray[np.int64],
    draws: NDArray[np.int64],
) -> ChannelSummary:
    limbs = draws.reshape(_DRAW_LIMBS, -1).astype(np.int64)
    counts = (limbs << (LIMB_BITS * np.arange(_DRAW_LIMBS))[:, np.newaxis]).sum(axis=0)
    filled = np.flatnonzero(counts)
    buckets = BucketCounts(tuple(_BUCKETS[filled].tolist()), tuple(counts[filled].tolist()))
    values = buckets.values
    channel = ChannelSummary(
        num_cases=int(num_cases[0]),
        mean_sum=_integer(mean) / Fraction(_STEPS) - int(num_cases[0]) * _LARGEST_MEAN,
        mean_square_sum=_integer(mean_square) / Fraction(_STEPS),
        minimum=float(values[0]) if filled.size else np.inf,
        maximum=float(values[-1]) if filled.size else -np.inf,
        buckets=buckets,
    )
    return ChannelSummary.from_json(channel.to_json())  # with the checks of a summary that is sent in the clear


def _as_float32(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return values.astype(np.float32).astype(np.float64)


def _limbs(value: Fraction, num_limbs: int) -> NDArray[np.int64]:
    if value.denominator != 1:
        raise ValueError("a sum of float64 is a whole number of the smallest float64")
    encoded = value.numerator.to_bytes(num_limbs * LIMB_BITS // 8, "little")
    return np.frombuffer(encoded, dtype="<u2").astype(np.int64)


def _integer(limbs: NDArray[np.int64]) -> int:
    return sum(int(limb) << (LIMB_BITS * index) for index, limb in enumerate(limbs.tolist()))
