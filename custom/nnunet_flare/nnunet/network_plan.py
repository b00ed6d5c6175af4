"""The part of the plans that all sites of one network must share."""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from nnunet_flare.errors import PlansError

__all__ = ["architecture_plans", "check_classes", "check_same_network_plans", "network_plan", "plan_digests"]

_SHARED = ("architecture", "preprocessor_name", "spacing", "normalization_schemes", "use_mask_for_norm")
_CLASSES = re.compile(
    r"(torch\.nn(\.modules\.[a-z]+)?|dynamic_network_architectures\.architectures\.[a-z0-9_]+)\.[A-Z][A-Za-z0-9]*"
)


def check_classes(plans: Mapping[str, Any], configuration: str) -> None:
    """Check that the plans name layers of torch and networks of nnU-Net, and nothing else.

    nnU-Net imports and calls whatever its plans name as network, convolution, norm or nonlinearity, so plans that came
    over the wire, or were edited by a job, could otherwise run any function of the machine.

    Raises:
        PlansError: a name is anything else.
    """
    architecture = plans["configurations"][configuration]["architecture"]
    imported = {name: architecture["arch_kwargs"].get(name) for name in architecture["_kw_requires_import"]}
    for name, value in {"network_class_name": architecture["network_class_name"], **imported}.items():
        if value is not None and not (isinstance(value, str) and _CLASSES.fullmatch(value)):
            raise PlansError(
                field=f"architecture: {name}",
                expected="a class of torch.nn or dynamic_network_architectures",
                found=repr(value)[:100],
                remedy="plan with nnU-Net's own planners, and correct plans_overrides",
            )


def network_plan(plans: Mapping[str, Any], configuration: str) -> dict[str, Any]:
    """What must be equal for one shared network on equally preprocessed images: dotted key -> JSON value.

    Batch and patch size are a site's own matter, as are the loss (``batch_dice``) and the image reader. Foreground
    intensities count only for channels that nnU-Net normalises by them.
    """
    settings = plans["configurations"][configuration]
    kept = {key: value for key, value in settings.items() if key in _SHARED or key.startswith("resampling_fn")}
    kept |= {key: plans[key] for key in ("transpose_forward", "transpose_backward")}
    kept["foreground_intensity_properties_per_channel"] = {
        str(channel): plans["foreground_intensity_properties_per_channel"][str(channel)]
        for channel, scheme in enumerate(settings["normalization_schemes"])
        if scheme == "CTNormalization"
    }
    return dict(_flatten(kept))


def architecture_plans(plans: Mapping[str, Any], configuration: str) -> dict[str, Any]:
    """Plans with nothing but the network's architecture: what a site that plans for itself tells of its plans."""
    kept = {"architecture": plans["configurations"][configuration]["architecture"]}
    return {"label_manager": plans["label_manager"], "configurations": {configuration: kept}}


def plan_digests(plans: Mapping[str, Any], configuration: str) -> dict[str, str]:
    """``network_plan`` with digests for values: enough to see whether two are equal, and where not."""
    values = network_plan(plans, configuration)
    return {key: hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12] for key, value in values.items()}


def check_same_network_plans(network_plans: Mapping[str, Mapping[str, Any]]) -> None:
    """Check that all sites would train the same network.

    Args:
        network_plans: Site -> its ``network_plan``.

    Raises:
        PlansError: some differ; names the keys, and for each value the sites that have it.
    """
    differences = {}
    for key in sorted({key for sent in network_plans.values() for key in sent}):
        sites = defaultdict(list)
        for site, sent in network_plans.items():
            sites[json.dumps(sent[key]) if key in sent else "nothing"].append(site)
        if len(sites) > 1:
            differences[key] = ", ".join(f"{value} at {' and '.join(names)}" for value, names in sites.items())
    if differences:
        raise PlansError(
            field=", ".join(differences),
            expected="one value at all sites",
            found="; ".join(f"{key}: {values}" for key, values in differences.items()),
            remedy="give all sites the same memory target, plans_overrides and version of nnU-Net",
        )


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
