"""The key that the hospitals of one run share, and the server never sees."""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from nnunet_flare.encryption.bfv import Cipher
from nnunet_flare.encryption.parameters import PARAMETERS, Parameters

__all__ = ["AggregationKey"]

_MARK_BITS = 40
"""The marks of 95 sites then add up to less than half of a 48-bit plain modulus."""


@dataclass(frozen=True, kw_only=True)
class AggregationKey:
    """A BFV secret key, and the one that marks are derived from.

    Args:
        id: Public name of the key.
        parameters: Of the scheme.
        secret: The BFV key in SEAL's own form.
        mark_key: 32 bytes.
    """

    id: str
    parameters: Parameters
    secret: bytes = field(repr=False)
    mark_key: bytes = field(repr=False)

    @classmethod
    def new(cls, parameters: Parameters) -> AggregationKey:
        """Drawn from the operating system's randomness."""
        secret = Cipher(parameters).key
        return cls(id=secrets.token_hex(16), parameters=parameters, secret=secret, mark_key=secrets.token_bytes(32))

    @cached_property
    def cipher(self) -> Cipher:
        return Cipher(self.parameters, self.secret)

    def marks(self, label: str, number: int) -> NDArray[np.int64]:
        """``number`` pseudorandom integers of 40 bits for a label: SHAKE256(key, label)."""
        stream = hashlib.shake_256(self.mark_key + label.encode()).digest(8 * number)
        return (np.frombuffer(stream, "<u8") >> np.uint64(64 - _MARK_BITS)).astype(np.int64)

    def to_bytes(self) -> bytes:
        """What is sealed for a peer."""
        values = {"id": self.id, "parameters": self.parameters.id}
        keys = {"secret": self.secret, "mark_key": self.mark_key}
        return json.dumps(values | {name: base64.b64encode(key).decode() for name, key in keys.items()}).encode()

    @classmethod
    def from_bytes(cls, content: bytes) -> AggregationKey:
        """Raises ValueError, KeyError, TypeError: this is no key."""
        values = json.loads(content)
        secret, mark_key = (base64.b64decode(values[name], validate=True) for name in ("secret", "mark_key"))
        return cls(id=values["id"], parameters=PARAMETERS[values["parameters"]], secret=secret, mark_key=mark_key)
