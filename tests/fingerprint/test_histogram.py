import json
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from nnunet_flare.errors import DatasetError, UpdateError
from nnunet_flare.fingerprint.histogram import LIMB_BITS, MAX_SITES, from_counts, num_counts, to_counts
from nnunet_flare.fingerprint.summary import CaseValues, FingerprintSummary, merge_summaries

DRAWS, CHANNELS = 5, 2
INTENSITIES = "foreground_intensity_properties_per_channel"
magnitude = st.just(0.0) | st.floats(5e-324, 1e9)
intensity = npst.arrays(np.float64, DRAWS, elements=st.builds(math.copysign, magnitude, st.sampled_from([1, -1])))
no_foreground = np.array([])


@st.composite
def a_case(draw):
    empty = draw(st.booleans())
    return CaseValues(
        shape=draw(st.tuples(*[st.integers(1, 500)] * 3)),
        spacing_mm=draw(st.tuples(*[st.floats(0.1, 10)] * 3)),
        relative_size=draw(st.floats(0.01, 1)),
        intensities=[no_foreground if empty else draw(intensity) for _ in range(CHANNELS)],
    )


sites_of_cases = st.lists(st.lists(a_case(), min_size=1, max_size=4), min_size=1, max_size=4)


def case(*draws, shape=(4, 5, 6), spacing_mm=(3.0, 1.0, 1.0), relative_size=1.0):
    return CaseValues(
        shape=shape, spacing_mm=spacing_mm, relative_size=relative_size, intensities=[np.array(d, float) for d in draws]
    )


def summed(some):
    return from_counts(sum(map(to_counts, some)), num_channels=len(some[0].channels))


@settings(max_examples=20, deadline=None)
@given(sites_of_cases)
def test_the_sum_over_sites_equals_the_pool_to_the_last_bit_in_any_order(sites):
    summaries = [FingerprintSummary.from_cases(site) for site in sites]
    pooled = summed([merge_summaries(summaries)])
    assert summed(summaries) == pooled
    assert summed(summaries[::-1]) == pooled
    assert pooled.num_training == sum(map(len, sites))


@settings(max_examples=20, deadline=None)
@given(st.lists(a_case(), min_size=1, max_size=4))
def test_every_count_fits_a_limb_and_the_length_depends_on_the_channels_only(some):
    counts = to_counts(FingerprintSummary.from_cases(some))
    assert counts.shape == (num_counts(CHANNELS),)
    assert counts.dtype == np.int64
    assert counts.min() == 0
    assert counts.max() < 2**LIMB_BITS


@settings(max_examples=20, deadline=None)
@given(st.lists(a_case(), min_size=1, max_size=9).filter(lambda some: any(c.intensities[0].size for c in some)))
def test_statistics_are_those_of_the_summary_within_the_grids(some):
    exact = FingerprintSummary.from_cases(some)
    found, expected = summed([exact]).to_nnunet(), exact.to_nnunet()
    assert np.sort(found["spacings"], axis=0) == pytest.approx(np.sort(expected["spacings"], axis=0), abs=5.01e-5)
    name = "median_relative_size_after_cropping"
    assert expected[name] - 1.01e-4 <= found[name] <= expected[name]
    for channel, statistics in found[INTENSITIES].items():
        for name, value in statistics.items():
            if name in ("mean", "std"):
                assert value == expected[INTENSITIES][channel][name]
            else:
                assert value == pytest.approx(expected[INTENSITIES][channel][name], rel=2.01e-3, abs=3e-6)


def test_a_summary_on_the_grids_comes_back_whole():
    summary = FingerprintSummary.from_cases(
        [case([0, 1], [-1, -1], spacing_mm=(5.0, 0.7, 0.8), shape=(n, 2 * n, 3 * n)) for n in (20, 30, 40)]
    )
    found = summed([summary])
    assert found.geometries == summary.geometries
    assert found.relative_sizes == summary.relative_sizes
    assert [c.buckets for c in found.channels] == [c.buckets for c in summary.channels]
    assert [c.mean_sum for c in found.channels] == [Fraction(3, 2), Fraction(-3)]
    assert FingerprintSummary.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_spacings_come_back_as_float32_only_if_all_sites_have_those():
    nifti, other = (
        FingerprintSummary.from_cases([case([1], spacing_mm=[mm] * 3)]) for mm in (float(np.float32(0.7)), 0.8)
    )
    assert summed([nifti, nifti]).geometries == nifti.geometries * 2
    assert [spacing for _, spacing in summed([nifti, other]).geometries] == [(0.7,) * 3, (0.8,) * 3]


