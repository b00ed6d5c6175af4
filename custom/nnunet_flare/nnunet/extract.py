"""Fingerprint extraction at one site: nnU-Net's own analysis of every training case, on checked arrays.

nnU-Net draws 1e8 // n foreground voxels from each of its n cases. Sites of a federation all draw the same number, that
of the pooled data set, so that their summaries add up to what nnU-Net would extract there.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunet_flare.errors import ConfigError, DatasetError, WorkerError
from nnunet_flare.fingerprint.summary import CaseValues, FingerprintSummary, merge_summaries
from nnunet_flare.nnunet.dataset import Case, RawDataset
from nnunet_flare.nnunet.nifti import check_complete
from nnunet_flare.nnunet.schema import dataset_json

__all__ = ["each_case", "extract_cases", "extract_summary"]

Result = TypeVar("Result")

_READ, _CHANNELS, _VOXELS, _LABEL_VOXELS, _LABELS, _SHAPE, _SPACING = _FAULTS = (
    ("image and label files", "whole files that nnU-Net's reader opens, one grid for all channels", "unreadable files"),
    ("image channels", "the channels of dataset.json", "other channels"),
    ("image voxels", "finite numbers", "NaN or infinite voxels"),
    ("label voxels", "numbers", "NaN voxels in the label"),
    ("label values", "the labels of dataset.json", "other label values"),
    ("label shape", "the shape of the image", "another shape"),
    ("label spacing", "the spacing of the image", "another spacing"),
)


def extract_summary(
    raw_dataset_folder: Path,
    *,
    num_foreground_voxels: int,
    num_cases_total: int,
    num_processes: int = 1,
    report: Callable[[int, int], None] | None = None,
) -> FingerprintSummary:
    """Summarise the training cases of a raw data set; each case is read once and checked as it is read.

    Args:
        raw_dataset_folder: nnU-Net's ``DatasetXXX_Name`` with dataset.json, imagesTr and labelsTr.
        num_foreground_voxels: Foreground voxels to draw from the whole federation; nnU-Net's own number is 1e8.
        num_cases_total: Training cases of the whole federation.
        num_processes: 1 works in this process, more in a pool of spawned ones.
        report: Called with (cases done, cases) after each case.

    Raises:
        ConfigError: fewer voxels than cases are asked for.
        DatasetError: cases are missing or faulty; their names are in ``local_detail`` only.
        WorkerError: a process of the pool died.
    """
    cases = extract_cases(
        raw_dataset_folder,
        num_draws=num_foreground_voxels // num_cases_total,
        num_processes=num_processes,
        report=report,
    )
    return merge_summaries(summary for _, summary in cases)


def extract_cases(
    raw_dataset_folder: Path,
    *,
    num_draws: int,
    num_processes: int = 1,
    report: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[str, FingerprintSummary]]:
    """The name and summary of each training case, in any order; errors as of ``extract_summary``, after the last."""
    if num_draws < 1:
        raise ConfigError(
            field="num_foreground_voxels",
            expected="at least one voxel per case of the federation",
            found="fewer voxels than cases",
            remedy="raise num_foreground_voxels",
        )
    dataset = RawDataset.read(raw_dataset_folder)
    description = dataset_json(dataset.schema, dataset.schema.num_training)
    reader = _reader(description, next(iter(dataset.cases.values())).images[0])
    work = {name: (case, reader, description, num_draws) for name, case in dataset.cases.items()}
    faults: dict[tuple[str, str, str], list[str]] = {}
    for case, result in each_case(_analyze, work, num_processes, report):
        if isinstance(result, _Fault):
            faults.setdefault(result.kind, []).append(f"{case}: {result.detail}")
        else:
            yield case, result
    if faults:
        kinds = sorted(faults, key=_FAULTS.index)
        raise DatasetError(
            field="; ".join(field for field, _, _ in kinds),
            expected="; ".join(expected for _, expected, _ in kinds),
            found="; ".join(f"{len(faults[kind])} of {len(work)} cases with {kind[2]}" for kind in kinds),
            remedy="correct or remove the cases named in the site's log",
            local_detail="\n".join(line for kind in kinds for line in [f"{kind[2]}:", *faults[kind]]),
        )


def each_case(
    work: Callable[..., Result],
    arguments: Mapping[str, tuple[Any, ...]],
    num_processes: int,
    report: Callable[[int, int], None] | None,
) -> Iterator[tuple[str, Result]]:
    """Yield (case, ``work(*arguments[case])``) for each case, in any order.

    Raises:
        WorkerError: a process of the pool died.
    """

    def results() -> Iterator[tuple[str, Result]]:
        if num_processes == 1:
            yield from ((case, work(*case_arguments)) for case, case_arguments in arguments.items())
            return
        with ProcessPoolExecutor(num_processes, mp_context=get_context("spawn")) as pool:
            futures = {pool.submit(work, *case_arguments): case for case, case_arguments in arguments.items()}
            for future in as_completed(futures):
                yield futures.pop(future), future.result()

    try:
        for done, result in enumerate(results(), start=1):
            if report:
                report(done, len(arguments))
            yield result
    except BrokenProcessPool as error:
        raise WorkerError(
            field="num_processes",
            expected=f"{num_processes} processes that live until all cases are done",
            found="one that died, mostly for want of memory",
            remedy="lower num_processes in the site's settings",
        ) from error


@dataclass(frozen=True)
class _Fault:
    kind: tuple[str, str, str]
    detail: str


class _FaultyCaseError(Exception):
    """Leaves nnU-Net's analysis with a fault of the case."""


