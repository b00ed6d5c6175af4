"""The generated data sets, and the scanner that each site has in them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

__all__ = ["DEMO_DATASETS", "DemoDataset", "Scanner", "site_seed"]


@dataclass(frozen=True, kw_only=True)
class Scanner:
    """How a site's images look. Intensities are relative to fat; blood and myocardium make the contrast.

    Args:
        spacing_mm: Voxel size in plane.
        slice_mm: Distance of slices.
        field_of_view_mm: Edge of a slice.
        blood: Intensity of the blood pool.
        myocardium: Intensity of the heart muscle.
        noise_stddev: Standard deviation of both channels of the Rician noise, relative to fat.
        shading: Amplitude of the smooth bias field's logarithm.
        gain: Grey values per unit of intensity.
    """

    spacing_mm: float
    slice_mm: float
    field_of_view_mm: float = 94.0
    blood: float
    myocardium: float
    noise_stddev: float
    shading: float
    gain: float


@dataclass(frozen=True, kw_only=True)
class DemoDataset:
    """A generated data set: scanners by site, and the ranges from which a further site's voxels are drawn.

    Args:
        folder: nnU-Net's name of the data set.
        dimension: 3 for MRI volumes, 2 for ultrasound-like images.
        scanners: Site -> its scanner.
        spacing_mm: Range of voxel sizes in plane.
        slice_mm: Range of distances of slices.
        field_of_view_mm: Range of fields of view.
    """

    folder: str
    dimension: int
    scanners: Mapping[str, Scanner]
    spacing_mm: tuple[float, float] = (1.75, 2.25)
    slice_mm: tuple[float, float] = (8.0, 10.0)
    field_of_view_mm: tuple[float, float] = (94.0, 94.0)

    def scanner(self, site: str) -> Scanner:
        """The scanner of ``site``; one that is not in the table is drawn from the site's name."""
        if site in self.scanners:
            return self.scanners[site]
        draw = np.random.default_rng(site_seed(site)).uniform
        return Scanner(
            spacing_mm=round(draw(*self.spacing_mm), 2),
            slice_mm=round(draw(*self.slice_mm), 1),
            blood=draw(0.75, 1.05),
            myocardium=draw(0.25, 0.42),
            noise_stddev=draw(0.03, 0.09),
            shading=draw(0.1, 0.5),
            gain=draw(150.0, 900.0),
            field_of_view_mm=round(draw(*self.field_of_view_mm), 1),
        )


def site_seed(site: str) -> int:
    """The same number for a name on every machine."""
    return int.from_bytes(hashlib.sha256(site.encode()).digest()[:8])


_ALIKE = {
    "site-1": Scanner(
        spacing_mm=2.0, slice_mm=10.0, blood=0.95, myocardium=0.3, noise_stddev=0.03, shading=0.1, gain=300.0
    ),
    "site-2": Scanner(
        spacing_mm=2.2, slice_mm=9.0, blood=0.75, myocardium=0.4, noise_stddev=0.07, shading=0.25, gain=160.0
    ),
    "site-3": Scanner(
        spacing_mm=1.8, slice_mm=8.0, blood=1.05, myocardium=0.25, noise_stddev=0.05, shading=0.5, gain=800.0
    ),
}
_UNLIKE = {
    "site-1": replace(_ALIKE["site-1"], spacing_mm=2.6, slice_mm=9.5, field_of_view_mm=104.0),
    "site-2": replace(_ALIKE["site-2"], spacing_mm=3.5, slice_mm=7.5, field_of_view_mm=98.0),
    "site-3": replace(_ALIKE["site-3"], spacing_mm=4.0, slice_mm=5.5, field_of_view_mm=96.0),
}

DEMO_DATASETS = {
    "demo": DemoDataset(folder="Dataset900_Demo", dimension=3, scanners=_ALIKE),
    "demo_2d": DemoDataset(folder="Dataset901_DemoUltrasound", dimension=2, scanners=_ALIKE),
    # nnU-Net plans another network for each of the three sites; they agree in the coarse layers
    "demo_mixed": DemoDataset(
        folder="Dataset902_DemoMixed",
        dimension=3,
        scanners=_UNLIKE,
        spacing_mm=(2.5, 4.0),
        slice_mm=(5.0, 10.0),
        field_of_view_mm=(96.0, 106.0),
    ),
}
