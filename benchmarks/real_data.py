"""Local-only, FFE, asymmetric and centralised nnU-Net on real cases split over unlike hospitals.

    python benchmarks/real_data.py IMAGES LABELS --work /tmp/hippocampus

IMAGES and LABELS hold files of equal names (for example the hippocampus task of the Medical Segmentation Decathlon).
120 of the cases go to three sites: one as they are, one with 2 mm slices, one at 1.5 mm. The first table scores every
whole model on every site's validation cases (fold 0 of the site; the centralised fold is the union of the sites'); the
second scores what each site ends with on its own. All train for the same iterations at each site; the centralised
model also for as many as the three sites together. Each run continues where it stopped when the command is given again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from nvflare.recipe.spec import Recipe

from nnunet_flare.aggregation.sharing import Sharing, SharingConfig
from nnunet_flare.flare.history import RunHistory
from nnunet_flare.nnunet.assignment import FractionAssignment
from nnunet_flare.nnunet.config import TrainingConfig
from nnunet_flare.nnunet.metrics import mean_metrics, segmentation_metrics
from nnunet_flare.nnunet.site import SETTINGS_FILE, SETTINGS_VARIABLE
from nnunet_flare.nnunet.split import split_dataset
from nnunet_flare.recipe import AsymFedAvgRecipe, FFERecipe
from nnunet_flare.storage import read_json

SITES = ("site-1", "site-2", "site-3")
SPACING_MM = {"site-2": (1.0, 1.0, 2.0), "site-3": (1.5, 1.5, 1.5)}
ASYMMETRIC = {
    "common-name": SharingConfig(alignment="name"),
    "common-resolution": SharingConfig(),
    "cohort": SharingConfig(sharing="cohort"),
}
LABELS = {"background": 0, "anterior": 1, "posterior": 2}


def main() -> None:
    options = _options()
    work: Path = options.work
    data = work / "data"
    os.environ |= {"NNUNET_FLARE_HOME": str(work / "home"), SETTINGS_VARIABLE: str(data / SETTINGS_FILE)}
    if not data.exists():
        _split(options, data)
    training = TrainingConfig(
        configuration=options.configuration,
        num_rounds=options.rounds,
        iterations_per_epoch=options.iterations,
        val_iterations_per_epoch=5,
        num_foreground_voxels=10_000_000,
        plans_overrides={"batch_size": options.batch_size} if options.batch_size else {},
    )
    for site in SITES:
        _run(f"local-{site}", (site,), FFERecipe, work, training=training)
    _run("ffe", SITES, FFERecipe, work, training=training)
    for name, sharing in ASYMMETRIC.items():
        _run(name, SITES, AsymFedAvgRecipe, work, training=training, sharing=sharing)
    _pool(data, work)
    _run("centralised", ("central",), FFERecipe, work, training=training)
    as_long = replace(training, num_rounds=len(SITES) * training.num_rounds)
    _run("centralised-long", ("central",), FFERecipe, work, training=as_long)
    _print_shared(work)
    _print_own(work)
    _print_whole(work, data)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("labels", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="folder for data, runs and results")
    parser.add_argument("--cases", type=int, default=120)
    parser.add_argument("--configuration", default="2d")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--iterations", type=int, default=25, help="per round")
    parser.add_argument("--batch-size", type=int, default=32, help="0 keeps the planned one")
    return parser.parse_args()


def _split(options: argparse.Namespace, data: Path) -> None:
    total = len(list(options.images.glob("*.nii.gz")))
    share = options.cases / total / len(SITES)
    fractions = dict.fromkeys(SITES, share) | ({"rest": 1 - options.cases / total} if options.cases < total else {})
    split_dataset(
        (options.images, options.labels),
        data,
        assignment=FractionAssignment(fractions=fractions, seed=1),
        spacing_mm=SPACING_MM,
        name="Real",
        channel_names={0: "MRI"},
        labels=LABELS,
    )


def _run(name: str, sites: tuple[str, ...], recipe: type[Recipe], work: Path, **settings: Any) -> None:
    folder = work / "home" / "server" / "runs" / name
    if (folder / "metrics.json").exists() and RunHistory.load(folder).phase == "done":
        return
    recipe(name=name, **settings).export(str(work / "jobs"))
    command = ["nvflare", "simulator", str(work / "jobs" / name), "-w", str(work / "simulator" / name)]
    command += ["-c", ",".join(sites), "-t", str(len(sites)), "-l", "concise"]
    executable = Path(sys.executable).with_name(command[0])
    with (work / f"{name}.log").open("a") as log:
        subprocess.run([executable, *command[1:]], check=True, stdout=log, stderr=log)


def _pool(data: Path, work: Path) -> None:
    """One data set of all sites' cases (hard links), whose folds are the unions of the sites' folds."""
    settings = json.loads((data / SETTINGS_FILE).read_text())
    if "central" in settings["sites"]:
        return
    folder = data / "Dataset700_RealCentral"
    pooled, splits = None, [{"train": [], "val": []} for _ in range(5)]
    for site in SITES:
        source = data / settings["sites"][site]["dataset"]
        description = json.loads((source / "dataset.json").read_text())
        pooled = pooled or description | {"numTraining": 0}
        pooled["numTraining"] += description["numTraining"]
        for part in ("imagesTr", "labelsTr"):
            (folder / part).mkdir(parents=True, exist_ok=True)
            for file in (source / part).iterdir():
                (folder / part / file.name).hardlink_to(file)
        for fold, split in enumerate(_site_splits(work, site)):
            for part in ("train", "val"):
                splits[fold][part] += split[part]
    (folder / "dataset.json").write_text(json.dumps(pooled))
    (folder / "splits_final.json").write_text(json.dumps(splits))
    settings["sites"]["central"] = {"dataset": folder.name}
    (data / SETTINGS_FILE).write_text(json.dumps(settings))


def _site_splits(work: Path, site: str) -> list[dict[str, list[str]]]:
    file = next((work / "home" / site / "nnUNet_preprocessed").glob("federated/*/*/splits_final.json"))
    return json.loads(file.read_text())


def _print_own(work: Path) -> None:
    """What each site's validation of its own final model gave."""
    runs = {"local": "local-{}", **{name: name for name in ASYMMETRIC}, "FFE": "ffe"}
    _print_table(
        "each site's own model on its own cases",
        {label: [_own(work, run.format(site), site) for site in SITES] for label, run in runs.items()},
    )


