"""Layers by canonical name: the values that travel between sites and server."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from nnunet_flare.errors import UpdateError

__all__ = ["Layers", "Signature", "apply_update", "check_layers"]

Layers = Mapping[str, NDArray[np.float32]]
"""Canonical layer name -> float32 array."""
Signature = Mapping[str, tuple[int, ...]]
"""Canonical layer name -> shape."""

_PRECISIONS = (np.float16, np.float32, np.float64)
"""What is summed alike; FLARE's own noise filters make float64 of float32."""
MAX_ABS_VALUE = 2.0**22
"""Values at or beyond this are refused: no trained nnU-Net holds them, and the fixed-point sum has no room."""


def check_layers(layers: Layers, expected: Signature, *, site: str) -> None:
    """Refuse layers that are not exactly what was asked for, before any of them is used.

    Raises:
        UpdateError: a layer is missing, unasked for, of another shape or type, or holds NaN, infinity or a value
            of 2**22 or more. All layers are checked before the first is used.
    """
    _check_names(layers, expected, site)
    for name, shape in expected.items():
        array = layers[name]
        if not isinstance(array, np.ndarray) or array.dtype not in _PRECISIONS:
            raise _error(name, "a floating-point array", str(getattr(array, "dtype", type(array).__name__)), site)
        if tuple(array.shape) != tuple(shape):
            raise _error(name, f"shape {tuple(shape)}", f"shape {tuple(array.shape)}", site)
        # NaN is both the smallest and the largest value of an array that holds it, and fails the comparison.
        if array.size and not (float(array.min()) > -MAX_ABS_VALUE and float(array.max()) < MAX_ABS_VALUE):
            raise _error(name, f"finite values below {MAX_ABS_VALUE:.0f}", "NaN, infinite or exploded values", site)


def _check_names(layers: Layers, expected: Signature, site: str) -> None:
    for kind, names in (("missing", set(expected) - set(layers)), ("extra", set(layers) - set(expected))):
        if names:
            listed = ", ".join(sorted(names)[:3])
            raise _error(
                listed, f"exactly the {len(expected)} layers that were sent", f"{len(names)} {kind} layers", site
            )


def _error(name: str, expected: str, found: str, site: str) -> UpdateError:
    return UpdateError(
        field=f"layer {name}",
        expected=expected,
        found=found,
        remedy="the update is left out of this round; look into the site's training log",
        site=site,
    )


def apply_update(layers: Layers, update: Layers) -> dict[str, NDArray[np.float32]]:
    """``layers`` plus ``update``; layers that the update does not name stay as they are.

    >>> apply_update({"w": np.float32([1, 2]), "b": np.float32([0])}, {"w": np.float32([1, 1])})["w"]
    array([2., 3.], dtype=float32)
    """
    return {name: array + update[name] if name in update else array for name, array in layers.items()}
