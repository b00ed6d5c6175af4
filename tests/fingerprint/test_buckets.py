import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from nnunet_flare.errors import DatasetError, UpdateError
from nnunet_flare.fingerprint.buckets import RELATIVE_ACCURACY, BucketCounts

finite = st.floats(-(2.0**100), 2.0**100, width=32)
values = npst.arrays(np.float64, st.integers(0, 30), elements=finite)
ranks = st.floats(0, 1)


@given(values, values, values)
def test_merging_is_associative_and_commutative_and_equals_counting_the_pooled_values(a, b, c):
    x, y, z = map(BucketCounts.from_values, (a, b, c))
    assert (x + y) + z == x + (y + z)
    assert x + y == y + x
    assert BucketCounts.merge([x, y, z]) == BucketCounts.from_values(np.concatenate([a, b, c]))


@given(npst.arrays(np.float64, st.integers(1, 30), elements=st.floats(1e-3, 1e3)), ranks, st.sampled_from([-1, 1]))
def test_a_quantile_is_within_the_relative_accuracy_of_numpys(positive, q, sign):
    expected = np.percentile(sign * positive, 100 * q)
    assert BucketCounts.from_values(sign * positive).quantile(q) == pytest.approx(
        expected, rel=1.001 * RELATIVE_ACCURACY
    )


@given(values.filter(len), ranks)
def test_between_values_of_both_signs_the_error_is_relative_to_the_larger_neighbour(mixed, q):
    low, high = (np.percentile(mixed, 100 * q, method=method) for method in ("lower", "higher"))
    bound = 1.001 * RELATIVE_ACCURACY * max(abs(low), abs(high))
    assert abs(BucketCounts.from_values(mixed).quantile(q) - np.percentile(mixed, 100 * q)) <= bound + 1e-290


@given(values)
def test_buckets_rise_with_the_values_and_count_each_once(array):
    counted = BucketCounts.from_values(array)
    assert counted.total == len(array)
    assert np.allclose(
        np.repeat(counted.values, counted.counts), np.sort(array), rtol=1.001 * RELATIVE_ACCURACY, atol=0
    )


@given(values)
def test_counts_survive_the_wire(array):
    counted = BucketCounts.from_values(array)
    assert BucketCounts.from_json(json.loads(json.dumps(counted.to_json()))) == counted


def test_the_smallest_and_largest_floats_have_buckets_of_their_own_sign():
    extremes = np.array([5e-324, np.finfo(np.float64).max])
    assert (np.array(BucketCounts.from_values(extremes).buckets) > 0).all()
    assert (np.array(BucketCounts.from_values(-extremes).buckets) < 0).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(bad):
    with pytest.raises(DatasetError, match="finite"):
        BucketCounts.from_values(np.array([1.0, bad]))


@pytest.mark.parametrize(
    "garbage",
    [
        None,
        [],
        {},
        {"buckets": [1]},
        {"buckets": [1], "counts": [1], "more": []},
        {"buckets": 1, "counts": [1]},
        {"buckets": ["1"], "counts": [1]},
        {"buckets": [1], "counts": [True]},
        {"buckets": [1.0], "counts": [1]},
        {"buckets": [1, 2], "counts": [1]},
        {"buckets": [2, 1], "counts": [1, 1]},
        {"buckets": [1, 1], "counts": [1, 1]},
        {"buckets": [10**9], "counts": [1]},
        {"buckets": [1], "counts": [0]},
        {"buckets": [1], "counts": [-1]},
        {"buckets": [1], "counts": [10**30]},
    ],
)
def test_garbage_from_the_wire_is_refused_by_name(garbage):
    with pytest.raises(UpdateError) as refusal:
        BucketCounts.from_json(garbage)
    assert refusal.value.field == "fingerprint: buckets"
