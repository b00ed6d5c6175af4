"""One group's layers as one encrypted vector: how a site makes it, the server adds it, and a site reads the sum.

A vector is cut into chunks of 64 ciphertexts; a header in clear text says what it is. The first slot of each ciphertext
holds a mark, PRF(key; layout, round, site)[index], and marks add up like values: those of the sum must be those of the
sites that its header names. A server that leaves a site out, adds one twice, changes an order or takes a vector from
another round is found out so; one that adds numbers of its own is not, unless values leave their range.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnunet_flare.encryption.bfv import Adder, check_coefficients, record_bytes
from nnunet_flare.encryption.fixed_point import FixedPoint
from nnunet_flare.encryption.key import AggregationKey
from nnunet_flare.encryption.parameters import Parameters
from nnunet_flare.errors import DecryptionError, EncryptionError

__all__ = [
    "RANGES",
    "EncryptedSum",
    "EncryptedVector",
    "Quantisation",
    "VectorHeader",
    "VectorLayout",
    "decrypt_vector",
    "encrypt_vector",
]

CHUNK_CIPHERTEXTS = 64
RANGES = (4.0, 8.0)
"""What weights may be limited to; a network that nnU-Net has trained keeps far below the first."""
_HEADER = "header"


@dataclass(frozen=True, kw_only=True)
class VectorLayout:
    """What a vector holds. All sites of a group must have the same one, or their marks do not fit.

    Args:
        scope: What tells the vectors of one key apart: run, fold, group.
        shapes: Layer -> shape, in the vector's order.
        weights: Site -> its weight in the mean, for every site of the group.
        max_abs: Values beyond it are clipped; None if they are integers, which are summed and not averaged.
    """

    scope: str
    shapes: Mapping[str, tuple[int, ...]]
    weights: Mapping[str, int]
    max_abs: float | None = RANGES[0]

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> VectorLayout:
        """Raises ValueError, TypeError, KeyError: another form."""
        layout = cls(**{**values, "shapes": {name: tuple(shape) for name, shape in values["shapes"].items()}})
        numbers = [*layout.weights.values(), *(size for shape in layout.shapes.values() for size in shape)]
        if not layout.shapes or not layout.weights or layout.max_abs not in (*RANGES, None):
            raise ValueError("a layout without layers or sites, or of another range")
        if any(type(number) is not int or not 0 < number < 2**31 for number in numbers):
            raise ValueError("a layout of impossible sizes or weights")
        return layout

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    @property
    def size(self) -> int:
        return sum(map(math.prod, self.shapes.values()))

    def share(self, sites: tuple[str, ...]) -> float:
        """Of the group's weights, those of these sites; 1 where values are summed."""
        if self.max_abs is None:
            return 1.0
        return sum(self.weights[site] for site in sites) / sum(self.weights.values())

    def fixed_point(self, parameters: Parameters) -> FixedPoint:
        max_abs = float(2 ** (parameters.field_bits - 1)) if self.max_abs is None else self.max_abs
        return FixedPoint(parameters=parameters, max_abs=max_abs, num_sites=len(self.weights))

    def chunk_lengths(self, parameters: Parameters) -> list[int]:
        """Ciphertexts in each chunk."""
        number = -(-self.size // parameters.values_per_ciphertext)
        return [min(CHUNK_CIPHERTEXTS, number - start) for start in range(0, number, CHUNK_CIPHERTEXTS)]


@dataclass(frozen=True, kw_only=True)
class VectorHeader:
    """What a vector is, in clear text.

    Args:
        parameters: Id of the parameter set.
        key: Id of the key.
        layout: Digest of the layout.
        round: Counted from 0.
        sites: Whose vectors are in it, sorted.
    """

    parameters: str
    key: str
    layout: str
    round: int
    sites: tuple[str, ...]

    def check(self, expected: VectorHeader, *, site: str = "") -> None:
        """Raises EncryptionError: names the first field that differs."""
        for name, value in asdict(expected).items():
            if (found := getattr(self, name)) != value:
                raise _refusal(f"{name} of the vector", _text(value), _text(found), site)

    def label(self, site: str) -> str:
        """What the marks of one site depend on."""
        return json.dumps([self.parameters, self.key, self.layout, self.round, site])


@dataclass(frozen=True, kw_only=True)
class EncryptedVector:
    """A header and chunks: uint8 arrays of shape (ciphertexts, bytes of each)."""

    header: VectorHeader
    chunks: list[NDArray[np.uint8]]

    def to_arrays(self) -> dict[str, NDArray[np.uint8]]:
        header = np.frombuffer(json.dumps(asdict(self.header)).encode(), np.uint8)
        return {_HEADER: header, **{f"{index:05d}": chunk for index, chunk in enumerate(self.chunks)}}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Any], *, site: str = "") -> EncryptedVector:
        """Inverse of ``to_arrays``, for what came over the wire.

        Raises:
            EncryptionError: this is no header with chunks of bytes.
        """
        names = [_HEADER, *(f"{index:05d}" for index in range(len(arrays) - 1))]
        try:
            values = json.loads(arrays[_HEADER].tobytes())
            header = VectorHeader(**{**values, "sites": tuple(values["sites"])})
            if set(arrays) != set(names) or any(array.dtype != np.uint8 for array in arrays.values()):
                raise ValueError("chunks are missing, or not bytes")
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise _refusal("encrypted layers", "a header and chunks of bytes", type(error).__name__, site) from error
        return cls(header=header, chunks=[arrays[name] for name in names[1:]])

    def check_chunks(self, layout: VectorLayout, parameters: Parameters, *, site: str = "") -> None:
        """Raises EncryptionError: too few or too many ciphertexts, of another size, or impossible coefficients."""
        record = record_bytes(len(self.header.sites))
        expected = [(length, record) for length in layout.chunk_lengths(parameters)]
        found = [chunk.shape for chunk in self.chunks]
        if found != expected:
            differing = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), None)
            what = "chunks of the vector" if differing is None else f"chunk {differing} of the vector"
            a, b = (len(expected), len(found)) if differing is None else (expected[differing], found[differing])
            raise _refusal(what, str(a), str(b), site)
        for index, chunk in enumerate(self.chunks):
            if not check_coefficients(chunk):
                raise _refusal(f"chunk {index} of the vector", "ciphertexts", "bytes that are none", site)