def _print_shared(work: Path) -> None:
    """What share of its parameters each site shares with others."""
    print(f"\nparameters that a site shares\n{'':<18}" + "".join(f"{site:>12}" for site in SITES))
    for run in ASYMMETRIC:
        record = read_json(work / "home/server/runs" / run / "sharing.json")
        coverage = Sharing.from_json(record).coverage()
        print(f"{run:<18}" + "".join(f"{coverage[site]['shared']:>12.1%}" for site in SITES))


def _own(work: Path, run: str, site: str) -> tuple[float, float]:
    foreground = RunHistory.load(work / "home/server/runs" / run).final[site].foreground
    return foreground.dsc, foreground.hd95_mm


def _print_whole(work: Path, data: Path) -> None:
    runs = {f"local {site}": f"local-{site}" for site in SITES}
    runs |= {"FFE": "ffe", "centralised": "centralised", "centralised x3": "centralised-long"}
    scores = {label: [_score(work, data, run, site) for site in SITES] for label, run in runs.items()}
    _print_table("whole models on every site's cases", scores)


def _print_table(title: str, scores: dict[str, list[tuple[float, float]]]) -> None:
    sites = "".join(f"{site + ' DSC':>12}{'HD95':>7}" for site in SITES)
    print(f"\n{title}\n{'':<18}{sites}{'mean DSC':>12}{'HD95':>7}")
    for label, of_sites in scores.items():
        columns = [*of_sites, tuple(np.mean(of_sites, axis=0))]
        print(f"{label:<18}" + "".join(f"{dsc:>12.3f}{hd95:>7.2f}" for dsc, hd95 in columns), flush=True)


def _score(work: Path, data: Path, run: str, site: str) -> tuple[float, float]:
    """Mean foreground DSC and HD95 (mm) of a run's global model on a site's validation cases, from raw images."""
    import torch
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    warnings.filterwarnings("ignore", category=FutureWarning, module="monai")
    predictor = nnUNetPredictor(device=torch.device("cuda" if torch.cuda.is_available() else "cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(work / "home/server/runs" / run / "model"), (0,))
    source = data / json.loads((data / SETTINGS_FILE).read_text())["sites"][site]["dataset"]
    reader, cases = SimpleITKIO(), []
    for case in _site_splits(work, site)[0]["val"]:
        image, properties = reader.read_images([str(source / "imagesTr" / f"{case}_0000.nii.gz")])
        truth, _ = reader.read_seg(str(source / "labelsTr" / f"{case}.nii.gz"))
        prediction = predictor.predict_single_npy_array(image, properties)
        cases.append(
            segmentation_metrics(
                truth[0],
                prediction,
                labels={name: value for name, value in LABELS.items() if value},
                spacing_mm=properties["spacing"],
                nsd_tolerance_mm=1.0,
            )
        )
    _, foreground = mean_metrics(cases)
    return foreground.dsc, foreground.hd95_mm


if __name__ == "__main__":
    main()
