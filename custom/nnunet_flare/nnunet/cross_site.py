"""A model of one site on the validation cases of another, from raw images as nnU-Net predicts them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_flare.errors import DatasetError, LayerMismatchError
from nnunet_flare.nnunet.config import TrainingConfig
from nnunet_flare.nnunet.dataset import RawDataset
from nnunet_flare.nnunet.evaluate import CaseMetrics, foreground_labels
from nnunet_flare.nnunet.metrics import segmentation_metrics
from nnunet_flare.nnunet.model import build_network, mirroring_axes
from nnunet_flare.nnunet.network_plan import check_classes
from nnunet_flare.nnunet.weights import canonical_tensors, write_layers

__all__ = ["score_foreign_model"]


def score_foreign_model(
    config: TrainingConfig,
    plans: Mapping[str, Any],
    dataset_json: Mapping[str, Any],
    layers: Mapping[str, np.ndarray],
    *,
    dataset: RawDataset,
    cases: Sequence[str],
    reader: BaseReaderWriter,
    device: torch.device,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[CaseMetrics]:
    """Predict with another site's network, plans and preprocessing; score the labels that both sites know.

    Args:
        config: The job's training settings.
        plans: The other site's plans, whole. They came over the wire: classes in them are checked before use.
        dataset_json: The other site's channels and labels.
        layers: All layers of its network, named as in ``canonical_tensors``.
        dataset: This site's raw data.
        cases: Validation cases of this site.
        reader: This site's reader of its own images.
        device: Where to predict.
        progress: Called with cases done and to do.

    Returns:
        Scores without case names, ordered by score.

    Raises:
        PlansError: the plans name classes that are not nnU-Net's.
        DatasetError: the two data sets have other channels, or no label in common.
    """
    check_classes(plans, config.configuration)
    own = dataset.schema
    own_channels = [own.channel_names[index] for index in sorted(own.channel_names)]
    channels = [dataset_json["channel_names"][index] for index in sorted(dataset_json["channel_names"], key=int)]
    labels = {name: value for name, value in foreground_labels(dict(dataset_json)).items() if name in own.labels}
    if channels != own_channels or not labels:
        raise DatasetError(
            field="cross-site model",
            expected=f"channels {', '.join(own_channels)} and a label among {', '.join(own.labels)}",
            found=f"channels {', '.join(channels)} and labels {', '.join(dataset_json['labels'])}",
            remedy="leave this pair out: these sites segment different things",
        )
    network = build_network(config, plans, dataset_json, deep_supervision=False).to(device).eval()
    if layers.keys() != (expected := canonical_tensors(network).keys()):
        raise LayerMismatchError(
            field="cross-site model",
            expected=f"all {len(expected)} layers of the network that its plans describe",
            found=f"{len(layers.keys() & expected)} of them, and {len(layers.keys() - expected)} others",
            remedy="run the same version of nnunet-flare at every site",
        )
    write_layers(network, layers)
    predictor = nnUNetPredictor(device=device, perform_everything_on_device=device.type == "cuda", allow_tqdm=False)
    manager = PlansManager(dict(plans))
    predictor.manual_initialization(
        network,
        manager,
        manager.get_configuration(config.configuration),
        [network.state_dict()],
        dict(dataset_json),
        config.trainer,
        mirroring_axes(config, plans),
    )
    scores = []
    for number, case in enumerate(cases, start=1):
        files = dataset.cases[case]
        image, properties = reader.read_images(list(map(str, files.images)))
        reference, _ = reader.read_seg(str(files.label))
        prediction = predictor.predict_single_npy_array(image, properties)
        metrics = segmentation_metrics(
            reference[0],
            prediction,
            labels=labels,
            spacing_mm=properties["spacing"],
            ignore_label=own.ignore_label,
            nsd_tolerance_mm=config.nsd_tolerance_mm,
        )
        scores.append({name: {"dsc": m.dsc, "hd95_mm": m.hd95_mm, "nsd": m.nsd} for name, m in metrics.items()})
        progress(number, len(cases))
    return sorted(scores, key=str)
