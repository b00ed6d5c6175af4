"""The commands of docs/deploy.md: each party in a folder of its own, server and hospitals on this machine."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from local_federation import free_ports

from conftest import TINY_TRAINING
from nnunet_flare.provision.kit import StartupKit

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "deploy.md").read_text()
SMALLER = {
    name: TINY_TRAINING[name] for name in ("iterations_per_epoch", "val_iterations_per_epoch", "plans_overrides")
}
KIT_FOLDER = Path("kits") / "nnunet_flare"


class Parties:
    """Runs the page's blocks, each of which says in its first line whose it is."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.variables = folder, {"REPOSITORY": str(ROOT)}
        ports = free_ports(2)
        page = PAGE.replace("flare.example.org", "localhost").replace("8002", str(ports[0]))
        self.page = page.replace("8003", str(ports[1]))
        self.blocks: dict[str, list[str]] = defaultdict(list)
        for party, commands in re.findall(r"```bash\n# ([^\n]+)\n(.*?)```", self.page, re.DOTALL):
            self.blocks[party].append(commands)

    def of(self, party: str) -> Path:
        (self.folder / party).mkdir(exist_ok=True)
        return self.folder / party

    def run(self, block: str, *more: str) -> str:
        """Run the next block of a party; ``more`` goes behind its lines that contain " job "."""
        party = block.partition(" ")[0]
        commands = self.blocks[block].pop(0)
        commands = "\n".join(f"{line} {' '.join(more)}" if " job " in line else line for line in commands.splitlines())
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("NNUNET", "nnUNet"))}
        environment = inherited | {
            "HOME": str(self.of(party)),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            **self.variables,
        }
        with (self.of(party) / "output").open("w") as output:
            command = ["bash", "-exc", commands]
            result = subprocess.run(
                command,
                cwd=self.of(party),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        said = (self.of(party) / "output").read_text()
        assert result.returncode == 0, f"{block}: {said[-5000:]}"
        return said

    def hand_over(self, file: Path, party: str) -> None:
        shutil.copy(self.folder / file, self.of(party))

    def wait_until_started(self, kit: Path, word: str, patience_s: float = 60) -> None:
        """Wait for a word in a kit's log: its ``start.sh`` returns at once."""
        log = self.folder / kit / "log.txt"
        give_up = time.monotonic() + patience_s
        while not (log.exists() and word in log.read_text()):
            assert time.monotonic() < give_up, f"no {word} in {kit}"
            time.sleep(0.2)

    def configure(self, kit: Path) -> None:
        """A hospital's own settings."""
        settings = {"dataset": "demo", "num_threads": 1}
        (self.folder / kit / "local" / "nnunet_flare.json").write_text(json.dumps(settings))

    def end(self) -> None:
        """End what runs in these folders, by its pid."""
        mine = self.running(self.folder)
        for process in mine:
            process.kill()
        psutil.wait_procs(mine, timeout=20)

    def running(self, folder: Path) -> list[psutil.Process]:
        """Processes that work in a folder."""
        places = [(process, process.info["cwd"]) for process in psutil.process_iter(["cwd"])]
        return [process for process, place in places if place and Path(place).is_relative_to(folder)]


@pytest.fixture
def parties(tmp_path: Path) -> Iterator[Parties]:
    parties = Parties(tmp_path)
    yield parties
    parties.end()


@pytest.mark.federation
def test_every_command_of_the_deployment_page_runs(parties: Parties):
    parties.run("coordinator")
    project = parties.of("coordinator") / "project.yml"
    text = project.read_text().replace("flare.example.org", "localhost")
    ports = re.search(r"fed_learn_port: (\d+), admin_port: (\d+)", parties.page)
    project.write_text(text.replace("8002", ports[1]).replace("8003", ports[2]))
    parties.run("coordinator")
    for kit, party in {"localhost": "server", "hospital-a": "hospital", "lead@example.org": "lead"}.items():
        parties.hand_over(Path("coordinator") / f"{kit}.tgz", party)
    parties.run("server")
    parties.wait_until_started(Path("server/localhost"), "Server started")

    parties.run("hospital")
    parties.configure(Path("hospital/hospital-a"))
    parties.run("hospital")
    parties.run("coordinator")
    assert (parties.of("coordinator") / KIT_FOLDER / "prod_01" / "hospital-d").is_dir()

    request = re.search(r"```yaml\n(.*?)```", parties.page, re.DOTALL)[1]
    (parties.of("hospital-e") / "hospital-e.yaml").write_text(request)
    parties.run("hospital-e")
    parties.hand_over(Path("hospital-e/request/hospital-e.request.zip"), "coordinator")
    parties.variables["FINGERPRINT"] = re.search(r"SHA256 Fingerprint=(\S+)", parties.run("coordinator"))[0]
    parties.run("coordinator")
    parties.hand_over(Path("coordinator/hospital-e.signed.zip"), "hospital-e")
    parties.run("hospital-e after approval")
    kit = Path("hospital-e") / KIT_FOLDER / "prod_00" / "hospital-e"
    parties.configure(kit)
    parties.run("hospital-e after approval")
    parties.wait_until_started(kit, "Connected to server")

    submitted = parties.run("lead", *(f"--set '{name}={json.dumps(TINY_TRAINING[name])}'" for name in SMALLER))
    assert "hospital-a" in submitted
    assert "hospital-e" in submitted
    parties.run("lead")
    assert (parties.of("lead") / "results" / "metrics.json").is_file()
    assert list((parties.of("lead") / "results" / "model").rglob("checkpoint_final.pth"))

    assert "signed by the site" in parties.run("hospital")
    assert "signed by the site" in parties.run("hospital")
    assert StartupKit.read(parties.of("hospital") / "hospital-a").policy.require_encryption
    parties.run("hospital")
    give_up = time.monotonic() + 60
    while (left := parties.running(parties.of("hospital"))) and time.monotonic() < give_up:
        time.sleep(0.5)
    assert left == []
    parties.run("coordinator")
    assert (parties.of("coordinator") / KIT_FOLDER / "prod_02").is_dir()
    assert {party: blocks for party, blocks in parties.blocks.items() if blocks} == {}
