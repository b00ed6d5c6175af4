"""What a fault costs a run: real processes on loopback, mutual TLS, a server and three hospitals.

    python benchmarks/faults.py [--only FAULT ...] [--rounds 14]

For every fault a federation of its own is provisioned and started, the lead gives
``nnunet-flare submit --follow --retry 5``, and the fault comes in the middle of the third round. The plain run beside
it, without a fault, is the baseline.

- ``jobs``: submissions that the run took.
- ``lost``: rounds that had been completed before the fault and were done again; the round in flight is not one.
- ``absent``: site rounds (of rounds x sites) that a hospital was left out of.
- ``recovery``: seconds from the fault to the next completed round, over those of a round of the plain run.
- ``end``: ``complete`` if ``submit`` ended well, every round was counted once, and all hospitals are in the last one.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import psutil

sys.path.insert(0, str(Path(__file__).parent.parent / "poc"))
from local_federation import SERVER, LocalFederation, end_on_signals

from nnunet_flare.errors import NNUNetFlareError
from nnunet_flare.flare.config import FederationConfig
from nnunet_flare.flare.history import RunHistory
from nnunet_flare.nnunet.config import TrainingConfig
from nnunet_flare.recipe import FFERecipe

RUN = "faults"
VICTIM = "hospital-b"
IN_ROUND = 3
CUT_S = 30


def nothing(federation: LocalFederation) -> None:
    pass


def kill_client_job(federation: LocalFederation) -> None:
    federation.job_process(VICTIM).kill()


def kill_client(federation: LocalFederation) -> None:
    federation.stop(VICTIM)
    time.sleep(10)
    federation.start(VICTIM)


def kill_server_job(federation: LocalFederation) -> None:
    federation.job_process(SERVER).kill()


def kill_server(federation: LocalFederation) -> None:
    federation.stop(SERVER)
    time.sleep(10)
    federation.start(SERVER)


def cut_network(federation: LocalFederation) -> None:
    """Nothing of the hospital answers, and its connections stay open: what a cut line looks like to the others."""
    client = federation.process(VICTIM)
    paused = [client, federation.job_process(VICTIM)]
    for process in paused:
        process.send_signal(signal.SIGSTOP)
    time.sleep(CUT_S)
    for process in paused:
        process.send_signal(signal.SIGCONT)


def kill_training(federation: LocalFederation) -> None:
    """What the kernel does to the process that asks for too much memory."""
    training(federation).kill()


def training(federation: LocalFederation) -> psutil.Process:
    children = federation.job_process(VICTIM).children()
    return next(child for child in children if "nnunet_flare.nnunet.worker" in child.cmdline())


def join_late(federation: LocalFederation) -> None:
    federation.start(VICTIM)


def fill_disk(federation: LocalFederation) -> None:
    """No file of the training process may grow: every write fails, until somebody has made room."""
    limits = psutil.RLIMIT_FSIZE
    job = federation.job_process(VICTIM)
    for process in (job, training(federation)):
        process.rlimit(limits, (0, psutil.RLIM_INFINITY))
    time.sleep(15)
    for process in (job, *job.children()):
        process.rlimit(limits, (psutil.RLIM_INFINITY, psutil.RLIM_INFINITY))


FAULTS: dict[str, Callable[[LocalFederation], None]] = {
    "none": nothing,
    "client job process killed": kill_client_job,
    "client killed, back after 10 s": kill_client,
    "server job process killed": kill_server_job,
    "server killed, back after 10 s": kill_server,
    f"network cut for {CUT_S} s": cut_network,
    "training out of memory": kill_training,
    "site comes late": join_late,
    "disk full for 15 s": fill_disk,
}


class FaultyRun:
    """One run with one fault in it."""

    def __init__(self, folder: Path, name: str, num_rounds: int) -> None:
        self.folder, self.name, self.num_rounds = folder, name, num_rounds
        self.fault_at = self.recovered_at = 0.0
        self.rounds_before, self.mishap = 0, "the run ended before the fault"

    def run(self) -> None:
        training = TrainingConfig(
            configuration="2d",
            num_rounds=self.num_rounds,
            iterations_per_epoch=10,
            val_iterations_per_epoch=1,
            num_foreground_voxels=10_000,
            plans_overrides={"batch_size": 2},
        )
        recipe = FFERecipe(name=RUN, training=training, federation=FederationConfig(min_sites=2))
        recipe.export(str(self.folder))
        with LocalFederation(self.folder) as federation:
            self.record = federation.home / "server" / "runs" / RUN
            federation.provision()
            late = {VICTIM} if FAULTS[self.name] is join_late else set()
            federation.start(SERVER, *(site for site in federation.sites if site not in late))
            federation.wait_until_listening()
            with federation.session() as session:
                federation.wait_for_sites(session)
            fault = threading.Thread(target=self._hurt, args=(federation,), daemon=True)
            fault.start()
            self.started = time.monotonic()
            command = [str(Path(sys.executable).with_name("nnunet-flare")), "submit", str(self.folder / RUN)]
            command += ["--kit", str(federation.user("lead")), "--follow", "--retry", "5", "--wait", "5"]
            with (self.folder / "submit.log").open("w") as log:
                environment = os.environ | {"HOME": str(self.folder)}
                self.status = subprocess.run(command, stdout=log, stderr=log, env=environment).returncode
            self.ended = time.monotonic()
            fault.join(timeout=60)
            self.sites = federation.sites

    def _history(self) -> RunHistory | None:
        try:
            return RunHistory.load(self.record)
        except (NNUNetFlareError, OSError):
            return None

    def _rounds_done(self) -> int:
        history = self._history()
        return history.rounds_done if history else 0

    def _hurt(self, federation: LocalFederation) -> None:
        try:
            self._hurt_once(federation)
        except Exception as error:
            self.mishap = f"no fault: {error!r}"
            raise

    def _hurt_once(self, federation: LocalFederation) -> None:
        self._wait(lambda: self._rounds_done() == IN_ROUND - 1)
        time.sleep(1)
        self.rounds_before = self._rounds_done()
        self.fault_at = time.monotonic()
        FAULTS[self.name](federation)
        self._wait(lambda: self._rounds_done() > self.rounds_before)
        self.recovered_at, self.mishap = time.monotonic(), ""

    def _wait(self, holds: Callable[[], bool]) -> None:
        while not holds():
            time.sleep(0.1)

    def row(self, plain_round_s: float | None) -> str:
        said = (self.folder / "submit.log").read_text()
        jobs = said.count(f"submitted {RUN} as job")
        history = self._history()
        if history is None:
            return f"{self.name:<34}{jobs:>6}   no run: {said.splitlines()[-1:]}"
        resumed = re.findall(r"continuing with round (\d+) of", self._server_log())
        lost = max([0, *(self.rounds_before + 1 - int(first) for first in resumed)]) if resumed else 0
        absent = sum(len(set(self.sites) - set(record.sites)) for record in history.rounds)
        once = [record.round for record in history.rounds] == list(range(1, self.num_rounds + 1))
        whole = set(history.rounds[-1].sites) == set(self.sites) if history.rounds else False
        if self.mishap:
            return f"{self.name:<34}{jobs:>6}   {self.mishap}"
        complete = self.status == 0 and history.phase == "done" and once and whole
        recovery = self.recovered_at - self.fault_at
        relative = f"{recovery / plain_round_s:>10.1f}" if plain_round_s else f"{'':>10}"
        end = "complete" if complete else f"status {self.status}, {history.phase}"
        return f"{self.name:<34}{jobs:>6}{lost:>6}{absent:>8}{recovery:>12.1f}{relative}   {end}"

    def _server_log(self) -> str:
        return (self.folder / f"{SERVER}.log").read_text(errors="replace")

    def round_seconds(self) -> float:
        return median(record.seconds for record in self._history().rounds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=FAULTS, help="these faults, beside the plain run")
    parser.add_argument("--rounds", type=int, default=14)
    parser.add_argument("--work", type=Path, help="keep everything here")
    options = parser.parse_args()
    end_on_signals()
    print(f"{'fault in round 3':<34}{'jobs':>6}{'lost':>6}{'absent':>8}{'recovery s':>12}{'in rounds':>10}   end")
    work = options.work or Path(tempfile.mkdtemp())
    plain, ended_well = None, True
    try:
        for number, name in enumerate(FAULTS):
            if options.only and name not in ("none", *options.only):
                continue
            folder = work / str(number)
            folder.mkdir(parents=True)
            faulty = FaultyRun(folder, name, options.rounds)
            faulty.run()
            row = faulty.row(plain)
            plain = plain or faulty.round_seconds()
            ended_well &= row.endswith("complete")
            print(row, flush=True)
    finally:
        if not options.work:
            shutil.rmtree(work)
    return 0 if ended_well else 1


if __name__ == "__main__":
    sys.exit(main())