@dataclass(frozen=True, kw_only=True)
class Quantisation:
    """What fixed point cost in one vector.

    Args:
        num_clipped: Values beyond the range.
        largest_error: Of a site's weighted value, apart from clipping; half a step at most.
    """

    num_clipped: int = 0
    largest_error: float = 0.0

    def __add__(self, other: Quantisation) -> Quantisation:
        return Quantisation(
            num_clipped=self.num_clipped + other.num_clipped,
            largest_error=max(self.largest_error, other.largest_error),
        )


def encrypt_vector(
    layers: dict[str, NDArray[Any]], layout: VectorLayout, key: AggregationKey, *, site: str, round_number: int
) -> tuple[EncryptedVector, Quantisation]:
    """A site's vector. Its layers are taken out of ``layers`` one after the other, so that memory does not double.

    Args:
        layers: Layer -> array; those of the layout, others stay.
        layout: What the vector holds.
        key: Of the run.
        site: Who encrypts.
        round_number: Counted from 0.

    Raises:
        EncryptionError: a layer is missing, of another shape, or holds NaN or infinity; nothing is encrypted then.
    """
    parameters, fixed_point = key.parameters, layout.fixed_point(key.parameters)
    if site not in layout.weights:
        raise _refusal("layout", f"{site} among the sites of its group", ", ".join(layout.weights), "server")
    for name, shape in layout.shapes.items():
        found = layers[name].shape if name in layers else None
        if found != shape:
            raise _refusal(f"layer {name}", f"shape {shape}", "no such layer" if found is None else f"{found}", site)
        if not np.isfinite(layers[name]).all():
            raise _refusal(f"layer {name}", "finite values", "NaN or infinity", site)
    header = VectorHeader(parameters=parameters.id, key=key.id, layout=layout.digest, round=round_number, sites=(site,))
    lengths = layout.chunk_lengths(parameters)
    marks, share, quantisation = key.marks(header.label(site), sum(lengths)).tolist(), layout.share((site,)), []
    chunks = [np.empty((length, record_bytes(1)), np.uint8) for length in lengths]
    for index, values in enumerate(_pieces(layers, layout, parameters.values_per_ciphertext)):
        integers, num_clipped, error = fixed_point.encode(values, share=share)
        quantisation.append(Quantisation(num_clipped=num_clipped, largest_error=error))
        chunk, row = divmod(index, CHUNK_CIPHERTEXTS)
        chunks[chunk][row] = key.cipher.encrypt(integers, marks[index])
    return EncryptedVector(header=header, chunks=chunks), sum(quantisation, Quantisation())


def _pieces(layers: dict[str, NDArray[Any]], layout: VectorLayout, length: int) -> Iterator[NDArray[Any]]:
    """The layout's values in pieces of ``length``, the last one shorter."""
    held: list[NDArray[Any]] = []
    missing = length
    for name in layout.shapes:
        values = layers.pop(name).reshape(-1)
        while values.size >= missing:
            yield np.concatenate([*held, values[:missing]])
            values, held, missing = values[missing:], [], length
        held.append(values)
        missing -= values.size
    if missing < length:
        yield np.concatenate(held)