def test_draws_beyond_one_limb_are_counted():
    summary = FingerprintSummary.from_cases([case(np.full(200_000, 7.0))])
    counts = to_counts(summary)
    assert sorted(counts[-2 * 34541 :][counts[-2 * 34541 :] > 0]) == [200_000 // 2**16, 200_000 % 2**16]
    assert from_counts(counts * MAX_SITES, num_channels=1).channels[0].buckets.counts == (200_000 * MAX_SITES,)


def test_magnitudes_below_a_millionth_count_as_zero():
    channel = summed([FingerprintSummary.from_cases([case([1e-7, -1e-7, 0, 1])])]).channels[0]
    assert channel.buckets.counts == (3, 1)
    assert (channel.minimum, channel.mean_sum) == (0.0, Fraction(1, 4))


@pytest.mark.parametrize(
    ("field", "faulty"),
    [
        ("spacing in mm", case([1], spacing_mm=(1.0, 2000.0, 1.0))),
        ("extent in mm", case([1], shape=(1, 1, 30_000))),
        ("intensities", case([2e9])),
    ],
)
def test_what_lies_outside_the_grids_is_refused_by_field_at_the_site(field, faulty):
    with pytest.raises(DatasetError) as refusal:
        to_counts(FingerprintSummary.from_cases([case([1]), faulty]))
    assert refusal.value.field == field


def test_a_site_with_more_cases_than_a_limb_counts_is_refused():
    one = FingerprintSummary.from_cases([case([1])])
    many = FingerprintSummary(geometries=one.geometries * 2**16, relative_sizes=(1.0,) * 2**16, channels=one.channels)
    with pytest.raises(DatasetError, match="65535 at most"):
        to_counts(many)


CHANNEL = num_counts(0)
BREAKAGES = {
    "counts": lambda counts: counts[:-1],
    "counts ": lambda counts: counts.astype(float),
    "counts  ": lambda counts: with_value(counts, 0, -1),
    "counts   ": lambda counts: with_value(counts, CHANNEL + 5, MAX_SITES * 65535 + 1),
    "cases": lambda counts: with_value(counts, 0, 1),
    "cases ": lambda counts: with_value(counts, CHANNEL - 1, 0),
    "cases  ": lambda counts: with_value(counts, CHANNEL - 10_001, 3),
    "cases   ": np.zeros_like,
    "num_cases": lambda counts: with_value(counts, CHANNEL, 0),
    "num_cases ": lambda counts: with_three_cases_of_two(counts),
    "buckets": lambda counts: with_value(counts, num_counts(1) - 34_541 - 1, 1),
    "mean_square_sum": lambda counts: with_value(counts, CHANNEL + 71, 60_000),
    "minimum": lambda counts: np.concatenate([counts[: CHANNEL + 144], np.zeros_like(counts[CHANNEL + 144 :])]),
}


def with_value(counts, index, value):
    changed = counts.copy()
    changed[index] = value
    return changed


def with_three_cases_of_two(counts):
    """Three cases have foreground, of two."""
    changed = counts.copy()
    changed[CHANNEL:] = to_counts(FingerprintSummary.from_cases([case([1, 2])] * 3))[CHANNEL:]
    return changed


@pytest.mark.parametrize("field", BREAKAGES)
def test_counts_that_are_no_sum_of_summaries_are_refused_by_name(field):
    counts = to_counts(FingerprintSummary.from_cases([case([1, 100]), case([3, 4])]))
    from_counts(counts, num_channels=1)
    with pytest.raises(UpdateError) as refusal:
        from_counts(BREAKAGES[field](counts), num_channels=1)
    assert refusal.value.field == f"fingerprint: {field.strip()}"
