"""NIfTI files that break off: SimpleITK fills what is missing with zeros, without a word."""

from __future__ import annotations

import gzip
import math
from pathlib import Path

import nibabel
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

__all__ = ["check_complete"]


def check_complete(file: Path) -> None:
    """Hold the length of a NIfTI file, decompressed, against its header; other formats and odd headers pass.

    Raises:
        EOFError: the file is shorter.
        OSError: the file cannot be read, or its checksum is wrong.
        zlib.error: the compressed data are damaged.
    """
    if not file.name.endswith((".nii", ".nii.gz")):
        return
    try:
        voxels = nibabel.load(file).dataobj
    except (ImageFileError, HeaderDataError):  # nnU-Net's reader decides
        return
    expected = voxels.offset + math.prod(voxels.shape) * voxels.dtype.itemsize
    if file.suffix == ".gz":
        with gzip.open(file) as stream:
            found = sum(map(len, iter(lambda: stream.read(1 << 24), b"")))
    else:
        found = file.stat().st_size
    if found < expected:
        raise EOFError(f"{found} of {expected} bytes")
