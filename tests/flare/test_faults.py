"""Processes of a federation in FLARE's simulator are killed in the middle of a round; the command is given again."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest

from conftest import TINY_TRAINING
from nnunet_flare.flare.config import FederationConfig
from nnunet_flare.nnunet.config import TrainingConfig
from nnunet_flare.recipe import FFERecipe

pytestmark = [pytest.mark.federation, pytest.mark.slow]

SITES = ("site-1", "site-2")
RUN = "faults"
WORKER = "nnunet_flare.nnunet.worker"
PATIENCE_S = 240
ROUND_TIMEOUT_S = 30
"""FLARE's simulator does not notice that a client has died: the round ends by its deadline."""


def wait_until(holds: Callable[[], bool], what: str, patience_s: float = PATIENCE_S) -> None:
    give_up = time.monotonic() + patience_s
    while not holds():
        assert time.monotonic() < give_up, f"waited {patience_s} s for {what}"
        time.sleep(0.05)


def processes() -> dict[int, tuple[int, str]]:
    """Process id -> parent's id and start time, of all that run."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                state, parent, *rest = (entry / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if state != "Z":
                found[int(entry.name)] = int(parent), rest[17]
    return found


def descendants(root: int) -> dict[int, str]:
    """Process id -> start time: a pair that no later process has."""
    running, found, parents = processes(), {}, [root]
    while parents:
        parent = parents.pop()
        children = {pid: started for pid, (its_parent, started) in running.items() if its_parent == parent}
        found |= children
        parents += children
    return found


def command_of(pid: int) -> str:
    return (Path("/proc") / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode()


class Simulation:
    """One federation in a folder of its own; ``start`` is the command that a user gives, again and again."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.folder, self.home, self.seen = folder, folder / "home", dict[int, str]()
        for site in SITES:
            shutil.copytree(data / site, self.home / site / "nnUNet_raw")
        training = TrainingConfig(**TINY_TRAINING | {"iterations_per_epoch": 8})
        federation = FederationConfig(round_timeout_s=ROUND_TIMEOUT_S)
        FFERecipe(name=RUN, training=training, federation=federation).export(str(folder / "jobs"))

    def start(self) -> None:
        self.started = time.monotonic()
        command = [Path(sys.executable).with_name("nvflare"), "simulator", self.folder / "jobs" / RUN]
        environment = os.environ | {"HOME": str(self.folder), "NNUNET_FLARE_HOME": str(self.home)}
        with (self.folder / "simulator.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*map(str, command), "-w", str(self.folder / "workspace"), "-n", "2", "-t", "2"],
                cwd=self.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def kill(self, pids: Iterable[int]) -> None:
        self.seen |= descendants(self.process.pid)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    def end(self) -> None:
        """Wait for the simulator's own end, and for that of every process it had."""
        while self.process.poll() is None:
            self.seen |= descendants(self.process.pid)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(0.5)
            assert time.monotonic() < self.started + PATIENCE_S, f"the simulator runs for {PATIENCE_S} s"
        wait_until(lambda: not self.left_over(), "its processes to end", 20)

    def left_over(self) -> list[int]:
        running = processes()
        return [pid for pid, started in self.seen.items() if pid in running and running[pid][1] == started]

    def stop(self) -> None:
        """Whatever a failed test leaves."""
        self.kill([*descendants(self.process.pid), *([self.process.pid] if self.process.poll() is None else [])])
        self.kill(self.left_over())
        self.process.wait()

    def rounds(self) -> list[int]:
        file = self.home / "server" / "runs" / RUN / "metrics.json"
        return [record["round"] for record in json.loads(file.read_text())["rounds"]] if file.exists() else []

    def trainings(self, site: str) -> int:
        log = self.home / site / "runs" / RUN / "nnunet.log"
        return log.read_bytes().count(b"command: train\n") if log.exists() else 0

    def go_to_the_middle_of_round_2(self) -> None:
        wait_until(lambda: all(self.trainings(site) == 2 for site in SITES), "round 2")
        time.sleep(0.3)
        assert self.rounds() == [1]

    def worker_of(self, site: str) -> int:
        return next(pid for pid in descendants(self.client_of(site)) if WORKER in command_of(pid))

    def client_of(self, site: str) -> int:
        return next(pid for pid in descendants(self.process.pid) if f"--client {site} " in command_of(pid))

    def final_layers(self) -> dict[str, np.ndarray]:
        with np.load(self.home / "server" / "runs" / RUN / "state" / "global_00003.npz") as stored:
            return dict(stored)


@pytest.fixture
def simulation(tmp_path: Path, demo_data: Path):
    simulation = Simulation(tmp_path, demo_data)
    yield simulation
    simulation.stop()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, demo_data: Path) -> dict[str, np.ndarray]:
    simulation = Simulation(tmp_path_factory.mktemp("uninterrupted"), demo_data)
    simulation.start()
    try:
        simulation.end()
    finally:
        simulation.stop()
    assert [simulation.trainings(site) for site in SITES] == [3, 3]
    return simulation.final_layers()


def nnunet_process(simulation: Simulation) -> list[int]:
    return [simulation.worker_of("site-1")]


def client(simulation: Simulation) -> list[int]:
    return [simulation.client_of("site-1")]


def all_of_flare(simulation: Simulation) -> list[int]:
    """nnU-Net's processes are left to notice for themselves that nobody asks them any more."""
    others = [pid for pid in descendants(simulation.process.pid) if WORKER not in command_of(pid)]
    return [simulation.process.pid, *others]


@pytest.mark.parametrize("victims", [nnunet_process, client, all_of_flare])
def test_after_a_kill_the_same_command_ends_with_the_weights_of_an_uninterrupted_run(
    simulation, uninterrupted, victims
):
    simulation.start()
    simulation.go_to_the_middle_of_round_2()
    simulation.kill(victims(simulation))
    simulation.end()
    assert simulation.rounds() == [1]

    simulation.start()
    simulation.end()
    assert simulation.rounds() == [1, 2, 3]
    assert all(simulation.trainings(site) == 4 for site in SITES)  # of three rounds, the second twice
    final = simulation.final_layers()
    assert final.keys() == uninterrupted.keys()
    for name, array in uninterrupted.items():
        np.testing.assert_array_equal(final[name], array)
