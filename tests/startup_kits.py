"""Start-up kits made by FLARE's own commands, and their processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

SERVER, SITE, ADMIN = "localhost", "site-1", "admin@example.org"


def nvflare(home: Path, *arguments: str | Path, **environment: str) -> None:
    """Run one command of FLARE's in ``home``, which is also the home directory whose settings it edits."""
    command = [Path(sys.executable).with_name("nvflare"), *arguments]
    environment = os.environ | {"HOME": str(home)} | environment
    result = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def provision(home: Path, *, port: int) -> Path:
    """Provision a server, one hospital and the project admin; returns the folder of their kits."""
    (home / "project.yml").write_text(f"""
api_version: 3
name: kits
participants:
  - {{name: {SERVER}, type: server, org: consortium, fed_learn_port: {port}}}
  - {{name: {SITE}, type: client, org: hospital_1}}
  - {{name: {ADMIN}, type: admin, org: consortium, role: project_admin}}
builders:
  - path: nvflare.lighter.impl.workspace.WorkspaceBuilder
  - path: nvflare.lighter.impl.static_file.StaticFileBuilder
    args: {{config_folder: config, scheme: grpc}}
  - path: nvflare.lighter.impl.cert.CertBuilder
""")
    nvflare(home, "provision", "-p", "project.yml", "-w", "workspace", "--force")
    return home / "workspace" / "kits" / "prod_00"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


@contextmanager
def running(script: Path, environment: Mapping[str, str]) -> Iterator[None]:
    """Run a kit's start script as a process group of its own, log beside the kit, until the block ends."""
    log = script.parents[1].with_suffix(".log")
    with log.open("w") as output:
        process = subprocess.Popen(
            ["bash", script, "--once"],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
