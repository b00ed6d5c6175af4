"""Resampling of images and label maps to another voxel spacing, in place: same centre, same orientation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import SimpleITK

from nnunet_flare.nnunet.dataset import Case

__all__ = ["LabelChange", "label_changes", "label_volumes_mm3", "resample_case", "resample_image", "resample_labels"]

# Halfway between two old voxels their shares tie, and the lower label would win at every border. Read a little to one
# side, one border gains what the opposite one loses.
TIE_BREAKING_SHIFT = 1e-3


@dataclass(frozen=True, kw_only=True)
class LabelChange:
    """What resampling did to one label, over all cases that had it."""

    before_mm3: float
    after_mm3: float
    num_cases: int
    num_vanished: int

    def __str__(self) -> str:
        change = 100 * (self.after_mm3 / self.before_mm3 - 1)
        return f"volume {change:+.1f} %, vanished from {self.num_vanished} of {self.num_cases} cases"


def label_changes(volumes: Iterable[tuple[Mapping[float, float], Mapping[float, float]]]) -> dict[float, LabelChange]:
    """Changes by label value, from each case's volumes before and after (background left out)."""
    pairs = list(volumes)
    changes = {}
    for label in sorted({label for before, _ in pairs for label in before} - {0}):
        had = [(before[label], after.get(label, 0.0)) for before, after in pairs if label in before]
        changes[label] = LabelChange(
            before_mm3=sum(before for before, _ in had),
            after_mm3=sum(after for _, after in had),
            num_cases=len(had),
            num_vanished=sum(after == 0 for _, after in had),
        )
    return changes


def resample_case(
    case: Case, target: Case, spacing_mm: Sequence[float]
) -> tuple[dict[float, float], dict[float, float]]:
    """Write ``case`` at another spacing to the files of ``target``; returns its label volumes before and after.

    Raises:
        RuntimeError: SimpleITK cannot read or write a file.
    """
    for path, target_path in zip(case.images, target.images, strict=True):
        SimpleITK.WriteImage(resample_image(SimpleITK.ReadImage(path), spacing_mm), target_path, useCompression=True)
    labels = SimpleITK.ReadImage(case.label)
    resampled = resample_labels(labels, spacing_mm)
    SimpleITK.WriteImage(resampled, target.label, useCompression=True)
    return label_volumes_mm3(labels), label_volumes_mm3(resampled)


def resample_image(image: SimpleITK.Image, spacing_mm: Sequence[float]) -> SimpleITK.Image:
    """Cubic B-spline interpolation as float32, smoothed first, kept within the grey values that the image had.

    Args:
        image: Any number of dimensions, one value per voxel.
        spacing_mm: New spacing in x, y(, z).
    """
    image = SimpleITK.Cast(image, SimpleITK.sitkFloat32)
    lowest, highest = SimpleITK.MinimumMaximum(image)
    resampled = _interpolate(_smooth(image, spacing_mm), spacing_mm, SimpleITK.sitkBSpline)
    return SimpleITK.Clamp(resampled, SimpleITK.sitkFloat32, lowest, highest)


def resample_labels(labels: SimpleITK.Image, spacing_mm: Sequence[float]) -> SimpleITK.Image:
    """The label with the largest share of each new voxel: every label's mask is interpolated linearly.

    Masks are not smoothed: that shrinks every convex structure. One smaller than a new voxel can still vanish;
    ``label_changes`` tells.
    """
    chosen = largest = None
    for value in label_volumes_mm3(labels):
        mask = SimpleITK.Cast(labels == value, SimpleITK.sitkFloat32)
        resampled = _interpolate(mask, spacing_mm, SimpleITK.sitkLinear, TIE_BREAKING_SHIFT)
        share = SimpleITK.GetArrayViewFromImage(resampled)
        if largest is None:
            chosen, largest = np.full(share.shape, value), share.copy()
        chosen[share > largest] = value
        np.maximum(largest, share, out=largest)
    result = SimpleITK.GetImageFromArray(chosen)
    result.CopyInformation(resampled)
    return SimpleITK.Cast(result, labels.GetPixelID())


def label_volumes_mm3(labels: SimpleITK.Image) -> dict[float, float]:
    """Volume of each label value that occurs, background included; an area in mm² for a 2D image."""
    values, counts = np.unique(SimpleITK.GetArrayViewFromImage(labels), return_counts=True)
    return dict(zip(values.tolist(), (counts * math.prod(labels.GetSpacing())).tolist(), strict=True))


def _smooth(image: SimpleITK.Image, spacing_mm: Sequence[float]) -> SimpleITK.Image:
    """Remove detail finer than the new voxels: a Gaussian as wide as what they add (Cardoso et al. 2015)."""
    factor = np.array(spacing_mm) / image.GetSpacing()
    variance = np.maximum(0, factor**2 - 1) / (8 * math.log(2))
    return SimpleITK.DiscreteGaussian(image, variance=variance.tolist(), useImageSpacing=False)


def _interpolate(
    image: SimpleITK.Image, spacing_mm: Sequence[float], interpolator: int, shift: float = 0.0
) -> SimpleITK.Image:
    """Values on the grid of ``spacing_mm`` that shares the image's centre, read ``shift`` old voxels beside it."""
    old_spacing, old_size = np.array(image.GetSpacing()), np.array(image.GetSize())
    factor = np.array(spacing_mm) / old_spacing
    size = np.maximum(1, np.round(old_size / factor)).astype(int)
    first = (old_size - 1) / 2 - factor * (size - 1) / 2
    grid = SimpleITK.ResampleImageFilter()
    grid.SetSize(size.tolist())
    grid.SetOutputSpacing(list(spacing_mm))
    grid.SetOutputDirection(image.GetDirection())
    grid.SetOutputOrigin(image.TransformContinuousIndexToPhysicalPoint(first.tolist()))
    grid.SetInterpolator(interpolator)
    grid.SetTransform(SimpleITK.TranslationTransform(image.GetDimension(), (shift * old_spacing).tolist()))
    grid.UseNearestNeighborExtrapolatorOn()
    return grid.Execute(image)
