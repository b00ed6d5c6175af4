"""Messages between a site's FLARE process and its nnU-Net process: JSON text, then the bytes of each array.

Nothing is pickled. A message is ``content`` (JSON values) and optionally ``layers`` (name -> array).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

__all__ = ["receive", "send"]


def send(pipe: Connection, content: Mapping[str, Any], layers: Mapping[str, np.ndarray] | None = None) -> None:
    layers = layers or {}
    described = [[name, array.dtype.str, array.shape] for name, array in layers.items()]
    pipe.send_bytes(json.dumps({"content": content, "layers": described}).encode())
    for array in layers.values():
        pipe.send_bytes(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def receive(pipe: Connection) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    message = json.loads(pipe.recv_bytes())
    layers = {}
    for name, dtype, shape in message["layers"]:
        array = np.empty(shape, np.dtype(dtype))
        pipe.recv_bytes_into(array.reshape(-1).view(np.uint8).data)
        layers[name] = array
    return message["content"], layers
