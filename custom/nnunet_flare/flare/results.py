"""What a job leaves for its submitter in its run directory, from where FLARE's own download brings it."""

from __future__ import annotations

import shutil
import traceback
from pathlib import Path

from nnunet_flare.errors import NNUNetFlareError, StateError
from nnunet_flare.flare.coverage import COVERAGE_FILE, COVERAGE_PICTURE
from nnunet_flare.flare.curves import CURVES_FILE
from nnunet_flare.flare.history import CSV_FILE, JSON_FILE
from nnunet_flare.flare.run import RunFolder
from nnunet_flare.storage import write_json

__all__ = ["LAYERS_FILE", "OUTCOME_FILE", "PROGRESS", "RESULTS_FOLDER", "leave_results", "reason_of"]

PROGRESS = "nnunet_flare"
"""Name of this package's part in FLARE's statistics of a running job."""
RESULTS_FOLDER = "nnunet_flare"
OUTCOME_FILE = "outcome.json"
LAYERS_FILE = "layers.npz"
_FILES = (JSON_FILE, CSV_FILE, CURVES_FILE, COVERAGE_FILE, COVERAGE_PICTURE, "plans.json", "dataset_fingerprint.json")
_FOLDERS = ("tensorboard",)
_MODEL_FILES = "model/*.json"


def leave_results(
    run: RunFolder | None, job_folder: Path, error: NNUNetFlareError | None = None, *, with_weights: bool = False
) -> None:
    """Say how the job ended, and copy the run's results in place of what was left before.

    Weights travel as NumPy arrays: a checkpoint of torch could run code at whoever loads it.

    Args:
        run: The run's folder, held by the caller; None if it could not be opened.
        job_folder: FLARE's run directory of the job.
        error: What ended the job, or None.
        with_weights: The model too, of a run that is at its end.

    Raises:
        OSError: they cannot be written.
    """
    results = job_folder / RESULTS_FOLDER
    shutil.rmtree(results, ignore_errors=True)
    write_json(results / OUTCOME_FILE, {"error": error.to_reply() if error else None})
    if run is not None and run.path.is_dir():
        for folder in (run.path, *run.path.glob("fold_*")):
            place = results / folder.relative_to(run.path)
            found = [folder / name for name in _FILES if (folder / name).is_file()]
            for file in (*found, *(folder.glob(_MODEL_FILES) if with_weights else ())):
                copy = place / file.relative_to(folder)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)
            for name in _FOLDERS:
                if (folder / name).is_dir():
                    shutil.copytree(folder / name, place / name)
        if with_weights:
            for file in run.newest_globals():
                shutil.copyfile(file, results / file.parent.parent.relative_to(run.path) / LAYERS_FILE)


def reason_of(error: Exception) -> NNUNetFlareError:
    """What the submitter is told of what ended the job at the server: a disk can be mended, a defect cannot."""
    if isinstance(error, NNUNetFlareError):
        return error
    if isinstance(error, OSError):
        return StateError(
            field="files of the run",
            expected="files that can be read and written",
            found=error.strerror or type(error).__name__,
            remedy="free disk space, then submit again",
            site="server",
        )
    return NNUNetFlareError(
        field="job",
        expected="a run to its end",
        found=f"{type(error).__name__}, a defect of this program",
        remedy="see the server's log",
        site="server",
        local_detail="".join(traceback.format_exception(error)),
    )
