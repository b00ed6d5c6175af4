"""Synthetic multi-centre short-axis cardiac phantoms, for a demo without patients.

Each site has a scanner of its own: voxel size, tissue contrast, noise and shading differ as between hospitals,
while every heart is drawn from one population. Labels are those of the ACDC challenge: RV, MYO and LV.
Data depend on nothing but the names of the site and of the data set.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import SimpleITK
from scipy import ndimage

from nnunet_flare.errors import DatasetError
from nnunet_flare.nnunet.demo import DEMO_DATASETS, DemoDataset, Scanner, site_seed
from nnunet_flare.nnunet.schema import DATASET_FILE, DatasetSchema, dataset_json

__all__ = ["LABELS", "write_demo_dataset"]

LABELS = {"background": 0, "RV": 1, "MYO": 2, "LV": 3}
SUPERSAMPLING = 3  # in-plane sub-voxels per axis: partial volume at tissue borders


@dataclass(frozen=True, kw_only=True)
class Heart:
    """One patient's heart; lengths in mm, angles in radians, positions relative to the middle of the image."""

    centre_mm: tuple[float, float]
    drift_mm: tuple[float, float]  # of the centre, from base to apex
    cavity_mm: float  # radius of the left ventricle at the base
    wall_mm: float
    septum_angle: float  # direction from the left to the right ventricle
    ovalness: float
    rv_width_mm: float
    rv_height_mm: float
    length_mm: float

    @classmethod
    def draw(cls, generator: np.random.Generator) -> Heart:
        uniform, normal = generator.uniform, generator.normal
        return cls(
            centre_mm=(normal(9.0, 2.5), normal(4.0, 2.5)),
            drift_mm=(normal(5.0, 2.0), normal(-1.0, 2.0)),
            cavity_mm=uniform(16.0, 23.0),
            wall_mm=uniform(7.0, 11.0),
            septum_angle=np.pi + normal(0.5, 0.15),
            ovalness=uniform(0.02, 0.1),
            rv_width_mm=uniform(24.0, 31.0),
            rv_height_mm=uniform(27.0, 34.0),
            length_mm=uniform(78.0, 92.0),
        )

    def regions(self, x: np.ndarray, y: np.ndarray, depth: np.ndarray) -> dict[str, np.ndarray]:
        """Masks of the ventricles and of what surrounds them, at positions in mm and depth 0 (base) to 1 (apex)."""
        x = x - self.centre_mm[0] - self.drift_mm[0] * (depth - 0.3)
        y = y - self.centre_mm[1] - self.drift_mm[1] * (depth - 0.3)
        angle = np.arctan2(y, x) - self.septum_angle
        radius = np.hypot(x, y) * (1 + self.ovalness * np.cos(2 * angle + 0.6) + 0.03 * np.cos(3 * angle))
        along, across = np.hypot(x, y) * np.cos(angle), np.hypot(x, y) * np.sin(angle)
        inner = self.cavity_mm * _taper(depth / 0.93)
        outer = (self.cavity_mm + self.wall_mm) * _taper(depth / 1.07)
        size = _taper(depth / 0.88)
        bulge = (along - 0.62 * outer) / (self.rv_width_mm * size + 1e-6)
        # the free wall follows the septum: a crescent, not an ellipse
        crescent = np.hypot(bulge, (across + 2.0) / (self.rv_height_mm * size + 1e-6) * (1 + 0.15 * bulge))
        fat_mm = 2.5 + 2.5 * np.cos(2 * angle + 1.2)
        in_heart = (radius < outer) | (crescent < 1 + 3.0 / self.rv_width_mm)
        papillary = [np.hypot(along - a * inner, across - b * inner) < 3.2 for a, b in ((-0.35, 0.55), (-0.4, -0.5))]
        return {
            "fat": (radius < outer + fat_mm) | (crescent < 1 + (3.0 + fat_mm) / self.rv_width_mm),
            "muscle": in_heart,
            "RV": (crescent < 1) & (radius >= outer) & (depth < 0.88),
            "MYO": (radius < outer) & (radius >= inner),
            "LV": radius < inner,
            "papillary": (papillary[0] | papillary[1]) & (radius < inner) & (np.abs(depth - 0.5) < 0.25),
        }


