"""``nnunet-flare doctor``: is this site ready, and what would a round cost it? Reads only; writes nothing."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from nnunet_flare.errors import DatasetError
from nnunet_flare.nnunet.dataset import RawDataset, find_dataset
from nnunet_flare.nnunet.demo import DEMO_DATASETS
from nnunet_flare.nnunet.site import SETTINGS_FILE, SiteSettings
from nnunet_flare.report.table import MAX_WIDTH
from nnunet_flare.report.traffic import layer_bytes

__all__ = ["FAIL", "OK", "WARN", "Check", "diagnose", "doctor_text", "exit_status", "versions"]

OK, WARN, FAIL = "ok", "warn", "fail"
_DISTRIBUTION = "nnunet-flare"
_PLANNER_GPU_GB = 8.0  # nnU-Net's ExperimentPlanner, gpu_memory_target_in_gb
_PREPROCESSED_PER_RAW = 4  # compressed 16-bit images become compressed 32-bit images at the planned spacing
_CHECKPOINT_BYTES = 2e9  # two rounds' weights and momentum, and the exported model, of a full-size network
_SCARCE_BYTES = 0.5e9
_DEVICE_PROBE = """
import json, torch
cuda = torch.cuda.is_available()
free, total = torch.cuda.mem_get_info() if cuda else (0, 0)
print(json.dumps({"cuda": cuda, "mps": torch.backends.mps.is_available(), "free": free, "total": total,
                  "name": torch.cuda.get_device_name() if cuda else ""}))
"""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One finding: what was looked at, ``ok``, ``warn`` or ``fail``, what was seen, what to do about it."""

    name: str
    status: str
    seen: str
    remedy: str = ""


def diagnose(settings: SiteSettings) -> list[Check]:
    """All checks of a site; a data set that neither the settings nor the caller name is not looked for."""
    checks = [*versions(), *_folders(settings)]
    raw_dataset, check = _dataset(settings)
    checks.append(check)
    checks.append(_disk(settings, raw_dataset))
    checks += _device(settings)
    checks.append(_traffic(settings, raw_dataset))
    return checks


def exit_status(checks: Sequence[Check]) -> int:
    """0 if nothing failed; warnings pass."""
    return int(any(check.status == FAIL for check in checks))


def doctor_text(checks: Sequence[Check]) -> str:
    """One line a check, its remedy below where it needs one, and the verdict."""
    width = max(len(check.name) for check in checks)
    margin = " " * (width + 8)
    lines = []
    for check in checks:
        start = f"{check.status:<4}  {check.name:<{width}}  "
        lines.append(textwrap.fill(check.seen, MAX_WIDTH, initial_indent=start, subsequent_indent=margin))
        if check.remedy:
            lines.append(textwrap.fill(check.remedy, MAX_WIDTH, initial_indent=margin, subsequent_indent=margin))
    counts = {status: sum(check.status == status for check in checks) for status in (FAIL, WARN)}
    verdict = "not ready" if counts[FAIL] else "ready"
    return "\n".join([*lines, "", f"{verdict}: {counts[FAIL]} failed, {counts[WARN]} warnings"])


def versions() -> Iterator[Check]:
    """The installed packages against the ranges that this distribution was built with."""
    distribution = metadata.metadata(_DISTRIBUTION)
    yield _version("python", platform.python_version(), SpecifierSet(distribution["Requires-Python"]))
    for requirement in map(Requirement, metadata.requires(_DISTRIBUTION) or []):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            installed = ""
        yield _version(requirement.name, installed, requirement.specifier)


def _version(name: str, installed: str, supported: SpecifierSet) -> Check:
    fits = bool(installed) and supported.contains(installed, prereleases=True)
    wanted = f"{name}{supported}"
    return Check(
        name=name,
        status=OK if fits else FAIL,
        seen=f"{installed or 'not installed'}{f', supported {supported}' if supported else ''}",
        remedy="" if fits else f"install {wanted}, from the constraints file of the consortium where there is one",
    )


def _folders(settings: SiteSettings) -> Iterator[Check]:
    raw = settings.raw_root
    if not _is_demo(settings):
        readable = raw.is_dir() and os.access(raw, os.R_OK | os.X_OK)
        yield Check(
            name="raw data folder",
            status=OK if readable else FAIL,
            seen=str(raw) if readable else f"no readable folder {raw}",
            remedy="" if readable else f"set nnunet_raw in {SETTINGS_FILE}, or the variable nnUNet_raw",
        )
    for name, folder in (("state folder", settings.folder), ("preprocessed folder", settings.preprocessed_root)):
        existing = _existing(folder)
        writable = existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
        yield Check(
            name=name,
            status=OK if writable else FAIL,
            seen=str(folder) if writable else f"cannot write to {existing}",
            remedy="" if writable else "give this user the right to write there, or name another folder",
        )


