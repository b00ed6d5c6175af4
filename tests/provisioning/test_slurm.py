"""Kits prepared for Slurm run a job, with a stand-in for the scheduler."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml
from nvflare.fuel.flare_api.flare_api import new_secure_session

from conftest import TINY_TRAINING
from nnunet_flare.nnunet.config import TrainingConfig
from nnunet_flare.nnunet.phantoms import write_demo_dataset
from nnunet_flare.recipe import FFERecipe
from startup_kits import ADMIN, SERVER, SITE, free_port, nvflare, provision, running

INPUTS = Path(__file__).parents[2] / "provisioning" / "deploy"
ALLOWED = ["nnunet_flare.", "nvflare.app_opt.tracking.tb.tb_receiver.TBAnalyticsReceiver"]


@pytest.mark.slow
@pytest.mark.federation
def test_server_and_site_train_in_jobs_that_the_scheduler_starts(tmp_path: Path, home: Path):
    kits = provision(tmp_path, port=free_port())
    scheduler = tmp_path / "scheduler"
    scheduler.mkdir()
    for command in ("sbatch", "squeue", "sacct", "scancel"):
        shutil.copy(Path(__file__).with_name("batch_scheduler.py"), scheduler / command)
        (scheduler / command).chmod(0o755)
    write_demo_dataset(tmp_path / "raw", SITE, num_cases=5)

    for name in (SERVER, SITE):
        local = kits / name / "local"
        resources = json.loads((local / "resources.json.default").read_text())
        resources |= {"class_allow_list": ALLOWED, "allow_log_streaming": False}
        (local / "resources.json.default").write_text(json.dumps(resources))
        study = yaml.safe_load((INPUTS / "study_runtime" / "slurm.yaml").read_text())
        folders = {"NNUNET_FLARE_HOME": str(home / name), "nnUNet_raw": str(tmp_path / "raw")}
        assert study["studies"]["default"]["env"].keys() == folders.keys()
        study["studies"]["default"]["env"] = folders
        (local / "study_runtime.yaml").write_text(yaml.safe_dump(study))
        settings = yaml.safe_load((INPUTS / "slurm.yaml").read_text())
        here = {"python_path": sys.executable, "parent_host": "localhost"}  # both on one machine: a port each, too
        settings["job_launcher"] |= here | {"internal_port": free_port(), "poll_interval": 1}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(settings))
        nvflare(tmp_path, "deploy", "prepare", kits / name, "--config", f"{name}.yaml", "--output", name)

    training = TrainingConfig(**TINY_TRAINING | {"num_rounds": 1})
    FFERecipe(training=training).export(str(tmp_path / "jobs"))
    shutil.rmtree(tmp_path / "jobs" / "ffe" / "app" / "custom")
    path = f"{scheduler}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {"PATH": path, "HOME": str(tmp_path)}
    with ExitStack() as processes:
        processes.callback(end_jobs, scheduler / "jobs")
        for name in (SERVER, SITE):
            processes.enter_context(running(tmp_path / name / "startup" / "start_slurm.sh", environment))
        session = connect(kits / ADMIN)
        processes.callback(session.close)
        await_(lambda: session.get_system_info().client_info)
        job = session.submit_job(str(tmp_path / "jobs" / "ffe"))
        await_(lambda: session.get_job_meta(job)["status"].startswith("FINISHED"))
        status = session.get_job_meta(job)["status"]

    submitted = [json.loads(file.read_text()) for file in (scheduler / "jobs").glob("*.json")]
    ends = [(scheduler / "jobs" / f"{item['id']}.exit").read_text().strip() for item in submitted]
    assert status == "FINISHED:COMPLETED"
    assert ends == ["0", "0"]
    for item in submitted:
        assert {"--partition=gpu", "--time=2-00:00:00", "--export=NIL"} <= set(item["arguments"])
    assert (home / SERVER / "server" / "runs" / "ffe").is_dir()
    assert list((home / SITE / SITE / "runs" / "ffe").rglob("checkpoint_final.pth"))


def end_jobs(folder: Path) -> None:
    for file in folder.glob("*.json"):
        if not file.with_suffix(".exit").is_file():
            os.killpg(json.loads(file.read_text())["pid"], signal.SIGKILL)


def connect(kit: Path):
    for _ in range(20):
        try:
            return new_secure_session(ADMIN, str(kit), timeout=10)
        except Exception:
            time.sleep(1)
    raise AssertionError("the server never answered")


def await_(condition, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(1)
