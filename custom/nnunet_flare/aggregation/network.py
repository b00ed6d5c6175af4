"""A site's network as the federation sees it: names, shapes and kinds of its layers, no values."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from nnunet_flare.errors import LayerMismatchError

__all__ = [
    "KINDS",
    "Layer",
    "Network",
    "block_of",
    "blocks_of",
    "check_same_network",
    "network_from_json",
    "network_to_json",
]

KINDS = ("weight", "bias", "norm", "head")
"""What a layer is: a norm's weight and bias are ``norm``, a segmentation head's are ``head``."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One tensor of a site's network, without its values.

    Args:
        shape: Its shape.
        kind: One of ``KINDS``.
        meaning: What must agree besides the shape: the labels of a head, the channels of the first convolution.
    """

    shape: tuple[int, ...]
    kind: str = "weight"
    meaning: str = ""

    @property
    def size(self) -> int:
        return math.prod(self.shape)


Network = Mapping[str, Layer]
"""Canonical layer name -> layer: one site's network."""


def block_of(name: str) -> str:
    """The block that a layer belongs to.

    >>> block_of("encoder.stages.0.0.convs.1.norm.weight"), block_of("decoder.transpconvs.level_2.bias")
    ('encoder.stages.0.0.convs.1', 'decoder.transpconvs.level_2')
    """
    *path, _ = name.split(".")
    return ".".join(path[:-1] if len(path) > 1 and path[-1] in ("conv", "norm") else path)


def network_to_json(network: Network) -> list[list[Any]]:
    return [[name, list(layer.shape), layer.kind, layer.meaning] for name, layer in network.items()]


def network_from_json(layers: Iterable[Any]) -> dict[str, Layer]:
    """Inverse of ``network_to_json``, for what a site sent.

    Raises:
        ValueError, TypeError: another form.
    """
    network: dict[str, Layer] = {}
    for name, shape, kind, meaning in layers:
        named = isinstance(name, str) and re.fullmatch(r"[\w.-]{1,200}", name) and name not in network
        sized = all(type(size) is int and 0 < size < 2**31 for size in shape)
        if not named or not sized or kind not in KINDS or not isinstance(meaning, str):
            raise ValueError("a layer that no network has")
        network[name] = Layer(shape=tuple(shape), kind=kind, meaning=meaning)
    if not network:
        raise ValueError("no layers")
    return network


def blocks_of(network: Network) -> dict[str, dict[str, Layer]]:
    """Block -> its layers, each sorted by name."""
    blocks: dict[str, dict[str, Layer]] = {}
    for name in sorted(network):
        blocks.setdefault(block_of(name), {})[name] = network[name]
    return blocks


def check_same_network(site: str, network: Network, expected: Network, *, origin: str, remedy: str) -> None:
    """Check that a site's network is the expected one, layer by layer.

    Raises:
        LayerMismatchError: names the first layer that differs, and where (``origin``) the expected one is from.
    """
    for name in sorted(network.keys() | expected.keys()):
        if network.get(name) != expected.get(name):
            raise LayerMismatchError(
                field=f"layer {name}",
                expected=f"{_text(expected.get(name))} (as {origin})",
                found=_text(network.get(name)),
                remedy=remedy,
                site=site,
            )


def _text(layer: Layer | None) -> str:
    return f"shape {layer.shape} {layer.meaning}".strip() if layer else "no such layer"