def write_demo_dataset(raw_root: Path, site: str, *, num_cases: int = 8, dataset: str = "demo") -> Path:
    """Write a site's phantoms in nnU-Net's raw format, unless they are there, and return the data set's folder.

    Args:
        raw_root: nnU-Net's raw data folder of this one site.
        site: Name of the site; decides the scanner and the hearts.
        num_cases: Number of phantoms.
        dataset: A key of ``DEMO_DATASETS``; volumes are ``.nii.gz``, images ``.png``.

    Raises:
        DatasetError: the folder holds phantoms of another site, or another number of them.
    """
    demo = DEMO_DATASETS[dataset]
    folder = raw_root / demo.folder
    origin = {"site": site, "num_cases": num_cases}
    if not folder.exists():
        raw_root.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=raw_root, prefix=".") as scratch:
            _write(Path(scratch, folder.name), site, num_cases, demo, origin)
            try:
                Path(scratch, folder.name).rename(folder)
            except OSError:  # another process of this site was faster
                if not folder.exists():
                    raise
    found = json.loads((folder / DATASET_FILE).read_text()).get("phantoms")
    if found != origin:
        raise DatasetError(
            field=folder.name,
            expected=f"{num_cases} phantoms of {site}",
            found=repr(found),
            remedy="remove this data set, and give each site a raw data folder of its own",
            site=site,
        )
    return folder


def _write(folder: Path, site: str, num_cases: int, demo: DemoDataset, origin: dict[str, object]) -> None:
    kinds = {3: (_render_mri, ".nii.gz", "MRI"), 2: (_render_ultrasound, ".png", "US")}
    render, ending, channel = kinds[demo.dimension]
    for sub_folder in ("imagesTr", "labelsTr"):
        (folder / sub_folder).mkdir(parents=True)
    for index in range(num_cases):
        image, label = render(demo.scanner(site), np.random.default_rng([site_seed(site), demo.dimension, index]))
        SimpleITK.WriteImage(image, folder / "imagesTr" / f"phantom_{index:03d}_0000{ending}")
        SimpleITK.WriteImage(label, folder / "labelsTr" / f"phantom_{index:03d}{ending}")
    schema = DatasetSchema(channel_names={0: channel}, labels=LABELS, file_ending=ending, num_training=num_cases)
    document = dataset_json(schema, num_cases) | {"phantoms": origin}
    (folder / DATASET_FILE).write_text(json.dumps(document, indent=2))


