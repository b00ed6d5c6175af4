"""What travels between server and sites, and nothing else: JSON text, and named arrays.

Layers travel as FLARE's WEIGHTS or WEIGHT_DIFF, so that its stock filters apply to them; the rest of a message is
one JSON text. Both are checked on arrival and cast to a ``Message``: nothing that was pickled, and no other type
that FLARE can carry, gets past this module.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.shareable import Shareable

from nnunet_flare.errors import NNUNetFlareError, UpdateError, WorkerError, error_from_reply

__all__ = [
    "CERTIFICATE",
    "COUNTS",
    "DESCRIBE",
    "EVALUATE",
    "EXTRACT_FINGERPRINT",
    "FINAL_MODEL",
    "FINGERPRINT",
    "FORGET_KEY",
    "KEY_TASKS",
    "LAYER_SIGNATURE",
    "MAKE_KEY",
    "PLAN",
    "PLAN_LOCALLY",
    "RECEIVE_KEY",
    "SCORE_MODEL",
    "TASKS",
    "TRAIN",
    "VALIDATE",
    "Message",
    "error_message",
    "layer_bytes",
    "read_message",
]

DESCRIBE = "describe"
EXTRACT_FINGERPRINT = "extract_fingerprint"
PLAN = "plan"
PLAN_LOCALLY = "plan_locally"
LAYER_SIGNATURE = "layer_signature"
TRAIN = "train"
EVALUATE = "evaluate"
VALIDATE = "validate"
FINAL_MODEL = "final_model"
SCORE_MODEL = "score_model"
TASKS = (
    DESCRIBE,
    EXTRACT_FINGERPRINT,
    PLAN,
    PLAN_LOCALLY,
    LAYER_SIGNATURE,
    TRAIN,
    EVALUATE,
    VALIDATE,
    FINAL_MODEL,
    SCORE_MODEL,
)
CERTIFICATE = "certificate"
MAKE_KEY = "make_key"
RECEIVE_KEY = "receive_key"
FORGET_KEY = "forget_key"
KEY_TASKS = (CERTIFICATE, MAKE_KEY, RECEIVE_KEY, FORGET_KEY)
"""Tasks of encrypted jobs alone."""
COUNTS, FINGERPRINT = "counts", "fingerprint"
"""The only array of an encrypted fingerprint, and the group that its vector belongs to."""

_TEXT = "nnunet_flare"
_LAYER_KINDS = (DataKind.WEIGHTS, DataKind.WEIGHT_DIFF)


@dataclass(frozen=True, kw_only=True)
class Message:
    """One task or reply.

    Args:
        content: JSON values.
        layers: Canonical layer name -> float32 or float16 array; or bytes (uint8), of encrypted vectors.
        difference: The layers are differences to the layers that the site received.
    """

    content: Mapping[str, Any] = field(default_factory=dict)
    layers: Mapping[str, np.ndarray] = field(default_factory=dict)
    difference: bool = False

    def to_shareable(self, instead_of: Shareable | None = None) -> Shareable:
        """FLARE's form; ``instead_of`` keeps the headers of a message that a filter replaces."""
        text = json.dumps(self.content)
        if self.layers:
            kind = DataKind.WEIGHT_DIFF if self.difference else DataKind.WEIGHTS
            dxo = DXO(kind, data=dict(self.layers), meta={_TEXT: text})
        else:
            dxo = DXO(DataKind.APP_DEFINED, data={_TEXT: text})
        return dxo.update_shareable(Shareable() if instead_of is None else instead_of)


def read_message(
    shareable: Shareable,
    *,
    sender: str,
    fetch: Callable[[dict[str, Any]], dict[str, Any]] | None = dict,
    take: bool = False,
) -> Message:
    """Check and cast what FLARE delivered.

    Args:
        fetch: Replaces what FLARE delivered in the place of the arrays by the arrays; None where none are expected.
        take: Leave no arrays in the shareable, which FLARE keeps hold of.

    Raises:
        NNUNetFlareError: the error that the sender reported.
        WorkerError: FLARE reports that the sender failed without saying why.
        UpdateError: the message is not of this protocol.
    """
    if (code := shareable.get_return_code(ReturnCode.OK)) != ReturnCode.OK:
        raise WorkerError(
            field="reply",
            expected="a result",
            found=f"FLARE's return code {code}",
            remedy="see the log of the site's job",
            site=sender,
        )
    try:
        dxo = from_shareable(shareable)
        layers = dxo.data if dxo.data_kind in _LAYER_KINDS else {}
        if not layers and (dxo.data_kind != DataKind.APP_DEFINED or set(dxo.data) != {_TEXT}):
            raise _foreign("another kind of data", sender)
        content = json.loads((dxo.meta if layers else dxo.data)[_TEXT])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise _foreign(type(error).__name__, sender) from error
    if not isinstance(content, dict):
        raise _foreign(type(content).__name__, sender)
    if layers and fetch is None:
        raise _foreign("layers that nobody asked for", sender)
    delivered, layers = layers, fetch(dict(layers)) if fetch else {}  # a copy, for FLARE keeps hold of the shareable
    if take:
        delivered.clear()
    # FLARE delivers an array without axes as a NumPy scalar.
    layers = {name: np.asarray(array) if isinstance(array, np.floating) else array for name, array in layers.items()}
    for name, array in layers.items():
        known = isinstance(array, np.ndarray) and (array.dtype.kind == "f" or array.dtype == np.uint8)
        if not isinstance(name, str) or not known:
            raise _foreign(f"{type(array).__name__} among the layers", sender)
    if isinstance(content.get("error"), dict):
        error = error_from_reply(content["error"])
        error.site = sender
        raise error
    return Message(content=content, layers=layers, difference=dxo.data_kind == DataKind.WEIGHT_DIFF)


def _foreign(found: str, sender: str) -> UpdateError:
    return UpdateError(
        field="message",
        expected="JSON text and named float arrays",
        found=found,
        remedy="run the same version of nnunet-flare everywhere",
        site=sender,
    )


def error_message(error: NNUNetFlareError) -> Message:
    """A site's expected failure, in the fixed schema that may leave it."""
    return Message(content={"error": error.to_reply()})


def layer_bytes(layers: Mapping[str, np.ndarray]) -> int:
    return sum(array.nbytes for array in layers.values())
