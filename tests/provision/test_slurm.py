"""Kits prepared for Slurm run a job, with a stand-in for the scheduler."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import yaml
from local_federation import SERVER, LocalFederation, free_ports

from commands import run
from conftest import TINY_TRAINING
from nnunet_flare.nnunet.config import TrainingConfig
from nnunet_flare.nnunet.phantoms import write_demo_dataset
from nnunet_flare.provision.manifest import PolicyManifest
from nnunet_flare.recipe import FFERecipe

INPUTS = Path(__file__).parents[2] / "provisioning" / "deploy"
SITE = "hospital-a"


@pytest.fixture
def scheduler(tmp_path: Path):
    """The folder of the scheduler's commands; whatever job still runs at the end is ended."""
    folder = tmp_path / "scheduler"
    folder.mkdir()
    for command in ("sbatch", "squeue", "sacct", "scancel"):
        shutil.copy(Path(__file__).with_name("batch_scheduler.py"), folder / command)
        (folder / command).chmod(0o755)
    yield folder
    for file in (folder / "jobs").glob("*.json"):
        if not file.with_suffix(".exit").is_file():
            os.killpg(json.loads(file.read_text())["pid"], signal.SIGKILL)


def prepare(federation: LocalFederation, name: str, data: Path) -> None:
    """Prepare a participant's kit with our inputs, changed only in what belongs to this machine."""
    study = yaml.safe_load((INPUTS / "study_runtime" / "slurm.yaml").read_text())
    folders = {"NNUNET_FLARE_HOME": str(federation.home), "nnUNet_raw": str(data)}
    assert study["studies"]["default"]["env"].keys() == folders.keys()
    study["studies"]["default"]["env"] = folders
    (federation.kits[name] / "local" / "study_runtime.yaml").write_text(yaml.safe_dump(study))

    config = yaml.safe_load((INPUTS / "slurm.yaml").read_text())
    config["job_launcher"] |= {
        "python_path": sys.executable,
        "parent_host": "localhost",
        "internal_port": free_ports(1)[0],  # both participants are on this machine
        "poll_interval": 1,
    }
    file = federation.folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(config))
    output = federation.folder / name
    command = ("nvflare", "deploy", "prepare", federation.kits[name], "--config", file, "--output", output)
    run(*command, folder=federation.folder)
    federation.adopt(output)
    PolicyManifest.write(output)


@pytest.mark.slow
@pytest.mark.federation
def test_server_and_site_train_in_jobs_that_the_scheduler_starts(tmp_path: Path, scheduler: Path):
    write_demo_dataset(tmp_path / "raw", SITE, num_cases=5)
    FFERecipe(training=TrainingConfig(**TINY_TRAINING | {"num_rounds": 1})).export(str(tmp_path / "jobs"))
    shutil.rmtree(tmp_path / "jobs" / "ffe" / "app" / "custom")
    path = os.pathsep.join([str(scheduler), str(Path(sys.executable).parent), os.environ["PATH"]])
    with LocalFederation(tmp_path) as federation:
        federation.provision()
        for name in (SERVER, SITE):
            prepare(federation, name, tmp_path / "raw")
            federation.start(name, PATH=path, NNUNET_FLARE_HOME="")
        federation.wait_until_listening()
        record = federation.run_job(tmp_path / "jobs" / "ffe")
    assert record["status"] == "FINISHED:COMPLETED"

    submitted = [json.loads(file.read_text()) for file in (scheduler / "jobs").glob("*.json")]
    assert len(submitted) == 2
    for job in submitted:
        assert {"--partition=gpu", "--time=2-00:00:00", "--export=NIL"} <= set(job["arguments"])
        assert (scheduler / "jobs" / f"{job['id']}.exit").read_text().strip() == "0"
    assert (federation.home / "server" / "runs" / "ffe").is_dir()
    assert list((federation.home / SITE / "runs" / "ffe").rglob("checkpoint_final.pth"))