@dataclass
class _CheckedReader:
    """Stands in for nnU-Net's reader class and its instance; judges a case's arrays on their way to the analysis."""

    reader: type[BaseReaderWriter]
    description: Mapping[str, Any]

    def __call__(self) -> _CheckedReader:
        return self

    def read_images(self, files: list[str]) -> tuple[np.ndarray, dict[str, Any]]:
        num_channels = len(self.description["channel_names"])
        images, properties = self._read("read_images", files)
        if len(images) != num_channels:
            raise _FaultyCaseError(_CHANNELS, f"expected {num_channels}, found {len(images)}")
        if not np.isfinite(images).all():
            raise _FaultyCaseError(_VOXELS, f"{np.count_nonzero(~np.isfinite(images))} voxels")
        self.shape, self.spacing = images.shape[1:], properties["spacing"]
        return images, properties

    def read_seg(self, file: str) -> tuple[np.ndarray, dict[str, Any]]:
        label, properties = self._read("read_seg", file)
        if label.shape[1:] != self.shape:
            raise _FaultyCaseError(_SHAPE, f"expected {self.shape}, found {label.shape[1:]}")
        if not np.allclose(properties["spacing"], self.spacing):
            raise _FaultyCaseError(_SPACING, f"expected {self.spacing}, found {properties['spacing']}")
        if np.isnan(label).any():
            raise _FaultyCaseError(_LABEL_VOXELS, f"{np.count_nonzero(np.isnan(label))} voxels")
        manager = LabelManager(self.description["labels"], self.description.get("regions_class_order"))
        known = np.isin(label, [*manager.all_labels, *([manager.ignore_label] if manager.has_ignore_label else [])])
        if not known.all():
            raise _FaultyCaseError(_LABELS, str(np.unique(label[~known])[:10].tolist()))
        return label, properties

    def _read(self, method: str, files: list[str] | str) -> tuple[np.ndarray, dict[str, Any]]:
        try:
            for file in [files] if isinstance(files, str) else files:
                check_complete(Path(file))
            return getattr(self.reader(), method)(files)
        except Exception as error:  # whatever the format's library raises for a damaged file
            raise _FaultyCaseError(_READ, f"{type(error).__name__}: {error}") from error


def _analyze(
    case: Case, reader: type[BaseReaderWriter], description: Mapping[str, Any], num_draws: int
) -> FingerprintSummary | _Fault:
    try:
        shape, spacing_mm, intensities, _, relative_size = DatasetFingerprintExtractor.analyze_case(
            [str(image) for image in case.images],
            str(case.label),
            _CheckedReader(reader, description),
            num_samples=num_draws,
        )
    except _FaultyCaseError as fault:
        return _Fault(*fault.args)
    return FingerprintSummary.from_cases(
        [CaseValues(shape=shape, spacing_mm=spacing_mm, relative_size=relative_size, intensities=intensities)]
    )


def _reader(description: dict[str, Any], example: Path) -> type[BaseReaderWriter]:
    """nnU-Net's choice of a reader by an example file; by the file ending alone where that file is damaged."""
    with contextlib.redirect_stderr(io.StringIO()):  # nnU-Net prints a traceback for each reader that it tries
        try:
            return determine_reader_writer_from_dataset_json(description, str(example), verbose=False)
        except RuntimeError:
            return determine_reader_writer_from_dataset_json(description, verbose=False)
