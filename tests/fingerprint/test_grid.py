import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnunet_flare.errors import DatasetError
from nnunet_flare.fingerprint.grid import extent_grid, relative_size_grid, shape_grid, spacing_grid


def point_of(grid, value):
    (where,) = np.flatnonzero(grid.count(np.array([value])))
    return grid.points[where]


@pytest.mark.parametrize("mm", [0.003, 0.0513, 0.1, 0.7, 0.7812, 0.78125, 0.7421875, 1.0, 2.5, 4.4, 12.5, 33.3, 999.0])
def test_spacings_as_people_write_them_come_back_to_the_last_bit(mm):
    assert point_of(spacing_grid(), mm) == mm


@given(st.floats(1e-6, 1000))
def test_spacings_stay_within_half_a_step(mm):
    half_step = 5e-7 if mm < 0.01 else 5e-6 if mm < 0.1 else 5e-5 if mm < 10 else 5e-4 if mm < 20 else 5e-2
    assert point_of(spacing_grid(), mm) == pytest.approx(mm, abs=1.001 * half_step)


@given(st.floats(1e-4, 20_000))
def test_extents_stay_within_half_a_step(mm):
    half_step = 5e-5 if mm < 1 else 1.25e-3 if mm < 320 else 1e-2 if mm < 1000 else 0.5
    assert point_of(extent_grid(), mm) == pytest.approx(mm, abs=1.001 * half_step)


@given(st.integers(1, 2**24))
def test_shapes_are_exact_up_to_4096_voxels(n):
    assert point_of(shape_grid(), n) == pytest.approx(n, rel=0 if n <= 4096 else 0.34)


@given(st.floats(1e-4, 1))
def test_relative_sizes_never_cross_three_quarters(size):
    assert size - 1e-4 <= point_of(relative_size_grid(), size) <= size
    assert (point_of(relative_size_grid(), size) < 3 / 4) == (size < 3 / 4)


@pytest.mark.parametrize("grid", [spacing_grid(), extent_grid(), shape_grid(), relative_size_grid()])
def test_points_ascend_and_each_stands_for_itself(grid):
    assert (np.diff(grid.points) > 0).all()
    assert (grid.count(grid.points) == 1).all()


@pytest.mark.parametrize("mm", [0.0, 1e-9, 1000.1, float("inf"), float("nan")])
def test_a_spacing_outside_the_grid_is_refused_with_the_range(mm):
    with pytest.raises(DatasetError, match="1e-06 to 1000") as refusal:
        spacing_grid().count(np.array([1.0, mm]))
    assert refusal.value.field == "spacing in mm"
