"""One canonical name per tensor of a network.

nnU-Net's ``state_dict`` names every encoder convolution four times and every decoder convolution twice, because
modules are registered under several paths. Here each tensor has one name: the first path that leads to it, without
the prefixes of ``torch.compile`` and ``DistributedDataParallel``. Sites that compile and sites that do not therefore
speak of the same layers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import torch

from nnunet_flare.errors import LayerMismatchError

__all__ = ["canonical_tensors", "read_layers", "write_layers"]

_WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.)+")


def canonical_tensors(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Canonical name -> live tensor: parameters, and floating-point buffers that are part of the model's state.

    Integer buffers (``num_batches_tracked``) count local steps and are left out: they have no mean.
    """
    tensors: dict[str, torch.Tensor] = {name: tensor.data for name, tensor in network.named_parameters()}
    persistent = network.state_dict().keys()
    for name, buffer in network.named_buffers():
        if buffer.is_floating_point() and name in persistent:
            tensors[name] = buffer
    return {_WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}


def read_layers(network: torch.nn.Module) -> dict[str, np.ndarray]:
    """Copies of all canonical tensors as float32 arrays."""
    return {
        name: tensor.detach().to("cpu", torch.float32, copy=True).numpy()
        for name, tensor in canonical_tensors(network).items()
    }


@torch.no_grad()
def write_layers(network: torch.nn.Module, layers: Mapping[str, np.ndarray]) -> None:
    """Copy ``layers`` into the live network; tensors that are not named stay as they are.

    Raises:
        LayerMismatchError: a layer is unknown to the network or has another shape.
    """
    tensors = canonical_tensors(network)
    for name, array in layers.items():
        if name not in tensors or tuple(tensors[name].shape) != array.shape:
            raise LayerMismatchError(
                field=f"layer {name}",
                expected=f"shape {tuple(tensors[name].shape)}" if name in tensors else "a layer of this site's network",
                found=f"shape {array.shape}",
                remedy="the sites' network plans differ: plan them together (jobs/ffe)",
            )
        tensors[name].copy_(torch.from_numpy(np.asarray(array, order="C")))
