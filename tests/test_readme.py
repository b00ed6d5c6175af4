"""The README's commands, in its order, on small data."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import TINY_TRAINING
from nnunet_flare.nnunet.phantoms import write_demo_dataset

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
LITERAL = "nvflare simulator jobs/ffe"
"""Runs in test_simulator.py, in full length."""


@pytest.mark.federation
def test_every_command_but_make_runs_as_it_stands(tmp_path: Path):
    commands = [command for command in COMMANDS if not command.startswith("make ") and command != LITERAL]
    assert len(commands) >= 8
    assert LITERAL in COMMANDS
    tiny = [f"{name}={json.dumps(value)}" for name, value in TINY_TRAINING.items()]
    tiny = [item for item in tiny if not item.startswith(("dataset", "configuration", "num_rounds"))]
    smaller = " ".join(f"--set '{item}'" for item in [*tiny, "num_rounds=1"])
    commands = [f"{command} {smaller}" if " job " in command else command for command in commands]

    shutil.copytree(ROOT / "jobs", tmp_path / "jobs")
    for server in (tmp_path / "jobs").glob("*/app/config/config_fed_server.json"):
        job = json.loads(server.read_text())
        job["workflows"][0]["args"]["training"] |= {"num_rounds": 1, "iterations_per_epoch": 1}
        server.write_text(json.dumps(job))
    acdc = tmp_path / "raw" / "Dataset027_ACDC"
    acdc.parent.mkdir()
    write_demo_dataset(tmp_path, "site-1", num_cases=24).rename(acdc)
    (tmp_path / "new_cases").mkdir()
    shutil.copy(next((acdc / "imagesTr").iterdir()), tmp_path / "new_cases" / "patient_0000.nii.gz")

    script = "set -ex\n" + "\n".join(commands)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("NNUNET_FLARE", "nnUNet"))}
    environment = inherited | {
        "HOME": str(tmp_path),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "nnUNet_raw": str(acdc.parent),
    }
    result = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-5000:]
    assert (tmp_path / "predictions" / "patient.nii.gz").exists()


@pytest.mark.slow
@pytest.mark.federation
def test_make_demo_ends_with_the_table_and_a_good_dice(tmp_path: Path):
    assert "make demo" in COMMANDS
    command = ["make", "demo", f"DEMO={os.path.relpath(tmp_path / 'demo', ROOT)}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    mean = next(line for line in result.stdout.splitlines() if line.startswith("mean of sites"))
    assert float(mean.split()[6]) > 0.85
