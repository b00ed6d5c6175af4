"""What a round adds to the trainer's own objective: a pull towards the weights received, and layers that stay fixed.

Both work from outside, on any trainer: its ``train_step`` is not touched.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from nnunet_flare.errors import ConfigError
from nnunet_flare.nnunet.weights import canonical_tensors

__all__ = ["freeze_layers", "proximal_term"]


@contextlib.contextmanager
def proximal_term(
    network: torch.nn.Module, names: Iterable[str], *, mu: float, alignment: str = "name"
) -> Iterator[None]:
    """Inside, every optimizer step minimises the loss plus ``mu / 2 * |w - w_received|^2``.

    FedProx (Li et al., MLSys 2020, eq. 2). The weights received are those that the layers ``names`` have on entry;
    other layers, and buffers such as running statistics, have no anchor. The term's gradient ``mu * (w - w_received)``
    is added just before a step, in weight units: after a GradScaler has unscaled the gradients (and not in a step that
    it skips), and after the trainer has clipped them. Clipping (nnU-Net: norm 12) therefore concerns the gradient of
    the data alone, and cannot weaken the pull. The training loss that nnU-Net logs is that of the data, too. A
    parameter that got no gradient in a step does not move and is not pulled.

    The hook is torch's own for all optimizers, for a trainer may have several, or exchange them.

    Args:
        names: Canonical names of the layers that were received.
        mu: Not negative; with 0 nothing is hooked.
        alignment: How the names are meant (``weights.canonical_tensors``).
    """
    if mu == 0:
        yield
        return
    received = set(names)
    anchors = {
        parameter: parameter.detach().clone()
        for name, parameter in _canonical_parameters(network, alignment).items()
        if name in received and parameter.requires_grad
    }

    @torch.no_grad()
    def pull(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        scale = getattr(optimizer, "grad_scale", None)  # of a fused optimizer, which unscales within its step
        strength = mu if scale is None else mu * float(scale)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter in anchors:
                    parameter.grad.add_(parameter - anchors[parameter], alpha=strength)

    hook = register_optimizer_step_pre_hook(pull)
    try:
        yield
    finally:
        hook.remove()


def freeze_layers(network: torch.nn.Module, patterns: Sequence[str], *, alignment: str = "name") -> None:
    """Fix the parameters whose canonical name holds a match (``re.search``) of one of the patterns.

    They get no gradient, and a torch optimizer leaves a parameter without one as it is: no weight decay, no momentum.
    Buffers are no parameters: the running statistics of a batch norm go on following the data.

    Raises:
        ConfigError: a pattern matches no parameter, or nothing is left to train.
    """
    parameters = _canonical_parameters(network, alignment)
    for pattern in patterns:
        matching = [parameter for name, parameter in parameters.items() if re.search(pattern, name)]
        if not matching:
            raise _freeze_error(f"a match in the name of a parameter, such as {next(iter(parameters))}", repr(pattern))
        for parameter in matching:
            parameter.requires_grad_(False)
    if patterns and not any(parameter.requires_grad for parameter in parameters.values()):
        raise _freeze_error("at least one parameter that still trains", ", ".join(map(repr, patterns)))


def _freeze_error(expected: str, found: str) -> ConfigError:
    return ConfigError(field="freeze", expected=expected, found=found, remedy="correct the job's settings")


def _canonical_parameters(network: torch.nn.Module, alignment: str) -> dict[str, torch.nn.Parameter]:
    """Canonical name -> parameter itself, where ``canonical_tensors`` has its data."""
    parameters = {parameter.data_ptr(): parameter for parameter in network.parameters()}
    tensors = {name: tensor.data_ptr() for name, tensor in canonical_tensors(network, alignment=alignment).items()}
    return {name: parameters[address] for name, address in tensors.items() if address in parameters}
