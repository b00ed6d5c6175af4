import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape

from nnunet_flare.fingerprint.pseudo_cases import pair

spacing = st.sampled_from([0.5, 0.7, 0.8, 1.0, 2.5, 4.0]) | st.floats(0.3, 5).map(lambda mm: round(mm, 4))
cases = st.lists(st.tuples(spacing, st.integers(8, 300)), min_size=1, max_size=25)


def without_pairs(some):
    spacings, shapes = map(np.array, zip(*some, strict=True))
    return np.sort(spacings), np.sort(spacings * shapes)


def pseudo_cases(some):
    return pair(*without_pairs(some), median_shape=np.median([n for _, n in some]))


def median_size(spacings, shapes, target):
    """As nnU-Net's planner takes it."""
    return np.median([compute_new_shape([n], [mm], [target]) for mm, n in zip(spacings, shapes, strict=True)])


@given(cases)
def test_spacings_are_those_of_the_true_cases(some):
    spacings, _ = without_pairs(some)
    assert np.sort(pseudo_cases(some)[1]).tolist() == spacings.tolist()


@given(cases)
def test_the_middle_cases_have_their_true_extents_and_the_others_stay_on_their_side(some):
    _, extents = without_pairs(some)
    shapes, spacings = pseudo_cases(some)
    first, last = (len(some) - 1) // 2, len(some) // 2
    found = shapes * spacings
    assert found[[first, last]] == pytest.approx(extents[[first, last]], abs=2e-5)
    one_voxel_is_more = spacings[:first] > found[first]
    assert ((found[:first] <= found[first] + 1e-4) | one_voxel_is_more).all()
    assert (found[last + 1 :] >= found[last] - 1e-4).all()


@given(cases, st.sampled_from([50, 10]))
def test_nnunet_finds_the_median_size_of_the_true_cases_after_resampling(some, percent):
    true_spacings, extents = without_pairs(some)
    target = np.percentile(true_spacings, percent)
    middle = extents[[(len(some) - 1) // 2, len(some) // 2]] / target
    on_an_edge = (np.abs(middle % 1 - 0.5) < 1e-3).any()  # where the last bit of a quotient decides
    shapes, spacings = pseudo_cases(some)
    found, expected = (median_size(*part, target) for part in ((spacings, shapes), zip(*some, strict=True)))
    assert abs(found - expected) <= on_an_edge


@given(cases.filter(lambda some: len(some) % 2))
def test_the_median_shape_is_that_of_the_true_cases(some):
    assert np.median(pseudo_cases(some)[0]) == np.median([n for _, n in some])


@given(st.floats(0.3, 5), st.lists(st.integers(1, 500), min_size=1, max_size=25))
def test_shapes_are_exact_where_all_cases_have_one_spacing(mm, shapes):
    assert pseudo_cases([(mm, n) for n in shapes])[0].tolist() == sorted(shapes)


def test_two_middle_cases_do_not_take_each_others_spacing():
    shapes, spacings = pair(np.array([0.7, 4.0]), np.array([28.0, 28.7]), median_shape=24)
    # 28 mm are 40 or 7 voxels, 28.7 mm are 41
    assert (shapes.tolist(), spacings.tolist()) == ([7, 41], [4.0, 0.7])
