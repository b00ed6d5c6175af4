"""The global model at the server: its initial weights, and the folder that nnU-Net predicts from."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_flare.errors import ConfigError
from nnunet_flare.nnunet.config import TrainingConfig
from nnunet_flare.nnunet.stepper import find_trainer, seed_everything, write_checkpoint
from nnunet_flare.nnunet.weights import canonical_names, canonical_tensors, read_layers, write_layers
from nnunet_flare.storage import write_json

__all__ = ["build_network", "export", "initial_layers", "load_pretrained", "mirroring_axes", "read_weights"]


def build_network(
    config: TrainingConfig, plans: Mapping[str, Any], dataset_json: Mapping[str, Any], *, deep_supervision: bool = True
) -> torch.nn.Module:
    """A fresh network as the job's trainer builds it; plans from elsewhere must have passed ``check_classes``."""
    manager = PlansManager(dict(plans))
    configuration = manager.get_configuration(config.configuration)
    build = find_trainer(config.trainer).build_network_architecture
    if "plans_manager" in inspect.signature(build).parameters:
        described: tuple[Any, ...] = (manager, configuration)
    else:  # the signature that nnU-Net had before, and still accepts
        described = (
            configuration.network_arch_class_name,
            configuration.network_arch_init_kwargs,
            configuration.network_arch_init_kwargs_req_import,
        )
    num_channels = determine_num_input_channels(manager, configuration, dict(dataset_json))
    num_outputs = manager.get_label_manager(dict(dataset_json)).num_segmentation_heads
    return build(*described, num_channels, num_outputs, deep_supervision)


def initial_layers(
    config: TrainingConfig,
    alignment: str,
    plans: Mapping[str, Any],
    dataset_json: Mapping[str, Any],
    pretrained: Path | None,
) -> dict[str, np.ndarray]:
    """Canonical name -> float32 array: nnU-Net's own initialisation under the job's seed.

    A pretrained nnU-Net checkpoint replaces every layer but the segmentation heads, as nnU-Net does it; where sites
    plan for themselves, every such layer that fits.

    Args:
        config: The job's training settings.
        alignment: As for ``canonical_tensors``.
        plans: Full plans, or those of ``architecture_plans``.
        dataset_json: Channels and labels of the network.
        pretrained: Checkpoint file, or None (``load_pretrained``).

    Raises:
        ConfigError: the pretrained checkpoint is not readable, or its layers differ.
    """
    whole = "dataset_name" in plans  # else the server will never write a model of them
    if whole:
        mirroring_axes(config, plans)  # a trainer that cannot tell should end the job now, not after the last round
    seed_everything(config.seed, "initial weights")
    network = build_network(config, plans, dataset_json)
    if pretrained is not None:
        load_pretrained(network, pretrained, alignment=alignment, whole=whole, site="server")
    return read_layers(network, alignment=alignment)


def load_pretrained(network: torch.nn.Module, file: Path, *, alignment: str, whole: bool, site: str) -> None:
    """Copy a nnU-Net checkpoint into a network: every layer of the same canonical name and shape but the heads.

    Args:
        network: Changed in place.
        file: The checkpoint.
        alignment: As for ``canonical_tensors``.
        whole: Every layer but the heads must be there, as nnU-Net demands it; else one is enough.
        site: Who holds the file, for the error.

    Raises:
        ConfigError: the checkpoint is not readable, or its layers do not fit.
    """
    try:
        weights = read_weights(file)
        canonical = canonical_names(weights, alignment=alignment)
        weights = {canonical[name]: tensor.float().numpy() for name, tensor in weights.items()}
    except Exception as error:  # torch raises many things for a file that is not its own
        raise _pretrained_error(file, "a readable nnU-Net checkpoint", type(error).__name__, site) from error
    tensors = canonical_tensors(network, alignment=alignment)
    body = {name: tuple(tensor.shape) for name, tensor in tensors.items() if ".seg_layers." not in name}
    fitting = {name: weights[name] for name, shape in body.items() if name in weights and weights[name].shape == shape}
    if not fitting or (whole and len(fitting) < len(body)):
        expected = "the layers of the planned network" if whole else "layers of the planned network"
        raise _pretrained_error(file, expected, f"{len(fitting)} of {len(body)} that fit", site)
    write_layers(network, fitting, alignment=alignment)
    print(f"pretrained {file.name}: {len(fitting)} of {len(body)} layers")


def read_weights(file: Path) -> dict[str, torch.Tensor]:
    """``network_weights`` of a nnU-Net checkpoint on this machine, read without unpickling anything."""
    with torch.serialization.safe_globals(_NUMPY_SCALARS):
        return dict(torch.load(file, map_location="cpu", weights_only=True)["network_weights"])


_NUMPY_SCALARS = [
    np._core.multiarray.scalar,  # type: ignore[attr-defined]
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("float64", "float32", "int64", "int32", "bool")),
]
"""nnU-Net's checkpoints hold NumPy scalars, which ``weights_only`` refuses unless they are named."""


def _pretrained_error(file: Path, expected: str, found: str, site: str) -> ConfigError:
    return ConfigError(
        field=f"pretrained {file.name}",
        expected=expected,
        found=found,
        remedy="name a checkpoint of such a network, or leave the setting out",
        site=site,
    )


def export(
    config: TrainingConfig,
    plans: Mapping[str, Any],
    dataset_json: Mapping[str, Any],
    fingerprint: Mapping[str, Any],
    layers: Mapping[str, np.ndarray],
    folder: Path,
) -> None:
    """Write ``plans.json``, ``dataset.json``, ``dataset_fingerprint.json`` and ``fold_X/checkpoint_final.pth``."""
    network = build_network(config, plans, dataset_json)
    write_layers(network, layers)
    checkpoint = {
        "network_weights": network.state_dict(),
        "optimizer_state": None,
        "grad_scaler_state": None,
        "logging": None,
        "_best_ema": None,
        "current_epoch": config.num_rounds * config.epochs_per_round,
        "init_args": {"plans": dict(plans), "configuration": config.configuration, "fold": config.fold}
        | {"dataset_json": dict(dataset_json)},
        "trainer_name": config.trainer,
        "inference_allowed_mirroring_axes": mirroring_axes(config, plans),
    }
    fold = folder / f"fold_{config.fold}"
    write_checkpoint(fold / "checkpoint_final.pth", lambda handle: torch.save(checkpoint, handle))
    for name, content in (("plans", plans), ("dataset", dataset_json), ("dataset_fingerprint", fingerprint)):
        write_json(folder / f"{name}.json", content)


def mirroring_axes(config: TrainingConfig, plans: Mapping[str, Any]) -> tuple[int, ...] | None:
    """What the trainer decides about mirroring for this configuration; its own method is asked, without data."""
    trainer_class = find_trainer(config.trainer)
    trainer = object.__new__(trainer_class)
    trainer.configuration_manager = PlansManager(dict(plans)).get_configuration(config.configuration)
    trainer.inference_allowed_mirroring_axes = None
    trainer.print_to_log_file = lambda *args, **kwargs: None
    trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    return trainer.inference_allowed_mirroring_axes
