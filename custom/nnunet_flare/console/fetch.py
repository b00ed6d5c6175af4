"""The results of a finished run, brought here; the global model is built here, from its weights as NumPy arrays."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from nnunet_flare.console.outcome import results_in
from nnunet_flare.console.session import AdminSession
from nnunet_flare.console.submission import read_controller
from nnunet_flare.errors import ConfigError, StateError
from nnunet_flare.flare.controller import TENSORBOARD_FOLDER, FederatedTraining
from nnunet_flare.flare.results import LAYERS_FILE
from nnunet_flare.nnunet.config import TrainingConfig
from nnunet_flare.nnunet.network_plan import check_classes
from nnunet_flare.nnunet.process import NNUNetProcess
from nnunet_flare.storage import read_json

__all__ = ["MODEL_FOLDER", "fetch_results"]

MODEL_FOLDER = "model"


def fetch_results(session: AdminSession, run: str, out: Path) -> FederatedTraining:
    """Bring the results of the newest finished job of a run into ``out``, a folder to make.

    Where the server knows the whole network, ``out/model`` is then a folder that nnU-Net predicts from.

    Returns:
        The job's controller, with its settings.

    Raises:
        ConfigError: ``out`` exists.
        StateError: no job of the run has finished, or its results are missing.
        RefusedError: the person may not download it.
    """
    if out.exists():
        raise ConfigError(field="--out", expected="a folder to make", found=str(out), remedy="name another one")
    finished = [job for job in session.jobs(run) if job.is_complete]
    if not finished:
        raise StateError(
            field=f"run {run}",
            expected="a finished job",
            found="none",
            remedy="wait for the run to end; nnunet-flare status shows how far it is",
        )
    download = session.download(finished[0].id)
    controller = read_controller(download / "job" / run)
    draft = out.with_name(f".{out.name}.partial")
    shutil.rmtree(draft, ignore_errors=True)
    shutil.copytree(results_in(download), draft)
    if (events := download / "workspace" / TENSORBOARD_FOLDER).is_dir():
        shutil.copytree(events, draft / "tensorboard", dirs_exist_ok=True)
    if (draft / MODEL_FOLDER).is_dir():
        _build_model(draft, TrainingConfig.from_json(controller.training or {}))
    draft.rename(out)
    shutil.rmtree(download)
    return controller


def _build_model(results: Path, training: TrainingConfig) -> None:
    """Write one checkpoint for each fold, from the weights in its folder."""
    files = {name: read_json(results / MODEL_FOLDER / f"{name}.json") for name in ("plans", "dataset")}
    fingerprint = read_json(results / MODEL_FOLDER / "dataset_fingerprint.json")
    check_classes(files["plans"], training.configuration)
    process = NNUNetProcess(log_file=results / "nnunet.log", num_threads=1)
    try:
        for fold in training.folds:
            place = results / f"fold_{fold}" if len(training.folds) > 1 else results
            with np.load(place / LAYERS_FILE, allow_pickle=False) as stored:
                layers = {name: stored[name] for name in stored.files}
            arguments = {
                "job": training.of_fold(fold).to_json(),
                "plans": files["plans"],
                "dataset_json": files["dataset"],
                "fingerprint": fingerprint,
                "folder": str(results / MODEL_FOLDER),
            }
            process.call("export_model", arguments, layers)
    finally:
        process.close()
