"""What a job leaves for its submitter in its run directory, from where FLARE's own download brings it."""

from __future__ import annotations

import shutil
from pathlib import Path

from nnunet_flare.errors import NNUNetFlareError
from nnunet_flare.flare.coverage import COVERAGE_FILE, COVERAGE_PICTURE
from nnunet_flare.flare.curves import CURVES_FILE
from nnunet_flare.flare.history import CSV_FILE, JSON_FILE
from nnunet_flare.flare.run import RunFolder
from nnunet_flare.storage import write_json

__all__ = ["LAYERS_FILE", "OUTCOME_FILE", "PROGRESS", "RESULTS_FOLDER", "leave_results"]

PROGRESS = "nnunet_flare"
"""Name of this package's part in FLARE's statistics of a running job."""
RESULTS_FOLDER = "nnunet_flare"
OUTCOME_FILE = "outcome.json"
LAYERS_FILE = "layers.npz"
_FILES = (JSON_FILE, CSV_FILE, CURVES_FILE, COVERAGE_FILE, COVERAGE_PICTURE, "plans.json", "dataset_fingerprint.json")
_FOLDERS = ("tensorboard",)
_MODEL_FILES = "model/*.json"


def leave_results(run: RunFolder | None, job_folder: Path, error: NNUNetFlareError | None) -> None:
    """Copy a run's results, and say how the job ended.

    Weights travel only when the run has finished, and as NumPy arrays: a checkpoint of torch could run code at whoever
    loads it.

    Args:
        run: The run's folder, held by the caller; None if it could not be opened.
        job_folder: FLARE's run directory of the job.
        error: What ended the job, or None.
    """
    results = job_folder / RESULTS_FOLDER
    if run is not None and run.path.is_dir():
        for folder in (run.path, *run.path.glob("fold_*")):
            place = results / folder.relative_to(run.path)
            found = [folder / name for name in _FILES if (folder / name).is_file()]
            for file in (*found, *folder.glob(_MODEL_FILES)):
                copy = place / file.relative_to(folder)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)
            for name in _FOLDERS:
                if (folder / name).is_dir():
                    shutil.copytree(folder / name, place / name)
        if run.is_finished():
            for file in run.newest_globals():
                shutil.copyfile(file, results / file.parent.parent.relative_to(run.path) / LAYERS_FILE)
    write_json(results / OUTCOME_FILE, {"error": error.to_reply() if error else None})
