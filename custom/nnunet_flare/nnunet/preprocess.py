"""Preprocessed data of one site: made once for each combination of plans and raw files, then found again."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.crossval_split import generate_crossval_split
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_flare.errors import DatasetError
from nnunet_flare.nnunet.dataset import Case, RawDataset
from nnunet_flare.nnunet.extract import each_case
from nnunet_flare.storage import FolderLock, write_atomically, write_json

__all__ = ["fold_cases", "preprocess"]

_SPLITS = "splits_final.json"


def preprocess(
    raw_dataset_folder: Path,
    plans: Mapping[str, Any],
    fingerprint: Mapping[str, Any],
    configuration: str,
    *,
    preprocessed_root: Path,
    num_processes: int = 1,
    report: Callable[[int, int], None] | None = None,
) -> Path:
    """Make, complete or find ``<preprocessed_root>/<hash>/DatasetXXX_Name``, as nnU-Net would preprocess it.

    The hash is of nnU-Net's version, the plans, and names, sizes and times of the raw files: neither other plans nor
    changed images are ever served old data. Of an interrupted run, finished cases are kept. Another process that
    prepares the same folder is waited for.

    Args:
        raw_dataset_folder: ``DatasetXXX_Name``.
        plans: Content of the plans file.
        fingerprint: Content of ``dataset_fingerprint.json``, kept beside the data.
        configuration: The configuration to preprocess for.
        preprocessed_root: Folder for all preprocessed data of the site.
        num_processes: 1 works in this process, more in a pool of spawned ones.
        report: Called with (cases done, cases to do) after each case.

    Returns:
        ``<preprocessed_root>/<hash>``, to be used as ``nnUNet_preprocessed``.

    Raises:
        DatasetError: the data set is faulty, or nnU-Net cannot preprocess a case.
        WorkerError: a process of the pool died.
    """
    dataset, name = RawDataset.read(raw_dataset_folder), raw_dataset_folder.name
    folder = preprocessed_root / _hash(plans, raw_dataset_folder, dataset.cases.values())
    target, identifier = folder / name, plans["configurations"][configuration]["data_identifier"]
    complete = target / f"{identifier}.complete"  # not inside: nnU-Net infers the format from all files there
    lock = FolderLock(folder, patience=math.inf)
    try:
        # preprocessed_root lies in the site's own nnUNet_preprocessed, where a split of the hospital's may be
        for splits in (preprocessed_root.parent / name / _SPLITS, raw_dataset_folder / _SPLITS):
            if splits.is_file():
                _copy(splits, target / _SPLITS)
        if not complete.exists():
            _copy(raw_dataset_folder / "dataset.json", target / "dataset.json")
            write_json(target / "dataset_fingerprint.json", fingerprint)
            write_json(target / f"{plans['plans_name']}.json", plans)
            todo = {
                case: (case, files, target, plans, configuration, dataset.schema.file_ending)
                for case, files in dataset.cases.items()
                if not (target / identifier / f"{case}.pkl").exists()
            }
            results = each_case(_preprocess_case, todo, num_processes, report)
            if faults := [f"{case}: {fault}" for case, fault in results if fault]:
                raise DatasetError(
                    field="training cases",
                    expected="cases that nnU-Net can preprocess",
                    found=f"{len(faults)} of {len(dataset.cases)} at which it fails",
                    remedy="free disk space if it ran out, else correct or remove the cases named in the site's log",
                    local_detail="\n".join(faults),
                )
            shutil.rmtree(target / "partial", ignore_errors=True)
            complete.touch()
    finally:
        lock.release()
    return folder


def fold_cases(preprocessed_dataset_folder: Path, data_identifier: str, fold: int | str) -> tuple[list[str], list[str]]:
    """Training and validation cases of a fold, as ``nnUNetTrainer.do_split`` chooses them.

    ``splits_final.json`` decides; where it is missing, nnU-Net's 5-fold split is made and kept there. A fold beyond
    the file's is a random split 80:20, and ``all`` trains and validates on all cases.

    Raises:
        DatasetError: training or validation has no case, fewer than 5 cases are to be split, or the splits name
            cases that the data set does not have.
    """
    folder, file = preprocessed_dataset_folder / data_identifier, preprocessed_dataset_folder / _SPLITS
    cases = sorted(infer_dataset_class(str(folder)).get_identifiers(str(folder)))
    if fold == "all":
        return cases, cases
    if not file.is_file():
        if len(cases) < 5:
            raise _fold_error("at least 5 cases for a 5-fold split", f"{len(cases)} cases")
        splits = generate_crossval_split(cases, seed=12345, n_splits=5)
        write_atomically(file, lambda temporary: temporary.write_text(json.dumps(splits, indent=4)))
    splits = json.loads(file.read_text())
    if int(fold) < len(splits):
        train, val = splits[int(fold)]["train"], splits[int(fold)]["val"]
    else:
        chosen = np.random.RandomState(12345 + int(fold)).choice(len(cases), int(len(cases) * 0.8), replace=False)
        train = [cases[index] for index in chosen]
        val = [case for index, case in enumerate(cases) if index not in chosen]
    if not train or not val:
        raise _fold_error("training and validation cases", f"{len(train)} and {len(val)} cases in fold {fold}")
    if unknown := sorted({*train, *val} - {*cases}):
        raise _fold_error("cases of the data set", f"{len(unknown)} others in fold {fold}", "\n".join(unknown))
    return train, val


def _hash(plans: Mapping[str, Any], raw_dataset_folder: Path, cases: Iterable[Case]) -> str:
    files = [raw_dataset_folder / "dataset.json", *(file for case in cases for file in (*case.images, case.label))]
    raw = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    content = json.dumps([version("nnunetv2"), plans, raw], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def _preprocess_case(
    name: str, case: Case, target: Path, plans: Mapping[str, Any], configuration: str, file_ending: str
) -> str | None:
    """Preprocess one case aside, then move its files into place, the properties (.pkl) last: they mark it as done.

    Returns:
        What went wrong: None if nothing did.
    """
    manager = PlansManager(dict(plans))
    settings = manager.get_configuration(configuration)
    aside, final = target / "partial" / name, target / settings.data_identifier
    shutil.rmtree(aside, ignore_errors=True)
    for folder in (aside, final):
        folder.mkdir(parents=True, exist_ok=True)
    _copy(case.label, target / "gt_segmentations" / f"{name}{file_ending}")
    try:
        settings.preprocessor_class(verbose=False).run_case_save(
            str(aside / name),
            list(map(str, case.images)),
            str(case.label),
            manager,
            settings,
            str(target / "dataset.json"),
        )
    except Exception as error:  # nnU-Net raises what its libraries raise
        return f"{type(error).__name__}: {error}"
    for file in sorted(aside.iterdir(), key=lambda file: file.suffix == ".pkl"):
        file.replace(final / file.name)
    return None


def _copy(source: Path, target: Path) -> None:
    write_atomically(target, lambda temporary: shutil.copyfile(source, temporary))


def _fold_error(expected: str, found: str, local_detail: str = "") -> DatasetError:
    return DatasetError(
        field="fold",
        expected=expected,
        found=found,
        remedy="train on fold all, or put a splits_final.json that fits into the raw data set's folder",
        local_detail=local_detail,
    )
