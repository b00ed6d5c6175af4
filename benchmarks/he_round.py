"""What encryption costs a whole round, and what it changes in the model: ``jobs/ffe_he`` beside ``jobs/ffe``.

    python benchmarks/he_round.py [--rounds 8] [--iterations 25]

Both jobs run in FLARE's simulator, three sites at once, from one seed, on the demo data, one after the other. A round
runs from the train tasks' leaving the server to the new global values. In the encrypted round the mean is within
``K * step / 2`` of the plain one (tests/flare/test_encrypted.py); training then enlarges any difference, however small,
so the plain job runs once more with another rounding of the same mean (``update="weights"``) for comparison.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import mean, median

import numpy as np

from nnunet_flare.flare.config import EncryptionConfig
from nnunet_flare.flare.history import RunHistory
from nnunet_flare.nnunet.model import read_weights
from nnunet_flare.recipe import FFERecipe, demo_training

SITES = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--iterations", type=int, default=25, help="per round")
    options = parser.parse_args()
    training = replace(demo_training(), num_rounds=options.rounds, iterations_per_epoch=options.iterations)
    jobs = {
        "plain": FFERecipe(name="run", training=training),
        "plain, weights": FFERecipe(name="run", training=replace(training, update="weights")),
        "encrypted": FFERecipe(name="run", training=training, encryption=EncryptionConfig()),
    }
    print(f"{SITES} sites, {options.rounds} rounds of {options.iterations} iterations, demo data, 2d\n")
    print(f"{'':<16}{'round s':>9}{'ratio':>7}{'up MB':>8}{'down MB':>9}{'Dice':>8}{'largest weight difference':>27}")
    first: dict[str, np.ndarray] = {}
    baseline = 0.0
    with tempfile.TemporaryDirectory() as scratch:
        for index, (name, recipe) in enumerate(jobs.items()):
            home = Path(scratch, str(index))
            recipe.export(str(home / "jobs"))
            run(home)
            history = RunHistory.load(home / "server" / "runs" / "run")
            seconds = median(record.seconds for record in history.rounds)
            baseline = baseline or seconds
            up, down = (
                mean(getattr(site, key) for site in history.rounds[-1].sites.values()) / 1e6
                for key in ("upload_bytes", "download_bytes")
            )
            dice = mean(final.foreground.dsc for final in history.final.values())
            weights = final_weights(home)
            first = first or weights
            difference = max(float(np.abs(first[key] - weights[key]).max()) for key in first)
            row = f"{name:<16}{seconds:>9.1f}{seconds / baseline:>7.2f}{up:>8.2f}{down:>9.2f}{dice:>8.4f}"
            print(f"{row}{difference:>27.1e}", flush=True)


def run(home: Path) -> None:
    command = [Path(sys.executable).with_name("nvflare"), "simulator", str(home / "jobs" / "run")]
    command += ["-w", str(home / "workspace"), "-n", str(SITES), "-t", str(SITES), "-l", "concise"]
    environment = os.environ | {"NNUNET_FLARE_HOME": str(home)}
    with (home / "log.txt").open("w") as log:
        subprocess.run(command, env=environment, stdout=log, stderr=log, check=True)


def final_weights(home: Path) -> dict[str, np.ndarray]:
    file = next((home / "site-1" / "runs" / "run" / "nnUNet_results").rglob("checkpoint_final.pth"))
    return {name: value.numpy() for name, value in read_weights(file).items()}


if __name__ == "__main__":
    main()
