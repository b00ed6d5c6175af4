from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nnunet_flare.aggregation.layers import apply_update
from nnunet_flare.aggregation.weighted_sum import STEP, WeightedSum
from nnunet_flare.errors import ParticipationError

floats = st.floats(-8, 8, width=32)
shapes = hnp.array_shapes(min_dims=0, max_dims=3, max_side=4)


@st.composite
def federations(draw):
    """Layers of two to five sites over the same shapes, with integer weights."""
    names = draw(st.dictionaries(st.sampled_from("abc"), shapes, min_size=1))
    arrays = {name: hnp.arrays(np.float32, shape, elements=floats) for name, shape in names.items()}
    sites = draw(st.lists(st.fixed_dictionaries(arrays), min_size=2, max_size=5))
    weights = draw(st.lists(st.integers(1, 10_000), min_size=len(sites), max_size=len(sites)))
    return sites, weights


def mean_of(sites, weights):
    total = WeightedSum(total_weight=sum(weights))
    for layers, weight in zip(sites, weights, strict=True):
        total.add(layers, weight=weight)
    return total.mean()


@given(federations())
def test_the_mean_is_numpys_weighted_average_within_the_fixed_point_step(federation):
    sites, weights = federation
    mean = mean_of(sites, weights)
    for name, array in mean.items():
        expected = np.average([layers[name].astype(np.float64) for layers in sites], axis=0, weights=weights)
        assert array.dtype == np.float32
        np.testing.assert_allclose(array, expected, rtol=1e-7, atol=len(sites) * STEP)


@given(federations())
def test_the_order_of_replies_does_not_change_a_bit(federation):
    sites, weights = federation
    reference = mean_of(sites, weights)
    for order in itertools.islice(itertools.permutations(range(len(sites))), 6):
        mean = mean_of([sites[i] for i in order], [weights[i] for i in order])
        for name, array in reference.items():
            np.testing.assert_array_equal(mean[name], array)


@given(federations())
def test_a_site_that_stays_away_counts_as_if_it_had_not_been_asked(federation):
    sites, weights = federation
    asked = WeightedSum(total_weight=sum(weights))
    for layers, weight in list(zip(sites, weights, strict=True))[1:]:
        asked.add(layers, weight=weight)
    for name, array in asked.mean().items():
        expected = np.average([layers[name].astype(np.float64) for layers in sites[1:]], axis=0, weights=weights[1:])
        # the contributions were scaled for the larger total weight: the step grows by that ratio
        step = STEP * len(sites) * sum(weights) / sum(weights[1:])
        np.testing.assert_allclose(array, expected, rtol=1e-7, atol=step)


@given(hnp.arrays(np.float32, (5,), elements=floats), st.integers(2, 20))
def test_equal_sites_average_to_themselves(array, number):
    mean = mean_of([{"w": array}] * number, [1] * number)
    np.testing.assert_allclose(mean["w"], array, rtol=1e-7, atol=number * STEP)


def test_each_layer_is_divided_by_the_weights_of_the_sites_that_sent_it():
    total = WeightedSum(total_weight=4)
    total.add({"a": np.float32([1]), "b": np.float32([10])}, weight=1)
    total.add({"a": np.float32([5])}, weight=3)
    mean = total.mean()
    assert mean["a"] == pytest.approx(4)
    assert mean["b"] == pytest.approx(10)


def test_half_precision_is_summed_in_full_precision():
    total = WeightedSum(total_weight=3)
    for _ in range(3):
        total.add({"w": np.float16([0.1])}, weight=1)
    assert total.mean()["w"] == pytest.approx(np.float64(np.float16(0.1)), abs=1e-9)


def test_large_arrays_are_summed_beyond_the_first_block():
    array = np.random.default_rng(0).normal(size=100_003).astype(np.float32)
    total = WeightedSum(total_weight=2)
    total.add({"w": array}, weight=1)
    total.add({"w": -array}, weight=1)
    np.testing.assert_array_equal(total.mean()["w"], 0)


def test_the_arrays_of_a_site_are_left_as_they_are():
    array = np.float32([1, 2, 3])
    WeightedSum(total_weight=1).add({"w": array}, weight=1)
    np.testing.assert_array_equal(array, [1, 2, 3])


def test_no_update_is_an_error():
    with pytest.raises(ParticipationError, match="at least one update"):
        WeightedSum(total_weight=1).mean()


def test_layers_that_an_update_does_not_name_stay_as_they_are():
    layers = {"a": np.float32([1]), "b": np.float32([2])}
    updated = apply_update(layers, {"a": np.float32([1])})
    assert (updated["a"], updated["b"]) == (2, 2)
    assert layers["a"] == 1
