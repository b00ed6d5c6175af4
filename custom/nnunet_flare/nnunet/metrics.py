"""Segmentation scores of a case: DSC as nnU-Net computes it, HD95 and NSD as MONAI computes them.

A surface is the set of mask voxels with a face neighbour outside the mask; what lies beyond the image is outside.
Distances run between voxel centres. HD95 is the larger of the two directed 95th percentiles; NSD is the share of
both surfaces' voxels that lie within the tolerance of the other surface, each voxel counting once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nnunet_flare.errors import DatasetError

__all__ = ["LabelMetrics", "mean_label_metrics", "mean_metrics", "mean_score", "segmentation_metrics"]


@dataclass(frozen=True, kw_only=True)
class LabelMetrics:
    """Scores of one label or region; nan where the label is in neither mask.

    Args:
        dsc: Dice similarity coefficient, 0 to 1.
        hd95_mm: 95th percentile Hausdorff distance in mm; in pixels for the 2D formats, which have no spacing.
        nsd: Normalised surface Dice at the tolerance asked for, 0 to 1.
    """

    dsc: float
    hd95_mm: float
    nsd: float


def segmentation_metrics(
    reference: np.ndarray,
    prediction: np.ndarray,
    *,
    labels: Mapping[str, int | tuple[int, ...]],
    spacing_mm: Sequence[float],
    ignore_label: int | None = None,
    nsd_tolerance_mm: float,
) -> dict[str, LabelMetrics]:
    """Score one case, label by label.

    Empty masks: in neither, all three are nan and the means leave the case out (as nnU-Net's do); in exactly one,
    DSC and NSD are 0 and HD95 is the diagonal of the image, which bounds every distance in it.

    Args:
        reference: Label map, shape (z, y, x). A leading axis of length 1 makes the case 2D, whatever its spacing.
        prediction: Label map of the same shape.
        labels: Name -> label, or the labels that form the region; foreground only.
        spacing_mm: Voxel size along the axes of ``reference``.
        ignore_label: Voxels with this value in ``reference`` belong to neither mask.
        nsd_tolerance_mm: Surface distance that still counts as agreement, in the unit of ``spacing_mm``.

    Raises:
        DatasetError: the two maps and the spacing do not fit each other.
    """
    if reference.shape != prediction.shape or reference.ndim != len(spacing_mm):
        raise DatasetError(
            field="segmentation",
            expected=f"shape {reference.shape} of the reference, with as many spacings",
            found=f"shape {prediction.shape} and {len(spacing_mm)} spacings",
            remedy="compare both at the original resolution, without a channel axis",
        )
    spacing = [float(length) for length in spacing_mm]  # MONAI refuses a mixture of int and float
    if len(reference) == 1:
        reference, prediction, spacing = reference[0], prediction[0], spacing[1:]
    scored = np.True_ if ignore_label is None else reference != ignore_label
    return {
        name: _mask_metrics(
            np.isin(reference, label) & scored, np.isin(prediction, label) & scored, spacing, nsd_tolerance_mm
        )
        for name, label in labels.items()
    }


def _mask_metrics(
    reference: np.ndarray, prediction: np.ndarray, spacing_mm: list[float], nsd_tolerance_mm: float
) -> LabelMetrics:
    sizes = int(np.count_nonzero(reference)), int(np.count_nonzero(prediction))
    if not any(sizes):
        return LabelMetrics(dsc=math.nan, hd95_mm=math.nan, nsd=math.nan)
    if not all(sizes):
        return LabelMetrics(dsc=0.0, hd95_mm=math.hypot(*np.multiply(reference.shape, spacing_mm)), nsd=0.0)

    from monai.metrics.hausdorff_distance import compute_hausdorff_distance
    from monai.metrics.surface_dice import compute_surface_dice
    from monai.utils.type_conversion import convert_to_tensor

    overlap = int(np.count_nonzero(reference & prediction))
    box = _joint_box(reference | prediction)
    case = {
        "y": convert_to_tensor(reference[box][None, None]),
        "y_pred": convert_to_tensor(prediction[box][None, None]),
        "include_background": True,
        "spacing": spacing_mm,
    }
    return LabelMetrics(
        dsc=2 * overlap / sum(sizes),
        hd95_mm=float(compute_hausdorff_distance(**case, percentile=95)),
        nsd=float(compute_surface_dice(**case, class_thresholds=[nsd_tolerance_mm])),
    )


def _joint_box(mask: np.ndarray) -> tuple[slice, ...]:
    """The bounding box of ``mask``; beyond it, as beyond the image, is outside, so no surface changes."""
    axes = range(mask.ndim)
    occupied = (np.flatnonzero(mask.any(axis=tuple(set(axes) - {axis}))) for axis in axes)
    return tuple(slice(indices[0], indices[-1] + 1) for indices in occupied)


def mean_score(scores: Iterable[float]) -> float:
    """Mean of the scores that are numbers; nan where none is."""
    present = [score for score in scores if not math.isnan(score)]
    return math.fsum(present) / len(present) if present else math.nan


def mean_label_metrics(metrics: Iterable[LabelMetrics]) -> LabelMetrics:
    """``mean_score`` of each score by itself."""
    entries = list(metrics)
    return LabelMetrics(
        dsc=mean_score(entry.dsc for entry in entries),
        hd95_mm=mean_score(entry.hd95_mm for entry in entries),
        nsd=mean_score(entry.nsd for entry in entries),
    )


def mean_metrics(cases: Sequence[Mapping[str, LabelMetrics]]) -> tuple[dict[str, LabelMetrics], LabelMetrics]:
    """Mean over cases per label, and the mean of these over the labels (nnU-Net's ``foreground_mean``).

    A label that no case and no prediction has is left out of the second mean, which nnU-Net would report as nan.
    """
    labels = dict.fromkeys(name for case in cases for name in case)
    means = {name: mean_label_metrics(case[name] for case in cases if name in case) for name in labels}
    return means, mean_label_metrics(means.values())