class EncryptedSum:
    """The sum of the vectors of one group in one round, as the server makes it: without a key.

    Args:
        layout: What they hold.
        key_id: Of the key that they must be encrypted with.
        parameters: Of the scheme.
        round_number: Counted from 0.
    """

    def __init__(self, layout: VectorLayout, *, key_id: str, parameters: Parameters, round_number: int) -> None:
        self._layout, self._parameters = layout, parameters
        self._header = VectorHeader(
            parameters=parameters.id, key=key_id, layout=layout.digest, round=round_number, sites=()
        )
        self._chunks: list[Adder] = []

    @property
    def sites(self) -> tuple[str, ...]:
        return self._header.sites

    def check(self, vector: EncryptedVector, *, site: str) -> None:
        """Raises EncryptionError: this is not that site's vector of this round and group, or it is in already."""
        vector.header.check(replace(self._header, sites=(site,)), site=site)
        if site not in self._layout.weights or site in self.sites:
            raise _refusal("vector", "one from each site of the group", "one more", site)
        vector.check_chunks(self._layout, self._parameters, site=site)

    def add(self, vector: EncryptedVector, *, site: str) -> None:
        """Check, then add one site's vector."""
        self.check(vector, site=site)
        for index, chunk in enumerate(vector.chunks):
            if self.sites:
                self._chunks[index].add(chunk)
            else:
                self._chunks.append(Adder(chunk))
        self._header = replace(self._header, sites=tuple(sorted((*self.sites, site))))

    def result(self) -> EncryptedVector:
        """The sum; this object is empty then."""
        adders, self._chunks = self._chunks[::-1], []
        chunks = []
        while adders:
            chunks.append(adders.pop().records())
        return EncryptedVector(header=self._header, chunks=chunks)


def decrypt_vector(
    vector: EncryptedVector, layout: VectorLayout, key: AggregationKey, *, round_number: int, least_sites: int
) -> dict[str, NDArray[Any]]:
    """The layers of a sum: float32 means over the sites in it, or whole float64 sums where the layout has integers.

    Args:
        vector: From the server; its chunks are taken out one after the other, so that memory does not double.
        layout: What it must hold.
        key: Of the run.
        round_number: Whose sum it must be.
        least_sites: That must be in it; a sum of fewer tells too much of each.

    Raises:
        EncryptionError: it is another vector than asked for; nothing was decrypted.
        DecryptionError: its marks are not those of the sites named, or a value is out of range. The key must not be
            used again: what a decryption gives away when it fails can be used against it.
    """
    parameters, fixed_point = key.parameters, layout.fixed_point(key.parameters)
    sites = vector.header.sites
    expected = VectorHeader(parameters=parameters.id, key=key.id, layout=layout.digest, round=round_number, sites=sites)
    vector.header.check(expected, site="server")
    if len(sites) < max(least_sites, 2) or list(sites) != sorted(set(sites) & layout.weights.keys()):
        wanted = f"at least {max(least_sites, 2)} different sites of the group"
        raise _refusal("sites in the sum", wanted, ", ".join(sites), "server")
    vector.check_chunks(layout, parameters, site="server")
    values = np.empty(layout.size, np.float64 if layout.max_abs is None else np.float32)
    number = sum(layout.chunk_lengths(parameters))
    marks = np.sum([key.marks(expected.label(site), number) for site in sites], axis=0)
    share, length = layout.share(sites), parameters.values_per_ciphertext
    chunks, vector.chunks[:] = vector.chunks[::-1], []
    for index, record in enumerate(record for _ in range(len(chunks)) for record in chunks.pop()):
        sums, mark = key.cipher.decrypt(record)
        piece = slice(index * length, (index + 1) * length)
        here = values[piece].size
        if mark != marks[index]:
            raise _failure(f"the marks of {', '.join(sites)}", "others")
        if np.abs(sums).max() > fixed_point.largest_sum or sums[here:].any():
            raise _failure("values in range", "others")
        values[piece] = sums[:here] if layout.max_abs is None else fixed_point.decode(sums[:here], share=share)
    ends = np.cumsum([math.prod(shape) for shape in layout.shapes.values()])[:-1]
    parts = np.split(values, ends)
    return {name: part.reshape(shape) for (name, shape), part in zip(layout.shapes.items(), parts, strict=True)}


def _text(value: object) -> str:
    return str(list(value) if isinstance(value, tuple) else value)[:80]


def _refusal(name: str, expected: str, found: str, site: str) -> EncryptionError:
    remedy = "run the same version of nnunet-flare everywhere; if it stays so, have the sender looked into"
    return EncryptionError(field=name, expected=expected, found=found, remedy=remedy, site=site)


def _failure(expected: str, found: str) -> DecryptionError:
    return DecryptionError(
        field="decrypted sum",
        expected=expected,
        found=found,
        remedy="the key is destroyed and the job ends: have the server looked into, then start a run of another name",
    )
