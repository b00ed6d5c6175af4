"""Does planning from merged summaries equal planning from the pooled data set?

    python benchmarks/ffe_equality.py [--partitions 100] [--images DIR --labels DIR]

The reference is plain nnU-Net, its own extractor and its own planner, on the pooled cases. Each case is analysed once,
with the number of draws that nnU-Net takes from it in the pooled data set; the summaries are then dealt out to sites at
random. The published way of merging (averages over sites, weighted by cases, of standard deviation, median,
percentiles and median relative size) is computed from the same sites.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK

from nnunet_flare.fingerprint.summary import FingerprintSummary, merge_summaries
from nnunet_flare.nnunet.extract import extract_cases
from nnunet_flare.nnunet.plans import plan

DATASET = "Dataset001_Pooled"
INTENSITIES = "foreground_intensity_properties_per_channel"
RELATIVE_SIZE = "median_relative_size_after_cropping"
PERCENTILES = ("percentile_00_5", "median", "percentile_99_5")
MOMENT_TOLERANCE = 1e-5  # nnU-Net takes mean and std of up to 1e8 draws in float32
PERCENTILE_TOLERANCE = 1.01e-3

Plans = dict[str, Any]


def main() -> None:
    arguments = parse_arguments()
    rng = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as scratch:
        raw = Path(scratch, "raw", DATASET)
        if arguments.images:
            copy_real_cases(raw, arguments)
        else:
            write_synthetic_cases(raw, arguments.cases, np.random.default_rng(arguments.seed))
        start = time.perf_counter()
        pooled, reference = plan_with_plain_nnunet(raw, Path(scratch, "preprocessed"), arguments.foreground_voxels)
        num_cases = len(pooled["spacings"])
        summaries = [s for _, s in extract_cases(raw, num_draws=arguments.foreground_voxels // num_cases)]
        planned: dict[str, Plans] = {}

        def plan_cached(fingerprint: Mapping[str, Any]) -> Plans:
            key = json.dumps(fingerprint, sort_keys=True)
            if key not in planned:
                planned[key] = plan(raw, fingerprint, num_training=num_cases, configuration="2d", overrides={})
            return planned[key]

        partitions = [deal(summaries, rng) for _ in range(arguments.partitions)]
        ours = [plan_cached(merge_summaries(map(merge_summaries, sites)).to_nnunet()) for sites in partitions]
        num_plans = len(planned)
        theirs = [plan_cached(average_as_published(sites)) for sites in partitions]
        print_table(reference, ours, theirs)
        print(f"\n{num_cases} cases in 2 to 6 sites; {arguments.foreground_voxels} draws; seed {arguments.seed};")
        print(f"{num_plans} distinct fingerprint(s) from merged summaries; {time.perf_counter() - start:.0f} s")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--partitions", type=int, default=100)
    parser.add_argument("--cases", type=int, default=40, help="synthetic cases, or the largest number of real ones")
    parser.add_argument("--images", type=Path, help="folder of real images, one channel")
    parser.add_argument("--labels", type=Path, help="folder of their label maps, with the same names")
    parser.add_argument("--channel", default="MRI", help="channel name of the real images; CT: normalised by the pool")
    parser.add_argument("--foreground-voxels", type=int, default=100_000_000, help="drawn in all; nnU-Net's own: 1e8")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if (arguments.images is None) != (arguments.labels is None):
        parser.error("--images and --labels go together")
    return arguments


def describe(raw: Path, channel_names: Sequence[str], num_labels: int, num_cases: int) -> None:
    labels = {"background": 0} | {f"label {value}": value for value in range(1, num_labels)}
    description = {
        "channel_names": dict(enumerate(channel_names)),
        "labels": labels,
        "numTraining": num_cases,
        "file_ending": ".nii.gz",
    }
    (raw / "dataset.json").write_text(json.dumps(description))


def copy_real_cases(raw: Path, arguments: argparse.Namespace) -> None:
    labels = sorted(arguments.labels.glob("*.nii.gz"))[: arguments.cases]
    for folder in ("imagesTr", "labelsTr"):
        (raw / folder).mkdir(parents=True)
    highest = 0
    for label in labels:
        name = label.name.removesuffix(".nii.gz")
        (raw / "labelsTr" / label.name).symlink_to(label.absolute())
        (raw / "imagesTr" / f"{name}_0000.nii.gz").symlink_to((arguments.images / label.name).absolute())
        highest = max(highest, int(SimpleITK.GetArrayViewFromImage(SimpleITK.ReadImage(str(label))).max()))
    describe(raw, [arguments.channel], highest + 1, len(labels))


def write_synthetic_cases(raw: Path, num_cases: int, rng: np.random.Generator) -> None:
    """CT and PET of unlike scanners: spacings, shapes, intensities and empty margins all vary from case to case."""
    for folder in ("imagesTr", "labelsTr"):
        (raw / folder).mkdir(parents=True)
    for index in range(num_cases):
        shape = rng.integers((20, 48, 48), (48, 80, 80))
        spacing_mm = (float(rng.choice([1.0, 2.5, 4.0])), *[float(rng.choice([0.7, 0.8, 1.0]))] * 2)
        grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
        distance = np.linalg.norm(grid - rng.uniform(-0.2, 0.2, (3, 1, 1, 1)), axis=0)
        label = ((distance < rng.uniform(0.3, 0.6)) & (index % 13 > 0)).astype(np.uint8)
        body = (np.abs(grid) < rng.uniform(0.8, 1.05)).all(axis=0)
        means = {"0000": rng.normal(60, 40), "0001": rng.lognormal(1, 0.5)}
        for channel, mean in means.items():
            noise = rng.normal(0, abs(mean) * rng.uniform(0.1, 1), tuple(shape))
            voxels = np.where(body, mean * (1 + label) + noise, 0)
            image = np.round(voxels).astype(np.int16) if channel == "0000" else voxels.astype(np.float32)
            write_image(raw / "imagesTr" / f"case{index:03d}_{channel}.nii.gz", image, spacing_mm)
        write_image(raw / "labelsTr" / f"case{index:03d}.nii.gz", label, spacing_mm)
    describe(raw, ["CT", "PET"], 2, num_cases)


def write_image(file: Path, array: np.ndarray, spacing_mm: Sequence[float]) -> None:
    image = SimpleITK.GetImageFromArray(array)
    image.SetSpacing(spacing_mm[::-1])
    SimpleITK.WriteImage(image, str(file))


def plan_with_plain_nnunet(raw: Path, preprocessed: Path, num_voxels: int) -> tuple[dict[str, Any], Plans]:
    """Fingerprint and plans files as nnU-Net's own extractor and planner leave them."""
    os.environ |= {"nnUNet_raw": str(raw.parent), "nnUNet_preprocessed": str(preprocessed)}
    from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
    from nnunetv2.experiment_planning.plan_and_preprocess_api import plan_experiment_dataset

    with contextlib.redirect_stdout(io.StringIO()):
        extractor = DatasetFingerprintExtractor(raw.name, num_processes=2)
        extractor.num_foreground_voxels_for_intensitystats, extractor.show_progress_bar = num_voxels, False
        extractor.run()
        _, identifier = plan_experiment_dataset(raw.name)
    files = ("dataset_fingerprint.json", f"{identifier}.json")
    fingerprint, plans = (json.loads((preprocessed / raw.name / file).read_text()) for file in files)
    return fingerprint, plans


