"""The production path: provisioned processes, jobs submitted by the lead, results fetched; ``make poc`` around it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from commands import run
from conftest import TINY_TRAINING
from nnunet_flare.flare.history import RunHistory
from nnunet_flare.nnunet.config import TrainingConfig
from nnunet_flare.recipe import AsymFedAvgRecipe, FFERecipe

if TYPE_CHECKING:
    from local_federation import LocalFederation

ROOT = Path(__file__).parent.parent
POC = ROOT / "poc" / "run.py"
TINY = {name: value for name, value in TINY_TRAINING.items() if name != "dataset"} | {"num_rounds": 2}


@pytest.mark.federation
def test_both_jobs_are_submitted_followed_and_fetched(federation: LocalFederation, tmp_path: Path):
    FFERecipe(name="one_network", training=TrainingConfig(**TINY)).export(str(tmp_path))
    AsymFedAvgRecipe(name="own_networks", training=TrainingConfig(**TINY, dataset="demo_mixed")).export(str(tmp_path))
    kit = federation.user("lead")
    for name in ("one_network", "own_networks"):
        said = run("nnunet-flare", "submit", name, "--kit", kit, "--follow", "--retry", "2", folder=tmp_path)
        assert "round 2 of 2" in said
        assert said.count("submitted") == 1
        run("nnunet-flare", "fetch", name, "--kit", kit, "--out", f"results_{name}", folder=tmp_path)
        history = RunHistory.load(tmp_path / f"results_{name}")
        assert history.phase == "done"
        assert [set(record.sites) for record in history.rounds] == [set(federation.sites)] * 2
    ours, theirs = tmp_path / "results_one_network", federation.home / "server" / "runs" / "one_network"
    assert (ours / "model" / "fold_0" / "checkpoint_final.pth").is_file()
    assert not list((tmp_path / "results_own_networks").rglob("*.pth"))
    assert (ours / "metrics.csv").read_text() == (theirs / "metrics.csv").read_text()
    sent = [file for file in (kit / "transfer").rglob("*") if file.suffix in (".pth", ".pt", ".pkl")]
    assert sent == []


@pytest.mark.slow
@pytest.mark.federation
def test_a_server_lost_after_the_run_and_before_its_jobs_end_trains_nothing_again(
    federation: LocalFederation, tmp_path: Path
):
    from local_federation import SERVER

    FFERecipe(name="nearly", training=TrainingConfig(**TINY)).export(str(tmp_path))
    runs, program = federation.home / "server" / "runs", Path(sys.executable).with_name("nnunet-flare")
    command = [program, "submit", "nearly", "--kit", federation.user("lead"), "--follow", "--retry", "2"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as submission:
        while not (manifest := read_manifest(runs / "nearly")).get("finished"):
            assert submission.poll() is None
            time.sleep(0.01)
        federation.stop(SERVER)
        federation.start(SERVER)
        said = submission.communicate(timeout=300)[0]
    assert submission.returncode == 0
    assert said.count("submitted nearly as job") == 2
    assert said.count("round 1 of 2") == 1
    assert read_manifest(runs / "nearly") == manifest
    assert not list(runs.glob("archive/nearly-*"))


def read_manifest(run: Path) -> dict[str, Any]:
    """Of a run of the server; empty before it begins."""
    return json.loads((run / "run.json").read_text()) if (run / "run.json").exists() else {}


def processes_in(folder: Path) -> list[psutil.Process]:
    """Processes that work in a folder, or were started with a path in it."""
    found = []
    for process in psutil.process_iter(["cwd", "cmdline"]):
        words = [process.info["cwd"] or "", *(process.info["cmdline"] or [])]
        if process.pid != os.getpid() and any(str(folder) in word for word in words):
            found.append(process)
    return found


@pytest.mark.federation
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_proof_of_concept_leaves_no_process_behind(number: signal.Signals, tmp_path: Path):
    folder = tmp_path / "work"
    process = subprocess.Popen(
        [sys.executable, POC, "--folder", folder], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        assert any("submitted ffe" in line for line in process.stdout)
        assert len(processes_in(folder)) > 5
    finally:
        process.send_signal(number)
    assert process.wait(timeout=60) not in (0, None)
    give_up = time.monotonic() + 30
    while (left := processes_in(folder)) and time.monotonic() < give_up:
        time.sleep(0.2)
    assert left == []


@pytest.mark.slow
@pytest.mark.federation
def test_make_poc_ends_with_fetched_results_and_no_process(tmp_path: Path):
    run_of_make = subprocess.run(["make", "poc"], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert run_of_make.returncode == 0, run_of_make.stdout[-3000:] + run_of_make.stderr[-3000:]
    results = ROOT / "poc" / "federation" / "results"
    assert RunHistory.load(results).phase == "done"
    assert (results / "model" / "fold_0" / "checkpoint_final.pth").is_file()
    assert processes_in(ROOT / "poc" / "federation") == []
