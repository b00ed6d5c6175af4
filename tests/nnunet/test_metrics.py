"""Expected values come from SciPy's distance transform and from nnU-Net's own evaluation."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage

from nnunet_flare.errors import DatasetError
from nnunet_flare.nnunet.metrics import LabelMetrics, mean_metrics, segmentation_metrics

SPACINGS = [(1.0, 1.0, 1.0), (3.0, 0.7, 0.7), (1, 2, 5)]


def blobs(seed: int, shape: tuple[int, ...] = (14, 18, 16), share: float = 0.4) -> np.ndarray:
    """Smooth random labels 0, 1, 2 that reach the border of the image."""
    field = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), sigma=2)
    return np.digitize(field, np.quantile(field, [1 - share, 1 - share / 3]))


def surface_distances(mask: np.ndarray, other: np.ndarray, spacing: tuple[float, ...]) -> np.ndarray:
    """Distance of every surface voxel of ``mask`` to the surface of ``other``, on the whole padded image."""

    def surface(values: np.ndarray) -> np.ndarray:
        padded = np.pad(values, 1)
        inside = padded.copy()
        for axis in range(values.ndim):
            inside &= np.roll(padded, 1, axis) & np.roll(padded, -1, axis)
        return padded & ~inside

    return ndimage.distance_transform_edt(~surface(other), sampling=spacing)[surface(mask)]


def expected(reference: np.ndarray, prediction: np.ndarray, spacing: tuple[float, ...], tolerance: float):
    there = surface_distances(prediction, reference, spacing)
    back = surface_distances(reference, prediction, spacing)
    # As MONAI: the larger directed percentile. DeepMind's surface-distance agrees but weights each surface element
    # by its area; other tools take one percentile of both directions together, which is never larger than this.
    hd95 = max(np.percentile(there, 95), np.percentile(back, 95))
    near = np.count_nonzero(there <= tolerance) + np.count_nonzero(back <= tolerance)
    dsc = 2 * np.count_nonzero(reference & prediction) / (reference.sum() + prediction.sum())
    # MONAI computes in float32, the rank of the percentile too: 0.95 n is off by up to n * 2^-24, and the value by
    # that share of the step to the next distance.
    single = float(np.finfo(np.float32).eps)
    rank_error = single * max(len(there), len(back)) * max(there.max(), back.max())
    return (
        pytest.approx(dsc, rel=1e-12),
        pytest.approx(hd95, rel=4 * single, abs=rank_error),
        pytest.approx(near / (len(there) + len(back)), rel=single),
    )


def scores(metrics: LabelMetrics) -> tuple[float, float, float]:
    return metrics.dsc, metrics.hd95_mm, metrics.nsd


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("seed", range(4))
def test_random_blobs_score_as_scipy_scores_them(seed, spacing):
    reference, prediction = blobs(seed), blobs(seed + 100, share=0.6)
    result = segmentation_metrics(
        reference,
        prediction,
        labels={"inner": 2, "whole": (1, 2)},
        spacing_mm=spacing,
        nsd_tolerance_mm=1.9,
    )
    assert scores(result["inner"]) == expected(reference == 2, prediction == 2, spacing, 1.9)
    assert scores(result["whole"]) == expected(reference > 0, prediction > 0, spacing, 1.9)


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(*[st.integers(2, 6)] * 3).flatmap(
        lambda shape: st.tuples(arrays(bool, shape), arrays(bool, shape), st.sampled_from(SPACINGS))
    )
)
@example((np.ones((3, 4, 5), bool), np.ones((3, 4, 5), bool), SPACINGS[0]))
def test_any_two_masks_score_as_scipy_scores_them_up_to_the_image_border(case):
    reference, prediction, spacing = case
    if not (reference.any() and prediction.any()):
        return
    result = segmentation_metrics(
        reference.astype(np.uint8),
        prediction.astype(np.uint8),
        labels={"a": 1},
        spacing_mm=spacing,
        nsd_tolerance_mm=1.5,
    )
    assert scores(result["a"]) == expected(reference, prediction, spacing, 1.5)


@settings(max_examples=30, deadline=None)
@given(st.tuples(*[st.integers(0, 3)] * 6), arrays(bool, (4, 3, 5)), arrays(bool, (4, 3, 5)))
def test_background_around_the_masks_does_not_change_a_score(margins, reference, prediction):
    reference[0, 0, 0] = prediction[0, 0, 0] = True
    kwargs = {"labels": {"a": 1}, "spacing_mm": (2.0, 1.0, 0.5), "nsd_tolerance_mm": 1.0}
    pad = np.reshape(margins, (3, 2))
    tight = segmentation_metrics(reference, prediction, **kwargs)
    assert segmentation_metrics(np.pad(reference, pad), np.pad(prediction, pad), **kwargs) == tight


def test_two_single_voxels_are_as_far_apart_as_their_centres():
    reference, prediction = np.zeros((2, 9, 9, 9), np.uint8)
    reference[1, 1, 1] = prediction[3, 1, 5] = 1
    result = segmentation_metrics(reference, prediction, labels={"a": 1}, spacing_mm=(1.5, 1, 1), nsd_tolerance_mm=4.9)[
        "a"
    ]
    assert scores(result) == (0.0, 5.0, 0.0)


def test_the_tolerance_itself_still_counts_as_agreement():
    reference, prediction = np.zeros((2, 4, 4, 4), np.uint8)
    reference[1, 1, 1] = prediction[2, 1, 1] = 1
    result = segmentation_metrics(reference, prediction, labels={"a": 1}, spacing_mm=(2, 1, 1), nsd_tolerance_mm=2)
    assert scores(result["a"]) == (0.0, 2.0, 1.0)


def test_a_label_in_neither_mask_has_no_score_and_a_label_in_one_mask_has_the_worst():
    reference, prediction = np.zeros((2, 3, 4, 5), np.uint8)
    reference[0, 0, 0], prediction[1, 1, 1] = 1, 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = segmentation_metrics(
            reference, prediction, labels={"a": 1, "b": 2, "c": 3}, spacing_mm=(4, 1, 0.8), nsd_tolerance_mm=1
        )
    assert scores(result["a"]) == scores(result["b"]) == (0.0, pytest.approx(math.hypot(12, 4, 4)), 0.0)
    assert all(map(math.isnan, scores(result["c"])))


def test_the_penalty_of_a_missed_label_exceeds_every_distance_within_the_image():
    reference, prediction = np.zeros((2, 3, 4, 5), np.uint8)
    reference[0, 0, 0] = prediction[2, 3, 4] = 1
    kwargs = {"labels": {"a": 1}, "spacing_mm": (4, 1, 0.8), "nsd_tolerance_mm": 1}
    farthest = segmentation_metrics(reference, prediction, **kwargs)["a"].hd95_mm
    assert segmentation_metrics(reference, 0 * prediction, **kwargs)["a"].hd95_mm > farthest


def test_ignored_voxels_belong_to_neither_mask():
    reference, prediction = blobs(1), blobs(2)
    reference[:, 5:9] = 3
    result = segmentation_metrics(
        reference, prediction, labels={"whole": (1, 2)}, spacing_mm=SPACINGS[1], ignore_label=3, nsd_tolerance_mm=1
    )
    annotated = reference != 3
    assert scores(result["whole"]) == expected(
        np.isin(reference, (1, 2)) & annotated, (prediction > 0) & annotated, SPACINGS[1], 1
    )


def test_a_2d_image_scores_in_pixels_whatever_its_first_spacing():
    reference, prediction = blobs(3, (1, 40, 30)), blobs(4, (1, 40, 30))
    result = segmentation_metrics(
        reference, prediction, labels={"whole": (1, 2)}, spacing_mm=(999, 1, 1), nsd_tolerance_mm=2
    )
    assert scores(result["whole"]) == expected(reference[0] > 0, prediction[0] > 0, (1, 1), 2)


@pytest.mark.parametrize("shape", [(14, 18, 15), (1, 14, 18, 16)])
def test_maps_of_different_shape_are_refused(shape):
    with pytest.raises(DatasetError, match="original resolution"):
        segmentation_metrics(blobs(1), np.zeros(shape), labels={"a": 1}, spacing_mm=(1, 1, 1), nsd_tolerance_mm=1)


class ArrayReader:
    """Stands in for an image reader: the "file name" is a key of the arrays."""

    def __init__(self, arrays_by_name):
        self.arrays = arrays_by_name

    def read_seg(self, name):
        return self.arrays[name][None], {}


@pytest.mark.parametrize("ignore_label", [None, 2])
def test_dsc_and_its_means_are_nnunets_own(ignore_label, monkeypatch):
    import multiprocessing.dummy

    from nnunetv2.evaluation import evaluate_predictions

    # Three cases; case 2 lacks label 1 in both maps. Threads instead of nnU-Net's spawned processes.
    maps = {f"ref/{i}": blobs(i) for i in range(3)} | {f"pred/{i}": blobs(i + 50) for i in range(3)}
    for name in ("ref/2", "pred/2"):
        maps[name][maps[name] == 1] = 0
    monkeypatch.setattr(evaluate_predictions, "subfiles", lambda *_, **__: ["0", "1", "2"])
    monkeypatch.setattr(evaluate_predictions.multiprocessing, "get_context", lambda _: multiprocessing.dummy)
    labels = {"one": 1, "whole": (1, 2)}
    theirs = evaluate_predictions.compute_metrics_on_folder(
        "ref", "pred", None, ArrayReader(maps), "", list(labels.values()), ignore_label, num_processes=1
    )
    cases = [
        segmentation_metrics(
            maps[f"ref/{i}"],
            maps[f"pred/{i}"],
            labels=labels,
            spacing_mm=(1, 1, 1),
            ignore_label=ignore_label,
            nsd_tolerance_mm=1,
        )
        for i in range(3)
    ]
    means, foreground = mean_metrics(cases)
    for ours, case in zip(cases, theirs["metric_per_case"], strict=True):
        for name, label in labels.items():
            assert ours[name].dsc == pytest.approx(case["metrics"][label]["Dice"], rel=1e-12, nan_ok=True)
    assert math.isnan(cases[2]["one"].dsc)
    assert means["one"].dsc == pytest.approx(theirs["mean"][1]["Dice"], rel=1e-12)
    assert means["whole"].dsc == pytest.approx(theirs["mean"][1, 2]["Dice"], rel=1e-12)
    assert foreground.dsc == pytest.approx(theirs["foreground_mean"]["Dice"], rel=1e-12)


def test_a_label_that_no_case_has_is_left_out_of_the_foreground_mean():
    present = LabelMetrics(dsc=0.8, hd95_mm=2.0, nsd=0.9)
    absent = LabelMetrics(dsc=math.nan, hd95_mm=math.nan, nsd=math.nan)
    means, foreground = mean_metrics([{"a": present, "b": absent}, {"a": present, "b": absent}])
    assert foreground == means["a"] == present
    assert math.isnan(means["b"].dsc)