def _dataset(settings: SiteSettings) -> tuple[Path | None, Check]:
    """The folder of the data set, where it is sound, and the check."""

    def check(status: str, seen: str, remedy: str = "") -> Check:
        return Check(name="data set", status=status, seen=seen, remedy=remedy)

    if _is_demo(settings):
        return None, check(OK, "demo: generated at the first run")
    if settings.dataset is None:
        remedy = f"name it in the command, or set dataset in {SETTINGS_FILE}, to have it checked"
        return None, check(WARN, "not checked: a job will name it", remedy)
    try:
        folder = find_dataset(settings.raw_root, settings.dataset)
        dataset = RawDataset.read(folder)
    except DatasetError as error:
        seen = f"{error.field}: expected {error.expected}, found {error.found}"
        return None, check(FAIL, f"{seen}; {error.local_detail}" if error.local_detail else seen, error.remedy)
    schema = dataset.schema
    channels, labels = ", ".join(schema.channel_names.values()), ", ".join(schema.labels)
    seen = f"{folder.name}: {len(dataset.cases)} cases, channels {channels}, labels {labels}, {schema.file_ending}"
    if len(dataset.cases) < 5:
        return folder, check(WARN, seen, "fewer than 5 cases cannot be split into 5 folds: bring splits_final.json")
    return folder, check(OK, seen)


def _disk(settings: SiteSettings, raw_dataset: Path | None) -> Check:
    """Free space for what the site will write; one file system that holds both folders must hold both shares."""
    raw_bytes = _size(raw_dataset) if raw_dataset else 0
    needed: dict[int, float] = {}
    free: dict[int, float] = {}
    for folder, share in (
        (settings.folder, _CHECKPOINT_BYTES + raw_bytes),
        (settings.preprocessed_root, _PREPROCESSED_PER_RAW * raw_bytes),
    ):
        existing = _existing(folder)
        device = existing.stat().st_dev
        needed[device] = needed.get(device, 0) + share
        free[device] = shutil.disk_usage(existing).free
    tightest = min(free, key=lambda device: free[device] - needed[device])
    seen = f"{_gb(free[tightest])} free, about {_gb(needed[tightest])} needed"
    if raw_dataset:
        seen += f" for {_gb(raw_bytes)} of raw data"
    status = FAIL if free[tightest] < _SCARCE_BYTES else WARN if free[tightest] < needed[tightest] else OK
    remedy = "" if status == OK else f"free space, or move home or nnunet_preprocessed in {SETTINGS_FILE}"
    return Check(name="disk", status=status, seen=seen, remedy=remedy)


def _device(settings: SiteSettings) -> list[Check]:
    """Does torch see the device that the settings ask for, and does the planner's target fit into its memory?"""
    try:
        found = _probe_device()
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        reason = str(getattr(error, "stderr", "") or error).strip().splitlines()[-1]
        return [Check(name="device", status=FAIL, seen=f"torch does not start: {reason}", remedy="reinstall torch")]
    device = settings.device
    if device == "auto":
        device = "cuda" if found["cuda"] else "cpu"
    if device in ("cuda", "mps") and not found[device]:
        remedy = f"install a torch build and a driver for it, or set device in {SETTINGS_FILE}"
        return [Check(name="device", status=FAIL, seen=f"torch sees no {device} device", remedy=remedy)]
    if device == "cpu":
        remedy = "a GPU is what nnU-Net is made for; on a CPU train small patches and batches, or the demo"
        return [Check(name="device", status=WARN, seen=f"cpu, {os.cpu_count()} cores", remedy=remedy)]
    if device == "mps":
        return [Check(name="device", status=OK, seen="mps")]
    target = (settings.gpu_memory_gb or _PLANNER_GPU_GB) * 1e9
    memory = f"{_gb(found['free'])} of {_gb(found['total'])} free, the planner's target is {_gb(target)}"
    status = FAIL if found["total"] < target else WARN if found["free"] < target else OK
    remedies = {
        FAIL: f"set gpu_memory_gb in {SETTINGS_FILE} to what the GPU has; for jobs/ffe at all sites alike",
        WARN: "other processes hold GPU memory: end them before the run",
    }
    return [
        Check(name="device", status=OK, seen=f"cuda, {found['name']}"),
        Check(name="GPU memory", status=status, seen=memory, remedy=remedies.get(status, "")),
    ]


def _probe_device() -> dict[str, Any]:
    """Ask torch in a process of its own: a broken driver then takes nothing with it."""
    command = [sys.executable, "-c", _DEVICE_PROBE]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return dict(json.loads(result.stdout.splitlines()[-1]))


def _traffic(settings: SiteSettings, raw_dataset: Path | None) -> Check:
    """What a round moves, from the plans that were last preprocessed for."""
    name = raw_dataset.name if raw_dataset else "*"
    marks = sorted(settings.preprocessed_root.glob(f"*/{name}/*.complete"), key=lambda mark: mark.stat().st_mtime)
    if not marks:
        return Check(name="traffic", status=OK, seen="known after the first planning")
    try:
        configuration, num_bytes = layer_bytes(marks[-1])
    except Exception as error:  # plans name classes freely: building a network from them can fail in any way
        remedy = "plan and preprocess again with this version"
        return Check(name="traffic", status=WARN, seen=f"unusable plans: {type(error).__name__}", remedy=remedy)
    seen = (
        f"{configuration}: {num_bytes / 4e6:.1f} million parameters, at most {num_bytes / 1e6:.1f} MB up and as much "
        "down per round, half of it with wire_dtype float16"
    )
    return Check(name="traffic", status=OK, seen=seen)


def _is_demo(settings: SiteSettings) -> bool:
    return settings.dataset in DEMO_DATASETS


def _existing(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    return next(parent for parent in (folder, *folder.parents) if parent.exists())


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB"
