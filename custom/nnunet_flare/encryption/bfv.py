"""BFV ciphertexts as arrays of bytes, on Microsoft SEAL as TenSEAL brings it.

A fresh ciphertext is a pair of polynomials of which the second is random: it travels as the 64 bytes that SEAL expands
to it, so that encrypted values take hardly more bytes than float32 ones. A sum travels whole. Both have a fixed size
and carry nothing but coefficients and seed; SEAL's own headers are written here again before SEAL reads them, so that a
peer's bytes choose neither lengths nor compression. SEAL refuses coefficients that are not below the modulus.

``tenseal.sealapi`` reads and writes files only; these lie in memory (``memfd_create``).
"""

from __future__ import annotations

import os
import struct
from functools import cached_property
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray

from nnunet_flare.encryption.fixed_point import pack, unpack
from nnunet_flare.encryption.parameters import COEFFICIENT_BITS, DEGREE, Parameters

__all__ = ["FRESH_BYTES", "SUM_BYTES", "Adder", "Cipher", "check_coefficients"]

_POLYNOMIAL_BYTES = 8 * DEGREE
_SEED_BYTES = 64
FRESH_BYTES = _POLYNOMIAL_BYTES + _SEED_BYTES
"""Of one ciphertext as a site encrypts it."""
SUM_BYTES = 2 * _POLYNOMIAL_BYTES
"""Of one ciphertext after an addition."""

_MODULUS = 1152921504606830593
"""The largest 60-bit prime that is 1 modulo 8192; ciphertexts have it alone."""
_HEADER = struct.Struct("<HBBBBHQ")  # SEAL: magic, size of this header, version (2), compression, reserved, size
_MEMBERS = struct.Struct("<4Q?3QdQ")  # parameters' id, NTT form, polynomials, degree, primes, scale, correction
_MAGIC, _UNCOMPRESSED, _ZSTANDARD, _BLAKE2XB = 0xA15E, 0, 2, 1


class _Scheme:
    """SEAL's context for one parameter set, and its streams in memory."""

    def __init__(self, parameters: Parameters) -> None:
        from tenseal import sealapi as seal

        self.seal, self.parameters = seal, parameters
        chosen = seal.EncryptionParameters(seal.SCHEME_TYPE.BFV)
        chosen.set_poly_modulus_degree(DEGREE)
        chosen.set_coeff_modulus(seal.CoeffModulus.Create(DEGREE, list(COEFFICIENT_BITS)))
        chosen.set_plain_modulus(seal.PlainModulus.Batching(DEGREE, parameters.plain_bits))
        self.context = seal.SEALContext(chosen, True, seal.SEC_LEVEL_TYPE.TC128)
        assert chosen.coeff_modulus()[0].value() == _MODULUS, "SEAL's primes are other ones"
        self._decompressor = zstandard.ZstdDecompressor()
        self._file = os.memfd_create("seal", os.MFD_CLOEXEC)
        self._path = f"/proc/self/fd/{self._file}"
        self._version = _HEADER.unpack(self.stream(chosen)[: _HEADER.size])[2:4]

    def __del__(self) -> None:
        os.close(self._file)

    def stream(self, item: Any) -> bytes:
        """What SEAL saves of an object."""
        item.save(self._path)
        return os.pread(self._file, os.fstat(self._file).st_size, 0)

    def restore(self, empty: Any, stream: bytes) -> Any:
        """Raises ValueError: SEAL refuses the stream."""
        os.pwrite(self._file, stream, 0)
        os.ftruncate(self._file, len(stream))  # to nothing beforehand would give its memory back each time
        try:
            empty.load(self.context, self._path)
        except (RuntimeError, ValueError) as error:
            raise ValueError("SEAL refuses a ciphertext") from error
        return empty

    def _header(self, size: int) -> bytes:
        return _HEADER.pack(_MAGIC, _HEADER.size, *self._version, _UNCOMPRESSED, 0, _HEADER.size + size)

    @cached_property
    def _frames(self) -> dict[int, tuple[bytes, bytes]]:
        """Bytes of a record -> what SEAL writes before its coefficients, and between them and the seed."""
        members = _MEMBERS.pack(*self.context.first_parms_id(), False, 2, DEGREE, 1, 1.0, 1)
        seed_frame = self._header(1 + _SEED_BYTES) + bytes([_BLAKE2XB])
        frames = {}
        for record, polynomials, between in ((FRESH_BYTES, 1, seed_frame), (SUM_BYTES, 2, b"")):
            coefficients = struct.pack("<Q", polynomials * DEGREE)
            before = members + self._header(len(coefficients) + polynomials * _POLYNOMIAL_BYTES) + coefficients
            frames[record] = self._header(len(before) + len(between) + record) + before, between
        return frames

    def to_record(self, ciphertext: Any, size: int) -> NDArray[np.uint8]:
        """The coefficients, and the seed, of a ciphertext that SEAL made here."""
        stream = self.stream(ciphertext)
        header, body = stream[: _HEADER.size], stream[_HEADER.size :]
        if _HEADER.unpack(header)[4] == _ZSTANDARD:
            body = self._decompressor.decompressobj().decompress(body)
        before, between = self._frames[size]
        before = before[_HEADER.size :]
        coefficients, seed = body[len(before) : size + len(before)], b""
        if between:
            end = len(before) + _POLYNOMIAL_BYTES
            coefficients, seed = body[len(before) : end], body[end + len(between) :]
            assert body[end : end + len(between)] == between, "SEAL's format is another one"
        record = np.frombuffer(coefficients + seed, np.uint8)
        assert body.startswith(before) and record.size == size, "SEAL's format is another one"
        return record

    def to_ciphertext(self, record: NDArray[np.uint8]) -> Any:
        """Raises ValueError: the bytes are no ciphertext of these parameters."""
        before, between = self._frames[record.size]
        content = record.tobytes()
        end = len(content) - (_SEED_BYTES if between else 0)
        return self.restore(self.seal.Ciphertext(), before + content[:end] + between + content[end:])


