import copy
import json
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from nnunet_flare.errors import DatasetError, UpdateError
from nnunet_flare.fingerprint.buckets import RELATIVE_ACCURACY
from nnunet_flare.fingerprint.summary import CaseValues, FingerprintSummary, merge_summaries

DRAWS, CHANNELS = 5, 2
intensity = npst.arrays(np.float32, DRAWS, elements=st.floats(-3000, 3000, width=32))
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


cases = st.lists(a_case(), min_size=1, max_size=6)


def case(*draws, shape=(4, 5, 6), spacing_mm=(3.0, 1.0, 1.0), relative_size=1.0):
    return CaseValues(
        shape=shape, spacing_mm=spacing_mm, relative_size=relative_size, intensities=[np.array(d, float) for d in draws]
    )


@settings(max_examples=50)
@given(cases, cases, cases)
def test_merging_is_associative_and_commutative_and_equals_pooling_to_the_last_bit(a, b, c):
    x, y, z = map(FingerprintSummary.from_cases, (a, b, c))
    assert (x + y) + z == x + (y + z)
    assert x + y == y + x
    assert merge_summaries([z, x, y]) == FingerprintSummary.from_cases(a + b + c)


@settings(max_examples=50)
@given(cases)
def test_a_summary_survives_the_wire(some):
    summary = FingerprintSummary.from_cases(some)
    assert FingerprintSummary.from_json(json.loads(json.dumps(summary.to_json()))) == summary


@settings(max_examples=50)
@given(cases.filter(lambda some: any(c.intensities[0].size for c in some)))
def test_statistics_equal_numpys_over_all_draws(some):
    fingerprint = FingerprintSummary.from_cases(some).to_nnunet()
    for channel, got in fingerprint["foreground_intensity_properties_per_channel"].items():
        draws = np.concatenate([c.intensities[int(channel)] for c in some]).astype(np.float64)
        scale = np.abs(draws).max()
        assert (got["min"], got["max"]) == (draws.min(), draws.max())
        assert got["mean"] == pytest.approx(draws.mean(), rel=1e-12, abs=1e-12 * scale)
        assert got["std"] == pytest.approx(draws.std(), rel=1e-9, abs=1e-7 * scale)
        for name, percent in (("percentile_00_5", 0.5), ("median", 50), ("percentile_99_5", 99.5)):
            assert got[name] == pytest.approx(np.percentile(draws, percent), abs=1.001 * RELATIVE_ACCURACY * scale)
    assert fingerprint["median_relative_size_after_cropping"] == np.median([c.relative_size for c in some])


def test_cases_weigh_equally_and_those_without_foreground_count_for_geometry_only():
    summary = FingerprintSummary.from_cases([case([0, 4]), case([8, 8], relative_size=0.5), case([])])
    assert summary.num_training == 3
    assert summary.channels[0].num_cases == 2
    assert summary.channels[0].mean_sum == Fraction(10)
    assert summary.to_nnunet()["foreground_intensity_properties_per_channel"]["0"]["mean"] == 5


def test_constant_intensities_have_no_spread_and_exact_percentiles():
    statistics = FingerprintSummary.from_cases([case([0.1] * 7)] * 3).channels[0].to_nnunet()
    assert statistics["std"] == pytest.approx(0, abs=1e-8)
    assert statistics["percentile_00_5"] == statistics["median"] == statistics["percentile_99_5"] == 0.1


def test_intensities_whose_squares_underflow_survive_the_wire():
    summary = FingerprintSummary.from_cases([case([0, 0, 3e-209]), case([1e-160, 1e-160, 1e-160])])
    assert FingerprintSummary.from_json(json.loads(json.dumps(summary.to_json()))) == summary


def test_the_order_of_cases_does_not_show():
    a, b = case([1], shape=(9, 9, 9), relative_size=0.9), case([2], relative_size=0.2)
    assert FingerprintSummary.from_cases([a, b]).to_json() == FingerprintSummary.from_cases([b, a]).to_json()


def test_a_federation_without_any_foreground_is_refused():
    with pytest.raises(DatasetError, match="at least one training case with foreground"):
        FingerprintSummary.from_cases([case([])]).to_nnunet()


def test_different_numbers_of_draws_or_channels_are_not_merged():
    one = FingerprintSummary.from_cases([case([1, 2])])
    with pytest.raises(UpdateError, match="draws per case"):
        one + FingerprintSummary.from_cases([case([1, 2, 3])])
    with pytest.raises(UpdateError, match="channels"):
        one + FingerprintSummary.from_cases([case([1, 2], [1, 2])])


BREAKAGES = {
    "summary": lambda sent: sent.pop("channels"),
    "geometries": lambda sent: sent["geometries"][0][0].__setitem__(0, 0),
    "geometries ": lambda sent: sent["geometries"][0][0].__setitem__(0, True),
    "geometries  ": lambda sent: sent["geometries"][0][1].__setitem__(0, -1.0),
    "geometries   ": lambda sent: sent["geometries"][0][1].__setitem__(0, 10**400),
    "geometries    ": lambda sent: sent["geometries"].__setitem__(0, "[[1,1,1],[1,1,1]]"),
    "geometries     ": lambda sent: sent.update(geometries=[]),
    "geometries      ": lambda sent: sent["geometries"][0][1].append(1.0),
    "relative_sizes": lambda sent: sent["relative_sizes"].__setitem__(0, float("nan")),
    "relative_sizes ": lambda sent: sent["relative_sizes"].__setitem__(0, 1.5),
    "relative_sizes  ": lambda sent: sent["relative_sizes"].append(0.5),
    "channels": lambda sent: sent.update(channels={}),
    "channel": lambda sent: sent["channels"].__setitem__(0, None),
    "num_cases": lambda sent: sent["channels"][0].update(num_cases=-1),
    "num_cases ": lambda sent: sent["channels"][0].update(num_cases=0),
    "num_cases  ": lambda sent: sent["channels"][0].update(num_cases=1.0),
    "mean_sum": lambda sent: sent["channels"][0].update(mean_sum="1e999999999"),
    "mean_sum ": lambda sent: sent["channels"][0].update(mean_sum="1/0"),
    "mean_sum  ": lambda sent: sent["channels"][0].update(mean_sum="9" * 600 + "/1"),
    "mean_sum   ": lambda sent: sent["channels"][0].update(mean_sum=1.0),
    "mean_square_sum": lambda sent: sent["channels"][0].update(mean_square_sum="1/1"),
    "mean_square_sum ": lambda sent: sent["channels"][0].update(minimum=1000.0),
    "minimum": lambda sent: sent["channels"][0].update(minimum=None),
    "maximum": lambda sent: sent["channels"][0].update(maximum=float("inf")),
    "buckets": lambda sent: sent["channels"][0]["buckets"]["counts"].__setitem__(0, 2),
    "buckets ": lambda sent: sent["channels"][0].update(buckets=[]),
}


@pytest.mark.parametrize("field", BREAKAGES)
def test_garbage_from_the_wire_is_refused_by_name(field):
    sent = FingerprintSummary.from_cases([case([1, 100]), case([3, 4])]).to_json()
    FingerprintSummary.from_json(copy.deepcopy(sent))
    BREAKAGES[field](sent)
    with pytest.raises(UpdateError) as refusal:
        FingerprintSummary.from_json(sent)
    assert refusal.value.field == f"fingerprint: {field.strip()}"
