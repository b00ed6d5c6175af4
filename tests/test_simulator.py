"""The main job as a newcomer runs it, and what nnU-Net's own commands make of its results."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from conftest import TINY_TRAINING
from nnunet_flare.flare.history import RunHistory
from nnunet_flare.storage import read_json

pytestmark = pytest.mark.federation

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Finished:
    """A finished simulator run: where it ran, and what it left."""

    folder: Path
    output: str

    @property
    def home(self) -> Path:
        return self.folder / "nnunet_flare"

    @property
    def server(self) -> Path:
        return self.home / "server" / "runs" / "ffe"

    def environment(self) -> dict[str, str]:
        return _environment(self.folder)


def _environment(home: Path) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("NNUNET_FLARE", "nnUNet"))}
    return inherited | {"HOME": str(home), "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}


@pytest.fixture(scope="session")
def literal_run(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """``nvflare simulator jobs/ffe``, no flags: two clients, one thread, a new process for each task."""
    folder = tmp_path_factory.mktemp("literal")
    shutil.copytree(ROOT / "jobs", folder / "jobs")
    result = subprocess.run(
        ["nvflare", "simulator", "jobs/ffe"],
        cwd=folder,
        env=_environment(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=850,
    )
    assert result.returncode == 0, result.stdout[-5000:]
    return Finished(folder, result.stdout)


def test_the_demo_learns(literal_run: Finished):
    history = RunHistory.load(literal_run.server)
    assert history.phase == "done"
    assert set(history.final) == {"site-1", "site-2"}
    assert np.mean([result.foreground.dsc for result in history.final.values()]) > 0.8
    first, last = history.rounds[0].mean_dice, history.rounds[-1].mean_dice
    assert last > first + 0.3


def test_progress_is_told_round_by_round(literal_run: Finished):
    for number in range(1, 9):
        assert f"round {number} of 8  dice" in literal_run.output


def test_tensorboard_files_hold_every_round(literal_run: Finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = next((literal_run.server / "tensorboard").rglob("events.*"))
    accumulator = EventAccumulator(str(events.parent))
    accumulator.Reload()
    assert [event.step for event in accumulator.Scalars("dice/site-1")] == list(range(1, 9))


def _dice_by_plain_nnunet(
    run: Finished, model: Path, site: str, out: Path, dataset: str = "Dataset900_Demo"
) -> list[float]:
    """Predict a site's validation cases with nnU-Net's command; Dice of each case and label by nnU-Net's own code."""
    from nnunetv2.evaluation.evaluate_predictions import compute_metrics
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    raw = run.home / site / "nnUNet_raw" / dataset
    splits = next((run.home / site / "nnUNet_preprocessed").glob(f"federated/*/{dataset}/splits_final.json"))
    cases = json.loads(splits.read_text())[0]["val"]
    images = out / "images"
    images.mkdir(parents=True)
    for case in cases:
        shutil.copy(raw / "imagesTr" / f"{case}_0000.nii.gz", images)
    command = ["nnUNetv2_predict_from_modelfolder", "-i", images, "-o", out / "predictions", "-m", model]
    command += ["-f", "0", "-device", "cpu", "-npp", "1", "-nps", "1"]
    subprocess.run(command, env=run.environment(), check=True, stdout=subprocess.DEVNULL)
    dice = []
    for case in cases:
        files = raw / "labelsTr" / f"{case}.nii.gz", out / "predictions" / f"{case}.nii.gz"
        metrics = compute_metrics(*map(str, files), SimpleITKIO(), [1, 2, 3])["metrics"]
        dice += [metrics[label]["Dice"] for label in (1, 2, 3)]
    return dice


@pytest.mark.parametrize("whose", ["server", "site-2"])
def test_nnunets_own_prediction_reproduces_the_reported_dice(literal_run: Finished, whose: str, tmp_path: Path):
    model = literal_run.server / "model"
    if whose != "server":
        results = literal_run.home / whose / "runs" / "ffe" / "nnUNet_results"
        model = results / "Dataset900_Demo" / "nnUNetTrainer__nnUNetPlans__2d"
    reported = RunHistory.load(literal_run.server).final["site-2"].cases
    expected = [case[label].dsc for case in reported for label in ("RV", "MYO", "LV")]
    assert sorted(_dice_by_plain_nnunet(literal_run, model, "site-2", tmp_path)) == pytest.approx(
        sorted(expected), abs=1e-6
    )


