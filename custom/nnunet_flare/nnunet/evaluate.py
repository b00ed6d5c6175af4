"""Full validation of a model at a site: nnU-Net's sliding window over every validation case, then metrics."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.evaluation.evaluate_predictions import compute_metrics, save_summary_json
from nnunetv2.inference.export_prediction import export_prediction_from_logits
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.json_export import recursive_fix_for_json_export

from nnunet_flare.nnunet.metrics import segmentation_metrics

__all__ = ["foreground_labels", "validate"]

CaseMetrics = dict[str, dict[str, float]]
"""Label name -> {dsc, hd95_mm, nsd} of one case."""


def foreground_labels(dataset_json: dict[str, Any]) -> dict[str, int | tuple[int, ...]]:
    """Name -> label value, or the values of a region, in the order of nnU-Net's outputs; foreground only."""
    labels = {
        name: tuple(value) if isinstance(value, list | tuple) else value
        for name, value in dataset_json["labels"].items()
    }
    labels = {name: value for name, value in labels.items() if value != 0 and name != "ignore"}
    has_regions = any(isinstance(value, tuple) for value in labels.values())
    return labels if has_regions else dict(sorted(labels.items(), key=lambda item: item[1]))


def validate(
    trainer: nnUNetTrainer,
    *,
    subfolder: str = "validation",
    nsd_tolerance_mm: float,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[CaseMetrics]:
    """Predict and score the fold's validation cases with the weights as they are, in this process.

    Predictions and nnU-Net's ``summary.json`` are written to ``subfolder`` of the trainer's output, and a table
    with case names that stays there (``metrics.csv``). What is returned names no case and is ordered by score.
    """
    _, cases = trainer.do_split()
    folder = Path(trainer.output_folder) / subfolder
    folder.mkdir(parents=True, exist_ok=True)
    _predict(trainer, cases, folder, progress)

    reader = trainer.plans_manager.image_reader_writer_class()
    ending, ignore = trainer.dataset_json["file_ending"], trainer.label_manager.ignore_label
    labels = foreground_labels(trainer.dataset_json)
    truth = Path(trainer.preprocessed_dataset_folder_base) / "gt_segmentations"
    per_case, nnunet_metrics = {}, []
    for case in cases:
        files = str(truth / f"{case}{ending}"), str(folder / f"{case}{ending}")
        (reference, properties), (prediction, _) = reader.read_seg(files[0]), reader.read_seg(files[1])
        per_case[case] = segmentation_metrics(
            reference[0],
            prediction[0],
            labels=labels,
            spacing_mm=properties["spacing"],
            ignore_label=ignore,
            nsd_tolerance_mm=nsd_tolerance_mm,
        )
        nnunet_metrics.append(compute_metrics(*files, reader, list(labels.values()), ignore))
    _write_summary(nnunet_metrics, list(labels.values()), folder / "summary.json")
    _write_table(per_case, folder / "metrics.csv")
    scores = [
        {name: {"dsc": m.dsc, "hd95_mm": m.hd95_mm, "nsd": m.nsd} for name, m in metrics.items()}
        for metrics in per_case.values()
    ]
    return sorted(scores, key=str)


def _predict(trainer: nnUNetTrainer, cases: list[str], folder: Path, progress: Callable[[int, int], None]) -> None:
    trainer.set_deep_supervision_enabled(False)
    trainer.network.eval()
    predictor = nnUNetPredictor(device=trainer.device, allow_tqdm=False)
    predictor.manual_initialization(
        trainer.network,
        trainer.plans_manager,
        trainer.configuration_manager,
        None,
        trainer.dataset_json,
        type(trainer).__name__,
        trainer.inference_allowed_mirroring_axes,
    )
    dataset = trainer.dataset_class(trainer.preprocessed_dataset_folder, cases)
    for number, case in enumerate(cases, start=1):
        data, _, _, properties = dataset.load_case(case)
        logits = predictor.predict_sliding_window_return_logits(torch.from_numpy(np.array(data[:]))).cpu()
        export_prediction_from_logits(
            logits,
            properties,
            trainer.configuration_manager,
            trainer.plans_manager,
            trainer.dataset_json,
            str(folder / case),
            num_threads_torch=torch.get_num_threads(),
        )
        progress(number, len(cases))
    trainer.set_deep_supervision_enabled(trainer.enable_deep_supervision)


def _write_summary(cases: list[dict[str, Any]], labels: list[Any], file: Path) -> None:
    """nnU-Net's summary.json: mean over cases per label, then over labels."""
    names = list(cases[0]["metrics"][labels[0]])
    with np.errstate(all="ignore"):
        means = {r: {n: float(np.nanmean([c["metrics"][r][n] for c in cases])) for n in names} for r in labels}
    foreground = {name: float(np.mean([means[label][name] for label in labels])) for name in names}
    for case in cases:
        recursive_fix_for_json_export(case)
    save_summary_json({"metric_per_case": cases, "mean": means, "foreground_mean": foreground}, str(file))


def _write_table(per_case: dict[str, Any], file: Path) -> None:
    with file.open("w", newline="") as handle:
        table = csv.writer(handle)
        table.writerow(["case", "label", "dsc", "hd95_mm", "nsd"])
        for case, metrics in per_case.items():
            table.writerows([case, name, m.dsc, m.hd95_mm, m.nsd] for name, m in metrics.items())
