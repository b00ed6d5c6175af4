"""``make poc``: from provisioning to fetched results on one machine, with nothing of it left running.

Three hospitals, the server and the lead are real FLARE processes with certificates of their own; the lead submits
``jobs/ffe`` on generated data, follows it and fetches the results.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from local_federation import SERVER, LocalFederation, end_on_signals

ROOT = Path(__file__).parent.parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "poc" / "federation", help="made anew; everything goes there"
    )
    parser.add_argument("--job", type=Path, default=ROOT / "jobs" / "ffe")
    options = parser.parse_args()
    end_on_signals()
    folder = options.folder.absolute()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with LocalFederation(folder) as federation:
        return run(federation, options.job.absolute())


def run(federation: LocalFederation, job: Path) -> int:
    print("provisioning: a server, three hospitals and their users", flush=True)
    federation.provision()
    print(f"starting {SERVER}, {', '.join(federation.sites)}: logs in {federation.folder}", flush=True)
    federation.start(SERVER, *federation.sites)
    federation.wait_until_listening()
    with federation.session() as session:
        federation.wait_for_sites(session)
    kit, results = federation.user("lead"), federation.folder / "results"
    command = [str(Path(sys.executable).with_name("nnunet-flare"))]
    for arguments in (
        ["submit", str(job), "--follow", "--retry", "3"],
        ["fetch", job.name, "--out", str(results)],
    ):
        environment = os.environ | {"HOME": str(federation.folder), "NNUNET_FLARE_HOME": str(federation.home)}
        status = subprocess.run([*command, *arguments, "--kit", str(kit)], env=environment).returncode
        if status:
            return status
    print(f"results: {results}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
