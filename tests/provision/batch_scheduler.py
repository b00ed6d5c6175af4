#!/usr/bin/env python3
"""Stands in for Slurm's sbatch, squeue, sacct or scancel, by the name of its file: every job starts at once, here."""

from __future__ import annotations

import getpass
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

JOBS = Path(__file__).parent / "jobs"


def submit(arguments: list[str], options: dict[str, str]) -> None:
    number = str(len(list(JOBS.glob("*.json"))) + 1)
    run = ["bash", "-c", 'bash "$0"; echo $? > "$1"', arguments[-1], str(JOBS / f"{number}.exit")]
    environment = {"PATH": os.defpath, "HOME": os.environ["HOME"], "SLURM_JOB_ID": number}  # as --export=NIL leaves it
    with open(options["output"].replace("%j", number), "w") as output:
        process = subprocess.Popen(
            run,
            cwd=options["chdir"],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    job = {"id": number, "pid": process.pid, "name": options["job-name"], "comment": options["comment"]}
    (JOBS / f"{number}.json").write_text(json.dumps(job | {"arguments": arguments}))
    print(number)


def jobs() -> list[dict]:
    """The jobs, each with its exit status, None while it runs."""
    found = [json.loads(file.read_text()) for file in JOBS.glob("*.json")]
    ends = [JOBS / f"{job['id']}.exit" for job in found]
    return [
        job | {"exit": int(end.read_text() or 0) if end.is_file() else None}
        for job, end in zip(found, ends, strict=True)
    ]


def main() -> None:
    JOBS.mkdir(exist_ok=True)
    command, arguments = Path(sys.argv[0]).name, sys.argv[1:]
    options = dict(item[2:].split("=", 1) for item in arguments if item.startswith("--") and "=" in item)
    if command == "sbatch":
        submit(arguments, options)
    for job in jobs():
        if command == "squeue" and job["name"] == options["name"] and job["exit"] is None:
            print(job["id"], "RUNNING", os.getuid(), job["comment"], job["name"], sep="|")
        if command == "sacct" and job["id"] == options.get("jobs"):
            state = "RUNNING" if job["exit"] is None else "FAILED" if job["exit"] else "COMPLETED"
            print(job["id"], job["name"], getpass.getuser(), state, f"{job['exit'] or 0}:0", "0:0", sep="|")
        if command == "scancel" and job["id"] == arguments[-1] and job["exit"] is None:
            os.killpg(job["pid"], signal.SIGTERM)
            (JOBS / f"{job['id']}.exit").write_text("143")


if __name__ == "__main__":
    main()