def deal(summaries: Sequence[FingerprintSummary], rng: random.Random) -> list[list[FingerprintSummary]]:
    """Deal the cases out to 2 to 6 sites of random sizes, each with a case that has foreground."""
    while True:
        sites: list[list[FingerprintSummary]] = [[] for _ in range(rng.randint(2, 6))]
        weights = [rng.random() for _ in sites]
        for summary in summaries:
            rng.choices(sites, weights)[0].append(summary)
        if all(any(summary.channels[0].num_cases for summary in site) for site in sites):
            return sites


def average_as_published(sites: Sequence[Sequence[FingerprintSummary]]) -> dict[str, Any]:
    """Concatenate shapes and spacings; average all other statistics, weighted by cases (extremes: of all)."""
    fingerprints = [merge_summaries(site).to_nnunet() for site in sites]
    weights = [len(site) for site in sites]

    def average(select: Callable[[Mapping[str, Any]], float]) -> float:
        return float(np.average([select(fingerprint) for fingerprint in fingerprints], weights=weights))

    merged: dict[str, Any] = merge_summaries(map(merge_summaries, sites)).to_nnunet()
    merged[RELATIVE_SIZE] = average(lambda fingerprint: fingerprint[RELATIVE_SIZE])
    for channel, statistics in merged[INTENSITIES].items():
        for name in ("mean", "std", *PERCENTILES):
            statistics[name] = average(lambda fingerprint, c=channel, n=name: fingerprint[INTENSITIES][c][n])
    return merged


def print_table(reference: Plans, ours: Sequence[Plans], theirs: Sequence[Plans]) -> None:
    print(f"{'':64}{'merged summaries':>18}{'as published':>15}")

    def row(title: str, measure: Callable[[Plans], bool | float]) -> None:
        cells = []
        for results in (ours, theirs):
            values = [measure(plans) for plans in results]
            cells.append(f"{sum(values)} of {len(values)}" if type(values[0]) is bool else f"{max(values):.1e}")
        print(f"{title:64}{cells[0]:>18}{cells[1]:>15}")

    def worst(names: Sequence[str]) -> Callable[[Plans], float]:
        return lambda plans: max(error for name, error in relative_errors(plans, reference) if name in names)

    def structure_equal(plans: Plans) -> bool:
        return without_intensities(plans) == without_intensities(reference)

    def equal(plans: Plans) -> bool:
        moments, extremes = worst(("mean", "std"))(plans), worst(("min", "max"))(plans)
        return structure_equal(plans) and moments <= MOMENT_TOLERANCE and extremes == 0

    row("equal plan (every key but dataset_name and percentiles)", equal)
    row("  of these: keys that are no intensities, to the last bit", structure_equal)
    row(
        f"  percentiles within {PERCENTILE_TOLERANCE:.1e}",
        lambda plans: worst(PERCENTILES)(plans) <= PERCENTILE_TOLERANCE,
    )
    row("worst relative error of mean", worst(["mean"]))
    row("worst relative error of std", worst(["std"]))
    row("worst relative error of minimum and maximum", worst(["min", "max"]))
    for name in PERCENTILES:
        row(f"worst relative error of {name}", worst([name]))
    print(f"\nmean and std count as equal within {MOMENT_TOLERANCE:.0e}: nnU-Net sums its draws in float32.")


def relative_errors(plans: Plans, reference: Plans) -> Iterator[tuple[str, float]]:
    for channel, expected in reference[INTENSITIES].items():
        for name, value in expected.items():
            error = abs(plans[INTENSITIES][channel][name] - value)
            yield name, error / abs(value) if error else 0.0


def without_intensities(plans: Plans) -> Plans:
    return {key: value for key, value in plans.items() if key not in (INTENSITIES, "dataset_name")}


if __name__ == "__main__":
    main()
