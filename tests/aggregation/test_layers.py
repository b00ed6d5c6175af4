from __future__ import annotations

import numpy as np
import pytest

from nnunet_flare.aggregation.layers import check_layers
from nnunet_flare.errors import UpdateError

GOOD = {"conv.weight": np.zeros((2, 3), np.float32), "conv.bias": np.zeros(2, np.float32)}
SIGNATURE = {"conv.weight": (2, 3), "conv.bias": (2,)}


def with_value(value: float, dtype=np.float32) -> dict[str, np.ndarray]:
    weight = np.zeros((2, 3), dtype)
    weight[1, 2] = value
    return GOOD | {"conv.weight": weight}


@pytest.mark.parametrize(
    ("layers", "expected", "found"),
    [
        (with_value(np.nan), "finite", "NaN"),
        (with_value(np.inf), "finite", "infinite"),
        (with_value(-np.inf), "finite", "infinite"),
        (with_value(np.nan, np.float16), "finite", "NaN"),
        (with_value(2.0**22), "finite", "exploded"),
        (with_value(-(2.0**22)), "finite", "exploded"),
        ({"conv.weight": GOOD["conv.weight"]}, "exactly the 2 layers", "1 missing"),
        (GOOD | {"head.weight": np.zeros(1, np.float32)}, "exactly the 2 layers", "1 extra"),
        (GOOD | {"conv.bias": np.zeros(3, np.float32)}, "shape (2,)", "shape (3,)"),
        (GOOD | {"conv.bias": np.zeros(2, np.int64)}, "floating-point", "int64"),
        (GOOD | {"conv.bias": np.array([None, None])}, "floating-point", "object"),
    ],
)
def test_a_wrong_layer_is_refused_with_site_and_layer(layers, expected, found):
    with pytest.raises(UpdateError) as refused:
        check_layers(layers, SIGNATURE, site="site-2")
    error = refused.value
    assert error.site == "site-2"
    assert expected in error.expected
    assert found in error.found
    assert "layer" in error.field


def test_right_layers_pass_in_both_precisions_and_when_empty():
    check_layers(GOOD, SIGNATURE, site="site-1")
    check_layers(with_value(-3, np.float16), SIGNATURE, site="site-1")
    empty = {"none": np.zeros((0, 3), np.float32)}
    check_layers(empty, {name: array.shape for name, array in empty.items()}, site="site-1")
