"""What one round moves: the size of the layers of a planned network."""

from __future__ import annotations

import json
from pathlib import Path

__all__ = ["layer_bytes"]


def layer_bytes(mark: Path) -> tuple[str, int]:
    """Configuration that was preprocessed, and the float32 size of its network's unique tensors.

    The network is built without memory for its weights, so that the size costs nothing.

    Args:
        mark: ``<data identifier>.complete`` in a preprocessed data set.
    """
    import torch
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    from nnunet_flare.nnunet.weights import canonical_tensors

    documents = [json.loads(file.read_text()) for file in mark.parent.glob("*.json")]
    plans, name = next(
        (document, name)
        for document in documents
        if isinstance(document, dict)
        for name, configuration in document.get("configurations", {}).items()
        if configuration.get("data_identifier") == mark.stem
    )
    dataset = json.loads((mark.parent / "dataset.json").read_text())
    manager = PlansManager(plans)
    configuration = manager.get_configuration(name)
    with torch.device("meta"):
        network = get_network_from_plans(
            configuration.network_arch_class_name,
            configuration.network_arch_init_kwargs,
            configuration.network_arch_init_kwargs_req_import,
            determine_num_input_channels(manager, configuration, dataset),
            manager.get_label_manager(dataset).num_segmentation_heads,
            allow_init=False,
            deep_supervision=True,
        )
    return name, 4 * sum(tensor.numel() for tensor in canonical_tensors(network).values())
