"""Does planning from merged summaries equal planning from the pooled data set?

    python benchmarks/ffe_equality.py [--partitions 100] [--images DIR --labels DIR]

The reference is plain nnU-Net, its own extractor and its own planner, on the pooled cases. Each case is analysed once,
with the number of draws that nnU-Net takes from it in the pooled data set; the summaries are then dealt out to sites at
random. The published way of merging (averages over sites, weighted by cases, of standard deviation, median,
percentiles and median relative size) is computed from the same sites.

The third column is planned from counts on public grids, summed over the sites. A sum does not depend on the partition,
so here each partition is one of another pool, a random part of the cases, and the reference is the plan of its merged
summary.
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
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK

from nnunet_flare.fingerprint.histogram import from_counts, num_counts, to_counts
from nnunet_flare.fingerprint.summary import FingerprintSummary, merge_summaries
from nnunet_flare.nnunet.extract import extract_cases
from nnunet_flare.nnunet.network_plan import network_plan
from nnunet_flare.nnunet.plans import plan

DATASET = "Dataset001_Pooled"
INTENSITIES = "foreground_intensity_properties_per_channel"
RELATIVE_SIZE = "median_relative_size_after_cropping"
PERCENTILES = ("percentile_00_5", "median", "percentile_99_5")
MOMENT_TOLERANCE = 1e-5  # nnU-Net takes mean and std of up to 1e8 draws in float32
PERCENTILE_TOLERANCE = 1.01e-3
SPACING_TOLERANCE_MM = 5.1e-5
UNUSED_STATISTICS = ("min", "max")  # in the plans, but read by no normalization
CONFIGURATIONS = ("2d", "3d_fullres")

Plans = dict[str, Any]
PlansAndReference = tuple[Plans, Plans]


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

        def plan_cached(fingerprint: Mapping[str, Any], num_training: int = num_cases) -> Plans:
            key = json.dumps([num_training, fingerprint], sort_keys=True)
            if key not in planned:
                planned[key] = plan(raw, fingerprint, num_training=num_training, configuration="2d", overrides={})
            return planned[key]

        partitions = [deal(summaries, rng) for _ in range(arguments.partitions)]
        ours = [plan_cached(merge_summaries(map(merge_summaries, sites)).to_nnunet()) for sites in partitions]
        num_plans = len(planned)
        theirs = [plan_cached(average_as_published(sites)) for sites in partitions]
        counted = []
        for _ in partitions:
            sites = [merge_summaries(site) for site in deal(draw_pool(summaries, rng), rng)]
            pool, num_channels = merge_summaries(sites), len(sites[0].channels)
            pseudo = from_counts(np.sum([to_counts(site) for site in sites], axis=0), num_channels=num_channels)
            counted.append(
                (
                    plan_cached(pseudo.to_nnunet(), pseudo.num_training),
                    plan_cached(pool.to_nnunet(), pool.num_training),
                )
            )
        columns = {
            "merged summaries": [(plans, reference) for plans in ours],
            "as published": [(plans, reference) for plans in theirs],
            "histogram": counted,
        }
        print_table(columns)
        print_differences(counted)
        print(f"\n{num_cases} cases in 2 to 6 sites; {arguments.foreground_voxels} draws; seed {arguments.seed};")
        print(f"histogram: {num_counts(num_channels)} counts per site, pools of a half to all of the cases;")
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
        highest = max(highest, int(SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(label))).max()))
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


def draw_pool(summaries: Sequence[FingerprintSummary], rng: random.Random) -> list[FingerprintSummary]:
    return rng.sample(summaries, rng.randint(max(len(summaries) // 2, 6), len(summaries)))


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


def print_table(columns: Mapping[str, Sequence[PlansAndReference]]) -> None:
    print(" " * 64 + "".join(f"{title:>18}" for title in columns))

    def row(title: str, measure: Callable[[Plans, Plans], bool | float]) -> None:
        cells = []
        for results in columns.values():
            values = [measure(plans, reference) for plans, reference in results]
            cells.append(f"{sum(values)} of {len(values)}" if type(values[0]) is bool else f"{max(values):.1e}")
        print(f"{title:64}" + "".join(f"{cell:>18}" for cell in cells))

    def worst(names: Sequence[str]) -> Callable[[Plans, Plans], float]:
        return lambda plans, reference: max(e for name, e in relative_errors(plans, reference) if name in names)

    def structure_equal(plans: Plans, reference: Plans) -> bool:
        return without_intensities(plans) == without_intensities(reference)

    def equal(plans: Plans, reference: Plans) -> bool:
        moments, extremes = worst(("mean", "std"))(plans, reference), worst(("min", "max"))(plans, reference)
        return structure_equal(plans, reference) and moments <= MOMENT_TOLERANCE and extremes == 0

    row("equal plan (every key but dataset_name and percentiles)", equal)
    row("  of these: keys that are no intensities, to the last bit", structure_equal)
    row(
        f"  percentiles within {PERCENTILE_TOLERANCE:.1e}",
        lambda *pair: worst(PERCENTILES)(*pair) <= PERCENTILE_TOLERANCE,
    )
    for name in CONFIGURATIONS:
        row(f"equal network plan, {name}", lambda *pair, c=name: same_network(*pair, c))
        row(f"  and equal patch, batch and median size, {name}", lambda *pair, c=name: same_settings(*pair, c))
    row("worst relative error of mean", worst(["mean"]))
    row("worst relative error of std", worst(["std"]))
    row("worst relative error of minimum and maximum", worst(["min", "max"]))
    for name in PERCENTILES:
        row(f"worst relative error of {name}", worst([name]))
    print(f"\nmean and std count as equal within {MOMENT_TOLERANCE:.0e}: nnU-Net sums its draws in float32.")
    print("network plan: what sites of one network must share; equal but for minimum and maximum, which no")
    print(f"normalization reads, with spacings within {SPACING_TOLERANCE_MM:.1e} mm and intensities as above.")


def same_network(plans: Plans, reference: Plans, configuration: str) -> bool:
    if (configuration in plans["configurations"]) != (configuration in reference["configurations"]):
        return False
    if configuration not in plans["configurations"]:
        return True
    ours, theirs = (network_plan(some, configuration) for some in (plans, reference))
    return ours.keys() == theirs.keys() and all(same_value(key, ours[key], theirs[key]) for key in ours)


def same_settings(plans: Plans, reference: Plans, configuration: str) -> bool:
    ours, theirs = (dict(some["configurations"].get(configuration, {})) for some in (plans, reference))
    ours.pop("spacing", None), theirs.pop("spacing", None)
    return same_network(plans, reference, configuration) and ours == theirs


def same_value(key: str, value: Any, expected: Any) -> bool:
    name = key.rpartition(".")[2]
    if value == expected or (key.startswith(INTENSITIES) and name in UNUSED_STATISTICS):
        return True
    if key == "spacing":
        return bool(np.allclose(value, expected, rtol=0, atol=SPACING_TOLERANCE_MM))
    if key.startswith(INTENSITIES):
        tolerance = PERCENTILE_TOLERANCE if name in PERCENTILES else MOMENT_TOLERANCE
        return bool(abs(value - expected) <= tolerance * abs(expected))
    return False


def print_differences(results: Sequence[PlansAndReference]) -> None:
    """Each key in which a plan from counts differs from its reference, in how many plans and by how much."""
    differences: dict[str, list[Any]] = defaultdict(list)
    for plans, reference in results:
        ours, theirs = (dict(flatten(some)) for some in (plans, reference))
        for key in sorted(ours.keys() | theirs.keys()):
            if ours.get(key) != theirs.get(key):
                differences[key].append((ours.get(key), theirs.get(key)))
    print(f"\nkeys that differ from the plan of the pool, of {len(results)} plans from counts:")
    for key, pairs in differences.items():
        arrays = [tuple(map(np.atleast_1d, pair)) for pair in pairs]
        comparable = all(a.shape == b.shape and a.dtype.kind in "if" and b.dtype.kind in "if" for a, b in arrays)
        size = f"by up to {max(np.abs(a - b).max() for a, b in arrays):.1e}" if comparable else f"such as {pairs[0]}"
        print(f"  {key:90}{len(pairs):>4}  {size}")


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def relative_errors(plans: Plans, reference: Plans) -> Iterator[tuple[str, float]]:
    for channel, expected in reference[INTENSITIES].items():
        for name, value in expected.items():
            error = abs(plans[INTENSITIES][channel][name] - value)
            yield name, error / abs(value) if error else 0.0


def without_intensities(plans: Plans) -> Plans:
    return {key: value for key, value in plans.items() if key not in (INTENSITIES, "dataset_name")}


if __name__ == "__main__":
    main()
