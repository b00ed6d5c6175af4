"""One canonical name per tensor of a network.

nnU-Net's ``state_dict`` names every encoder convolution four times and every decoder convolution twice, because
modules are registered under several paths. Here each tensor has one name: the first path that leads to it, without
the prefixes of ``torch.compile`` and ``DistributedDataParallel``. Sites that compile and sites that do not therefore
speak of the same layers.

nnU-Net counts decoder stages from the bottom, so a name alone pairs stages of different resolution where networks
differ in depth. Aligned by resolution, decoder stages, transposed convolutions and segmentation heads are named by the
encoder level that they meet, counted from the top: ``decoder.stages.level_0`` works at full resolution.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch

from nnunet_flare.aggregation.network import Layer, block_of
from nnunet_flare.errors import LayerMismatchError

__all__ = ["canonical_names", "canonical_tensors", "describe_network", "read_layers", "write_layers"]

_WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.)+")
_DECODER = re.compile(r"^decoder\.(stages|transpconvs|seg_layers)\.(\d+)\.")
_NORMS = (torch.nn.modules.batchnorm._NormBase, torch.nn.GroupNorm, torch.nn.LayerNorm)


def canonical_tensors(network: torch.nn.Module, *, alignment: str = "name") -> dict[str, torch.Tensor]:
    """Canonical name -> live tensor: parameters, and floating-point buffers that are part of the model's state.

    Integer buffers (``num_batches_tracked``) count local steps and are left out: they have no mean.

    Args:
        network: Compiled and distributed networks are looked through.
        alignment: ``name``, or ``resolution`` as described above; networks without such a decoder keep their names.
    """
    tensors: dict[str, torch.Tensor] = {name: tensor.data for name, tensor in network.named_parameters()}
    persistent = network.state_dict().keys()
    for name, buffer in network.named_buffers():
        if buffer.is_floating_point() and name in persistent:
            tensors[name] = buffer
    names = canonical_names(tensors, alignment=alignment)
    return {names[name]: tensor for name, tensor in tensors.items()}


def canonical_names(names: Iterable[str], *, alignment: str) -> dict[str, str]:
    """Name in a network or its ``state_dict`` -> canonical name.

    >>> names = ["_orig_mod.decoder.stages.0.convs.0.norm.bias", "_orig_mod.decoder.stages.1.convs.0.norm.bias"]
    >>> list(canonical_names(names, alignment="resolution").values())
    ['decoder.stages.level_1.convs.0.norm.bias', 'decoder.stages.level_0.convs.0.norm.bias']
    """
    plain = {name: _WRAPPERS.sub("", name) for name in names}
    if alignment == "name":
        return plain
    matches = [match for name in plain.values() if (match := _DECODER.match(name))]
    top = {part: max(int(match[2]) for match in matches if match[1] == part) for part in {m[1] for m in matches}}

    def by_level(match: re.Match[str]) -> str:
        return f"decoder.{match[1]}.level_{top[match[1]] - int(match[2])}."

    return {name: _DECODER.sub(by_level, found, count=1) for name, found in plain.items()}


def describe_network(
    network: torch.nn.Module, *, alignment: str, channels: Sequence[str], outputs: Sequence[str]
) -> dict[str, Layer]:
    """Canonical name -> layer: what a site tells of its network.

    A segmentation head means the labels of its outputs, the first convolution the channels of its input. Heads are
    nnU-Net's ``seg_layers`` and whatever comes last in a network.

    Args:
        network: A site's network.
        alignment: As for ``canonical_tensors``.
        channels: Names of the input channels, in order.
        outputs: Labels or regions of the network's outputs, in order, background among them where it is an output.
    """
    tensors = canonical_tensors(network, alignment=alignment)
    of_norms = [
        f"{owner}.{name}"
        for owner, module in network.named_modules()
        if isinstance(module, _NORMS)
        for name in ("weight", "bias", "running_mean", "running_var")
    ]
    everything = canonical_names([*dict(network.named_parameters()), *of_norms], alignment=alignment)
    norms = {everything[name] for name in of_norms}
    trained = list(canonical_names(dict(network.named_parameters()), alignment=alignment).values())
    first, last = block_of(trained[0]), block_of(trained[-1])

    def describe(name: str, shape: tuple[int, ...]) -> Layer:
        owner, leaf = block_of(name), name.rpartition(".")[2]
        if ".seg_layers." in name or (owner == last and shape[:1] == (len(outputs),)):
            return Layer(shape=shape, kind="head", meaning=json.dumps(["labels", *outputs]))
        if name in norms:
            return Layer(shape=shape, kind="norm")
        meaning = json.dumps(["channels", *channels]) if owner == first and leaf == "weight" else ""
        return Layer(shape=shape, kind="bias" if leaf == "bias" else "weight", meaning=meaning)

    return {name: describe(name, tuple(tensor.shape)) for name, tensor in tensors.items()}


def read_layers(network: torch.nn.Module, *, alignment: str = "name") -> dict[str, np.ndarray]:
    """Copies of all canonical tensors as float32 arrays."""
    return {
        name: tensor.detach().to("cpu", torch.float32, copy=True).numpy()
        for name, tensor in canonical_tensors(network, alignment=alignment).items()
    }


@torch.no_grad()
def write_layers(network: torch.nn.Module, layers: Mapping[str, np.ndarray], *, alignment: str = "name") -> None:
    """Copy ``layers`` into the live network; tensors that are not named stay as they are.

    Raises:
        LayerMismatchError: a layer is unknown to the network or has another shape.
    """
    tensors = canonical_tensors(network, alignment=alignment)
    for name, array in layers.items():
        if name not in tensors or tuple(tensors[name].shape) != array.shape:
            raise LayerMismatchError(
                field=f"layer {name}",
                expected=f"shape {tuple(tensors[name].shape)}" if name in tensors else "a layer of this site's network",
                found=f"shape {array.shape}",
                remedy="the server holds layers of another network: give the run another name",
            )
        tensors[name].copy_(torch.from_numpy(np.asarray(array, order="C")))