def check_coefficients(records: NDArray[np.uint8]) -> bool:
    """True if all coefficients are below the modulus: such records are ciphertexts, and SEAL takes them.

    Args:
        records: Shape (n, ``FRESH_BYTES``) or (n, ``SUM_BYTES``).
    """
    polynomials = records.shape[1] // _POLYNOMIAL_BYTES * _POLYNOMIAL_BYTES
    coefficients = np.ascontiguousarray(records[:, :polynomials]).view("<u8")
    return bool(coefficients.max(initial=0) < _MODULUS)


class Adder:
    """Adds ciphertexts without any key.

    Args:
        parameters: Of the scheme.
    """

    def __init__(self, parameters: Parameters) -> None:
        self._scheme = _Scheme(parameters)
        self._evaluator = self._scheme.seal.Evaluator(self._scheme.context)

    def read(self, records: NDArray[np.uint8]) -> list[Any]:
        """SEAL's ciphertexts of an array of shape (n, ``FRESH_BYTES``) or (n, ``SUM_BYTES``).

        Raises:
            ValueError: a record is no ciphertext of these parameters.
        """
        return [self._scheme.to_ciphertext(record) for record in records]

    def add(self, totals: list[Any], ciphertexts: list[Any]) -> None:
        """Add each of the ciphertexts to its total, in place."""
        for total, ciphertext in zip(totals, ciphertexts, strict=True):
            self._evaluator.add_inplace(total, ciphertext)

    def records(self, totals: list[Any]) -> NDArray[np.uint8]:
        """The totals as an array of shape (n, ``SUM_BYTES``)."""
        return np.stack([self._scheme.to_record(total, SUM_BYTES) for total in totals])


class Cipher:
    """Encrypts and decrypts with a secret key.

    Args:
        parameters: Of the scheme.
        key: As ``new_key`` made it; by default a new one.

    Raises:
        ValueError: this is no key of these parameters.
    """

    def __init__(self, parameters: Parameters, key: bytes | None = None) -> None:
        self._scheme = scheme = _Scheme(parameters)
        seal = scheme.seal
        if key is None:
            secret = seal.KeyGenerator(scheme.context).secret_key()
        else:
            secret = scheme.restore(seal.SecretKey(), key)
        self._encoder = seal.BatchEncoder(scheme.context)
        self._encryptor = seal.Encryptor(scheme.context, secret)
        self._decryptor = seal.Decryptor(scheme.context, secret)
        self._secret = secret

    @property
    def key(self) -> bytes:
        """The secret key, in SEAL's own form."""
        return self._scheme.stream(self._secret)

    def encrypt(self, values: NDArray[np.int64], mark: int) -> NDArray[np.uint8]:
        """One fresh ciphertext, shape (``FRESH_BYTES``,).

        Args:
            values: Up to ``values_per_ciphertext`` integers that fit a field; the rest is filled with zeros.
            mark: Integer of the first slot.
        """
        parameters = self._scheme.parameters
        slots = np.zeros(DEGREE, np.int64)
        filled = np.zeros(parameters.values_per_ciphertext, np.int64)
        filled[: values.size] = values
        slots[0], slots[1:] = mark, pack(filled, parameters.field_bits)
        plaintext = self._scheme.seal.Plaintext()
        self._encoder.encode(slots.tolist(), plaintext)
        return self._scheme.to_record(self._encryptor.encrypt_symmetric(plaintext), FRESH_BYTES)

    def decrypt(self, record: NDArray[np.uint8]) -> tuple[NDArray[np.int64], int]:
        """The sums of the values, and of the marks, of all ciphertexts that were added.

        Raises:
            ValueError: the bytes are no ciphertext of these parameters.
        """
        plaintext = self._scheme.seal.Plaintext()
        self._decryptor.decrypt(self._scheme.to_ciphertext(record), plaintext)
        slots = np.fromiter(self._encoder.decode_int64(plaintext), np.int64, DEGREE)
        return unpack(slots[1:], self._scheme.parameters.field_bits), int(slots[0])