def test_plain_nnunet_validates_the_sites_model_to_the_same_score(literal_run: Finished, tmp_path: Path):
    run = tmp_path / "ffe"
    shutil.copytree(literal_run.home / "site-1" / "runs" / "ffe", run)
    variables = dict(
        line.removeprefix("export ").split("=", 1) for line in (run / "nnunet.env").read_text().splitlines()
    )
    environment = literal_run.environment() | variables | {"nnUNet_results": str(run / "nnUNet_results")}
    environment |= {"nnUNet_def_n_proc": "1", "nnUNet_n_proc_DA": "1"}
    summary = next(run.rglob("validation/summary.json"))
    ours = json.loads(summary.read_text())["foreground_mean"]["Dice"]
    summary.unlink()
    command = ["nnUNetv2_train", "Dataset900_Demo", "2d", "0", "-device", "cpu", "--val"]
    subprocess.run(command, env=environment, check=True, cwd=tmp_path, timeout=300)
    assert json.loads(summary.read_text())["foreground_mean"]["Dice"] == pytest.approx(ours, abs=1e-6)

    # --c goes on from where the federation ended: epoch 8 of the trainer's own thousand
    resume = (
        "import torch; from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint\n"
        "cpu = torch.device('cpu')\n"
        "trainer = get_trainer_from_args('Dataset900_Demo', '2d', 0, continue_training=True, device=cpu)\n"
        "maybe_load_checkpoint(trainer, True, False)\n"
        "print('epoch', trainer.current_epoch, len(trainer.optimizer.state_dict()['state']))\n"
    )
    result = subprocess.run([sys.executable, "-c", resume], env=environment, capture_output=True, text=True, check=True)
    assert re.search(r"epoch 8 [1-9]\d+", result.stdout)


@pytest.mark.slow
def test_the_recipe_runs_in_flares_simenv(home: Path, tmp_path: Path):
    script = (
        "from nvflare.recipe import SimEnv\n"
        "from nnunet_flare.nnunet.config import TrainingConfig\n"
        "from nnunet_flare.recipe import FFERecipe\n"
        f"training = TrainingConfig(**{TINY_TRAINING | {'dataset': 'demo_2d', 'num_rounds': 1}})\n"
        f"env = SimEnv(num_clients=2, workspace_root={str(tmp_path / 'ws')!r})\n"
        "FFERecipe(name='simenv', training=training).execute(env)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], env=os.environ, capture_output=True, text=True, cwd=tmp_path
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert RunHistory.load(home / "server" / "runs" / "simenv").phase == "done"


@pytest.mark.slow
def test_hospitals_with_unlike_networks_train_together_and_each_predicts(tmp_path: Path):
    shutil.copytree(ROOT / "jobs", tmp_path / "jobs")
    result = subprocess.run(
        ["nvflare", "simulator", "jobs/asym_fedavg", "-n", "3", "-t", "3"],
        cwd=tmp_path,
        env=_environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=850,
    )
    assert result.returncode == 0, result.stdout[-5000:]
    home = tmp_path / "nnunet_flare"
    server = home / "server" / "runs" / "asym_fedavg"
    history = RunHistory.load(server)
    assert history.phase == "done"
    assert np.mean([final.foreground.dsc for final in history.final.values()]) > 0.75
    plans = {site: read_json(home / site / "runs" / "asym_fedavg" / "plans.json") for site in history.final}
    chosen = {site: plan["configurations"]["3d_fullres"] for site, plan in plans.items()}
    for part in ("n_stages", "kernel_sizes"):
        assert len({str(plan["architecture"]["arch_kwargs"][part]) for plan in chosen.values()}) > 1
    assert len({str(plan["patch_size"]) for plan in chosen.values()}) == 3
    coverage = read_json(server / "coverage.json")
    assert all(0 < site["shared"] <= 1 for site in coverage.values())
    assert (server / "coverage.png").stat().st_size > 1000
    for site, final in history.final.items():
        model = home / site / "runs" / "asym_fedavg" / "nnUNet_results" / "Dataset902_DemoMixed"
        model /= "nnUNetTrainer__nnUNetPlans__3d_fullres"
        run = Finished(tmp_path, result.stdout)
        dice = _dice_by_plain_nnunet(run, model, site, tmp_path / site, dataset="Dataset902_DemoMixed")
        expected = [case[label].dsc for case in final.cases for label in ("RV", "MYO", "LV")]
        assert sorted(dice) == pytest.approx(sorted(expected), abs=1e-6)
