"""A whole federation on one machine: real kits, real processes, mutual TLS on loopback."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import yaml
from nvflare.fuel.flare_api.flare_api import Session, new_secure_session
from nvflare.lighter.prov_utils import prepare_builders
from nvflare.lighter.provision import prepare_project
from nvflare.lighter.provisioner import Provisioner

PROJECT_FILE = Path(__file__).parent.parent / "provisioning" / "project.yml"
SERVER = "localhost"


class LocalFederation:
    """Kits, state and processes of every participant of a project, in one folder.

    Leaving the ``with`` block ends every process that was started in it, and every process that those have started.

    Args:
        folder: Where kits, state and logs go.
        settings: Site settings (``local/nnunet_flare.json``) of every hospital.
    """

    def __init__(self, folder: Path, *, settings: Mapping[str, Any] | None = None) -> None:
        self.folder, self.home = folder, folder / "state"
        self._settings = {"home": str(self.home), "num_threads": 1} | dict(settings or {})
        self.kits: dict[str, Path] = {}
        self._started: dict[str, float] = {}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        project = yaml.safe_load(PROJECT_FILE.read_text())
        server = next(item for item in project["participants"] if item["type"] == "server")
        server["name"], (server["fed_learn_port"], server["admin_port"]) = SERVER, free_ports(2)
        self.project: dict[str, Any] = project

    def __enter__(self) -> LocalFederation:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop(*self._processes)

    def provision(self) -> None:
        """Make the kits of all participants of ``project``."""
        workspace = self.folder / "kits" / self.project["name"]
        workspace.mkdir(parents=True, exist_ok=True)
        provisioner = Provisioner(str(workspace.parent), prepare_builders(self.project))
        provisioner.provision(prepare_project(json.loads(json.dumps(self.project))))
        for kit in max(workspace.glob("prod_*")).iterdir():
            if kit.name not in self.kits:
                self.adopt(kit)

    def adopt(self, kit: Path) -> None:
        """Take in a participant's kit, wherever it was made; its kits of later provisionings are not used."""
        self.kits[kit.name] = kit
        if (kit / "startup" / "fed_client.json").exists():
            self.configure(kit.name)

    @property
    def sites(self) -> list[str]:
        return sorted(name for name, kit in self.kits.items() if (kit / "startup" / "fed_client.json").exists())

    def user(self, role: str) -> Path:
        """The kit of the (first) user of a role."""
        return self.kits[next(item["name"] for item in self.project["participants"] if item.get("role") == role)]

    def configure(self, name: str, **settings: Any) -> None:
        """Write a participant's own settings."""
        values = self._settings | settings
        (self.kits[name] / "local" / "nnunet_flare.json").write_text(json.dumps(values))

    def start(self, *names: str, **environment: str) -> None:
        """Start the server, or a hospital, as its kit says: ``startup/sub_start.sh``, in a process group of its own."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        own = {"HOME": str(self.folder), "NNUNET_FLARE_HOME": str(self.home), "PATH": path}
        for name in names:
            self._started[name] = time.time()
            script = self.kits[name] / "startup" / "sub_start.sh"
            with (self.folder / f"{name}.log").open("ab") as log:
                self._processes[name] = subprocess.Popen(
                    ["bash", str(script), "--once"],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=os.environ | own | environment,
                    start_new_session=True,
                )

    def process(self, name: str) -> psutil.Process:
        """The FLARE process of a participant that was started: with ``--once``, the script becomes it."""
        return psutil.Process(self._processes[name].pid)

    def job_process(self, name: str) -> psutil.Process:
        """The process that runs the job at a participant.

        Raises:
            LookupError: none runs there.
        """
        module = "server.runner_process" if name == SERVER else "client.worker_process"
        for child in self.process(name).children():
            if any(module in argument for argument in child.cmdline()):
                return child
        raise LookupError(f"no job runs at {name}")

    @contextlib.contextmanager
    def session(self, role: str = "lead") -> Iterator[Session]:
        """The FLARE API as a user sees it, once every site that was started is connected."""
        kit = self.user(role)
        session = new_secure_session(username=kit.name, startup_kit_location=str(kit))
        try:
            yield session
        finally:
            session.close()

    def wait_for_sites(self, session: Session, patience_s: float = 60) -> None:
        """Wait until every hospital that was started is connected; FLARE lists one for minutes after its end."""
        wanted = {name for name in self.sites if self.is_alive(name)}
        give_up = time.monotonic() + patience_s
        while True:
            seen = {client.name: client.last_connect_time for client in session.get_system_info().client_info}
            missing = sorted(name for name in wanted if seen.get(name, 0) < self._started[name])
            if not missing:
                return
            if time.monotonic() > give_up:
                raise TimeoutError(f"not connected: {', '.join(missing)}")
            time.sleep(0.5)

    def run_job(self, job: Path, role: str = "lead", patience_s: float = 300) -> dict[str, Any]:
        """Submit a job folder as it is, wait for its end and return FLARE's record of it."""
        with self.session(role) as session:
            self.wait_for_sites(session)
            job_id = session.submit_job(str(job))
            return session.wait_for_job(job_id, timeout=patience_s)

    def stop(self, *names: str, patience_s: float = 20) -> None:
        """End participants with all that they have started; FLARE's own way waits for jobs."""
        processes = [self._processes.pop(name) for name in names if name in self._processes]
        family = list(_families(process.pid for process in processes))
        for member in family:
            _signal(member, signal.SIGKILL)
        for process in processes:
            process.wait()
        _, alive = psutil.wait_procs(family, timeout=patience_s)
        if alive:
            raise RuntimeError(f"processes that do not end: {alive}")

    def is_alive(self, name: str) -> bool:
        return name in self._processes and self._processes[name].poll() is None

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def wait_until_listening(self, patience_s: float = 60) -> None:
        """Wait for the server's ports.

        Raises:
            TimeoutError: they do not open; the end of the server's log is in the message.
        """
        server = next(item for item in self.project["participants"] if item["type"] == "server")
        give_up = time.monotonic() + patience_s
        while not all(map(_is_open, (server["fed_learn_port"], server["admin_port"]))):
            if time.monotonic() > give_up or not self.is_alive(SERVER):
                raise TimeoutError(f"the server does not listen: {self.log(SERVER)[-2000:]}")
            time.sleep(0.2)


def end_on_signals() -> None:
    """Let Ctrl-C, SIGTERM and SIGHUP leave ``with`` blocks, in the background of a script too."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))


def free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    for item in sockets:
        item.bind(("127.0.0.1", 0))
    ports = [item.getsockname()[1] for item in sockets]
    for item in sockets:
        item.close()
    return ports


def _is_open(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _families(pids: Iterable[int]) -> Iterable[psutil.Process]:
    """Processes and their descendants; job and nnU-Net processes are in sessions of their own."""
    for pid in pids:
        try:
            process = psutil.Process(pid)
            yield from (process, *process.children(recursive=True))
        except psutil.NoSuchProcess:
            continue


def _signal(process: psutil.Process, number: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)