def _render_mri(scanner: Scanner, generator: np.random.Generator) -> tuple[SimpleITK.Image, SimpleITK.Image]:
    """A stack of bright-blood cine slices from base to apex, and its label map."""
    heart = Heart.draw(generator)
    num_slices = max(9, round(heart.length_mm / scanner.slice_mm))
    size = round(scanner.field_of_view_mm / scanner.spacing_mm)
    fine = (np.arange(size * SUPERSAMPLING) + 0.5) / SUPERSAMPLING - size / 2
    depth = (np.arange(num_slices)[:, None, None] + 0.5) / num_slices
    y, x = fine[None, :, None] * scanner.spacing_mm, fine[None, None, :] * scanner.spacing_mm
    regions = heart.regions(x, y, depth)
    chest = np.hypot(x - 5.0, 0.8 * (y - 40.0))
    wall_mm = generator.normal(62.0, 2.0)
    aorta = np.hypot(x - generator.normal(34.0, 2.0), y - generator.normal(40.0, 2.0)) < 9.0
    layers = [
        (chest > -1, 0.1),  # lung
        (np.hypot(x + 45.0, y - 60.0 + 15.0 * (1 - depth)) < 48.0, 0.45),  # liver
        (np.hypot(x - 2.0, y - 62.0) < 22.0, 0.35),  # spine
        (aorta, scanner.blood),
        (chest > wall_mm, 0.3),  # muscle of the chest wall
        (chest > wall_mm + 5.0, 1.0),  # fat below the skin
        (regions["fat"], 0.8),
        (regions["muscle"], scanner.myocardium),
        (regions["RV"], 0.93 * scanner.blood),
        (regions["MYO"], scanner.myocardium),
        (regions["LV"], scanner.blood),
        (regions["papillary"], 1.2 * scanner.myocardium),
    ]
    tissue = _paint(layers)
    image = tissue.reshape(num_slices, size, SUPERSAMPLING, size, SUPERSAMPLING).mean(axis=(2, 4))
    image *= 1 + 0.12 * _smooth_field(generator, image.shape, (0.5, 2.0, 2.0))
    image *= np.exp(scanner.shading * _smooth_field(generator, image.shape, (num_slices, size / 3, size / 3)))
    noise = generator.normal(0.0, scanner.noise_stddev, (2, *image.shape))
    image = scanner.gain * np.hypot(image + noise[0], noise[1])
    voxel_mm = (scanner.spacing_mm, scanner.spacing_mm, scanner.slice_mm)
    middle = slice(SUPERSAMPLING // 2, None, SUPERSAMPLING)
    return _itk(image.astype(np.int16), voxel_mm), _itk(_label_map(regions)[:, middle, middle], voxel_mm)


def _render_ultrasound(scanner: Scanner, generator: np.random.Generator) -> tuple[SimpleITK.Image, SimpleITK.Image]:
    """A parasternal short-axis view: the transducer at the top, speckle that widens with depth, a sector."""
    size = 96
    pixel_mm = 0.6 * scanner.spacing_mm
    y, x = np.meshgrid(np.arange(size) * pixel_mm, (np.arange(size) - size / 2) * pixel_mm, indexing="ij")
    heart = Heart.draw(generator)
    regions = heart.regions(x, y - 0.55 * size * pixel_mm, np.full_like(x, generator.uniform(0.2, 0.6)))
    range_mm, angle = np.hypot(x, y + 8.0), np.arctan2(x, y + 8.0)
    sector = (np.abs(angle) < 0.65 + 0.1 * scanner.shading) & (range_mm > 12.0) & (range_mm < size * pixel_mm)
    tissue = _paint(
        [
            (sector, 0.1),
            (regions["fat"], 0.9),  # the pericardium reflects
            (regions["muscle"], scanner.myocardium),
            (regions["RV"], 0.02),
            (regions["MYO"], scanner.myocardium),
            (regions["LV"], 0.01),
            (regions["papillary"], scanner.myocardium),
        ]
    )
    # speckle is Gaussian in the transducer's own coordinates: 256 depths x 128 beams
    beams = ndimage.gaussian_filter(generator.normal(size=(2, 256, 128)), (0, 1.0, 1.5))
    where = [255 * range_mm / range_mm.max(), 127 * (angle / 1.8 + 0.5)]
    speckle = np.hypot(*(ndimage.map_coordinates(beam / beam.std(), where, order=1, mode="nearest") for beam in beams))
    shading = np.exp(scanner.shading * _smooth_field(generator, tissue.shape, (size / 4, size / 4)))
    echo = ndimage.gaussian_filter(tissue, 0.7) * speckle * shading + 0.3 * scanner.noise_stddev
    image = np.where(sector, 255 * np.clip(1 + np.log10(echo + 1e-3) / 1.8, 0, 1), 0)
    label = np.where(sector, _label_map(regions), 0)
    return SimpleITK.GetImageFromArray(image.astype(np.uint8)), SimpleITK.GetImageFromArray(label.astype(np.uint8))


def _paint(layers: list[tuple[np.ndarray, float]]) -> np.ndarray:
    """Intensities where each layer covers the ones before it."""
    image = np.zeros(np.broadcast_shapes(*(mask.shape for mask, _ in layers)))
    for mask, intensity in layers:
        np.copyto(image, intensity, where=mask)
    return image


def _label_map(regions: dict[str, np.ndarray]) -> np.ndarray:
    return sum(value * regions[name] for name, value in LABELS.items() if value).astype(np.uint8)


def _smooth_field(generator: np.random.Generator, shape: tuple[int, ...], width: tuple[float, ...]) -> np.ndarray:
    """A random field of mean 0 and standard deviation 1 that is smooth over ``width`` voxels."""
    field = ndimage.gaussian_filter(generator.normal(size=shape), width, mode="wrap")
    return (field - field.mean()) / field.std()


def _taper(depth: np.ndarray) -> np.ndarray:
    """Radius, relative to the base, of a ventricle that ends at depth 1."""
    return np.sqrt(np.clip(1 - depth**2.5, 0, None))


def _itk(array: np.ndarray, spacing_mm: tuple[float, ...]) -> SimpleITK.Image:
    image = SimpleITK.GetImageFromArray(array)
    image.SetSpacing(spacing_mm)
    return image
