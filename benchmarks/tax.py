"""What federation costs in time: federated rounds beside the same nnU-Net epochs run plainly.

    python benchmarks/tax.py [--repeats 3] [--rounds 6] [--iterations 30]

One site, so that both have the machine alone: a round of the job (``nvflare simulator``) is one epoch, and its seconds
run from the train task's leaving the server to the new global model; start-up, planning and the last validation are
outside. Plain nnU-Net is ``nnUNetTrainer.run_training`` in a process of its own, on the data that the job has just
preprocessed, with the same plans, iterations, threads and no augmentation workers; its clock starts when the trainer is
initialised and stops before the final checkpoint.

On a machine that others use, two runs a minute apart differ by more than the tax. So the federated seconds are also
set beside those of the epochs within them, by nnU-Net's own log of that very run: what is above 1 is all that surrounds
the epochs (messages, weights in and out, a checkpoint a round, the data loaders' start in the first round).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from nnunet_flare.flare.history import RunHistory
from nnunet_flare.nnunet.config import TrainingConfig
from nnunet_flare.recipe import FFERecipe

SITE = "site-1"
VAL_ITERATIONS = 3
TARGET = 1.15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--iterations", type=int, default=30, help="per round")
    parser.add_argument("--batch-size", type=int, default=6)
    parser.add_argument("--plain", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plain:
        train_plainly(**json.loads(options.plain))
        return
    print(f"{options.rounds} rounds of {options.iterations} iterations, demo data, 2d, batch {options.batch_size}\n")
    print(
        f"{'':<8}{'federated s':>13}{'its epochs s':>14}{'plain s':>10}{'to epochs':>11}{'to plain':>10}{'target':>8}"
    )
    ratios = []
    with tempfile.TemporaryDirectory() as scratch:
        for repeat in range(options.repeats):
            home = Path(scratch, str(repeat))
            federated, epochs = run_job(home, options)
            plain = run_plain(home, options)
            ratios.append((federated / epochs, federated / plain))
            timings = f"{federated:>13.1f}{epochs:>14.1f}{plain:>10.1f}"
            print(f"{repeat + 1:<8}{timings}{ratios[-1][0]:>11.2f}{ratios[-1][1]:>10.2f}", flush=True)
    to_epochs, to_plain = (median(column) for column in zip(*ratios, strict=True))
    print(f"{'median':<8}{'':>37}{to_epochs:>11.2f}{to_plain:>10.2f}{TARGET:>8}")


def run_job(home: Path, options: argparse.Namespace) -> tuple[float, float]:
    """Seconds of all train rounds of one simulated job, by its history, and of the epochs in them, by nnU-Net's log."""
    training = TrainingConfig(
        configuration="2d",
        num_rounds=options.rounds,
        iterations_per_epoch=options.iterations,
        val_iterations_per_epoch=VAL_ITERATIONS,
        num_foreground_voxels=1_000_000,
        plans_overrides={"batch_size": options.batch_size},
    )
    FFERecipe(name="tax", training=training).export(str(home / "jobs"))
    command = [Path(sys.executable).with_name("nvflare"), "simulator", str(home / "jobs" / "tax")]
    command += ["-w", str(home / "workspace"), "-c", SITE, "-t", "1", "-l", "concise"]
    run(command, home, {"NNUNET_FLARE_HOME": str(home)})
    history = RunHistory.load(home / "server" / "runs" / "tax")
    log = next((home / SITE / "runs" / "tax" / "nnUNet_results").rglob("training_log_*.txt")).read_text()
    epochs = [float(seconds) for seconds in re.findall(r"Epoch time: ([\d.]+) s", log)]
    assert len(epochs) == options.rounds == len(history.rounds)
    return sum(record.seconds for record in history.rounds), sum(epochs)


def run_plain(home: Path, options: argparse.Namespace) -> float:
    """Seconds of the same epochs in nnU-Net's own loop, on the job's data and plans."""
    site = home / SITE
    preprocessed = next((site / "nnUNet_preprocessed" / "federated").glob("*"))
    answer = home / "plain.json"
    arguments = {
        "plans": str(site / "runs" / "tax" / "plans.json"),
        "num_epochs": options.rounds,
        "iterations": options.iterations,
        "answer": str(answer),
    }
    environment = {
        "nnUNet_raw": str(site / "nnUNet_raw"),
        "nnUNet_preprocessed": str(preprocessed),
        "nnUNet_results": str(home / "plain"),
        "nnUNet_n_proc_DA": "0",
        "OMP_NUM_THREADS": str(os.cpu_count() or 1),
        "OMP_WAIT_POLICY": "passive",
    }
    run([sys.executable, __file__, "--plain", json.dumps(arguments)], home, environment)
    return json.loads(answer.read_text())["seconds"]


def run(command: list[Any], home: Path, environment: dict[str, str]) -> None:
    log = home / "log.txt"
    with log.open("w") as file:
        code = subprocess.run(command, env=os.environ | environment, stdout=file, stderr=file).returncode
    if code:
        raise RuntimeError(f"{command[0]} failed:\n{log.read_text()[-3000:]}")


def train_plainly(plans: str, num_epochs: int, iterations: int, answer: str) -> None:
    import torch
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    planned = json.loads(Path(plans).read_text())
    dataset = Path(os.environ["nnUNet_preprocessed"], planned["dataset_name"], "dataset.json")
    trainer = nnUNetTrainer(
        plans={**planned, "continue_training": False},
        configuration="2d",
        fold=0,
        dataset_json=json.loads(dataset.read_text()),
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
    )
    trainer.num_epochs, trainer.num_iterations_per_epoch = num_epochs, iterations
    trainer.num_val_iterations_per_epoch = VAL_ITERATIONS
    trainer.initialize()
    started = time.monotonic()

    def note_seconds() -> None:
        Path(answer).write_text(json.dumps({"seconds": time.monotonic() - started}))

    trainer.on_train_end = note_seconds
    trainer.run_training()


if __name__ == "__main__":
    main()
