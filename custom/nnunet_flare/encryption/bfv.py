"""BFV ciphertexts as arrays of bytes, on Microsoft SEAL as TenSEAL brings it.

A fresh ciphertext is a pair of polynomials of which the second is random: it travels as the 64 bytes that SEAL expands
to it, so that encrypted values take hardly more bytes than float32 ones. A sum travels in the same way: the sum of the
first polynomials, and the seeds of all the second ones, which whoever decrypts expands and adds. So adding needs
neither SEAL nor a key.

A record has a fixed size and carries nothing but coefficients and seeds; SEAL's own headers are written here again
before SEAL reads them, so that a peer's bytes choose neither lengths nor compression. SEAL refuses coefficients that
are not below the modulus.

``tenseal.sealapi`` reads and writes files only; these lie in memory (``memfd_create``).
"""

from __future__ import annotations

import os
import struct
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray

from nnunet_flare.encryption.fixed_point import pack, unpack
from nnunet_flare.encryption.parameters import COEFFICIENT_BITS, DEGREE, Parameters

__all__ = ["Adder", "Cipher", "check_coefficients", "record_bytes"]

_POLYNOMIAL_BYTES = 8 * DEGREE
_SEED_BYTES = 64

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
        self._before, self._between = self._frame()

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

    def _frame(self) -> tuple[bytes, bytes]:
        """What SEAL writes before the coefficients of a fresh ciphertext, and between them and its seed."""
        members = _MEMBERS.pack(*self.context.first_parms_id(), False, 2, DEGREE, 1, 1.0, 1)
        between = self._header(1 + _SEED_BYTES) + bytes([_BLAKE2XB])
        coefficients = struct.pack("<Q", DEGREE)
        before = members + self._header(len(coefficients) + _POLYNOMIAL_BYTES) + coefficients
        return self._header(len(before) + _POLYNOMIAL_BYTES + len(between) + _SEED_BYTES) + before, between

    def to_record(self, fresh: Any) -> NDArray[np.uint8]:
        """Coefficients and seed of a ciphertext that SEAL made here."""
        stream = self.stream(fresh)
        header, body = stream[: _HEADER.size], stream[_HEADER.size :]
        if _HEADER.unpack(header)[4] == _ZSTANDARD:
            body = self._decompressor.decompressobj().decompress(body)
        before, between = self._before[_HEADER.size :], self._between
        end = len(before) + _POLYNOMIAL_BYTES
        coefficients, seed = body[len(before) : end], body[end + len(between) :]
        assert before + coefficients + between + seed == body, "SEAL's format is another one"
        record = np.frombuffer(coefficients + seed, np.uint8)
        assert record.size == record_bytes(1), "SEAL's format is another one"
        return record

    def to_ciphertext(self, coefficients: bytes, seed: bytes) -> Any:
        """Raises ValueError: the bytes are no ciphertext of these parameters."""
        return self.restore(self.seal.Ciphertext(), self._before + coefficients + self._between + seed)


def record_bytes(num_sites: int) -> int:
    """Of the sum of so many fresh ciphertexts; one is a fresh one itself."""
    return _POLYNOMIAL_BYTES + num_sites * _SEED_BYTES


def _coefficients(records: NDArray[np.uint8]) -> NDArray[np.uint64]:
    return np.ascontiguousarray(records[:, :_POLYNOMIAL_BYTES]).view("<u8")


def check_coefficients(records: NDArray[np.uint8]) -> bool:
    """True if all coefficients are below the modulus: such records are ciphertexts, and SEAL takes them.

    Args:
        records: Shape (n, ``record_bytes``).
    """
    return bool(_coefficients(records).max(initial=0) < _MODULUS)


class Adder:
    """The sum of one chunk of fresh ciphertexts of each site, made without any key.

    Args:
        records: Of the first site, shape (n, ``record_bytes(1)``), checked.
    """

    def __init__(self, records: NDArray[np.uint8]) -> None:
        self._total = _coefficients(records).copy()
        self._seeds = [records[:, _POLYNOMIAL_BYTES:].copy()]

    def add(self, records: NDArray[np.uint8]) -> None:
        """Add those of one more site."""
        self._total += _coefficients(records)
        np.minimum(self._total, self._total - np.uint64(_MODULUS), out=self._total)  # below 0 wraps to the largest
        self._seeds.append(records[:, _POLYNOMIAL_BYTES:].copy())

    def records(self) -> NDArray[np.uint8]:
        """The sums, shape (n, ``record_bytes(sites)``)."""
        return np.concatenate([self._total.view(np.uint8), *self._seeds], axis=1)


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
        self._evaluator = seal.Evaluator(scheme.context)
        self._decryptor = seal.Decryptor(scheme.context, secret)
        self._secret = secret

    @property
    def key(self) -> bytes:
        """The secret key, in SEAL's own form."""
        return self._scheme.stream(self._secret)

    def encrypt(self, values: NDArray[np.int64], mark: int) -> NDArray[np.uint8]:
        """One fresh ciphertext, shape (``record_bytes(1)``,).

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
        return self._scheme.to_record(self._encryptor.encrypt_symmetric(plaintext))

    def decrypt(self, record: NDArray[np.uint8]) -> tuple[NDArray[np.int64], int]:
        """The sums of the values, and of the marks, of all ciphertexts that were added.

        Raises:
            ValueError: the bytes are no ciphertext of these parameters.
        """
        content, plaintext = record.tobytes(), self._scheme.seal.Plaintext()
        coefficients, total = content[:_POLYNOMIAL_BYTES], None
        for start in range(_POLYNOMIAL_BYTES, len(content), _SEED_BYTES):
            ciphertext = self._scheme.to_ciphertext(coefficients, content[start : start + _SEED_BYTES])
            if total is None:
                total, coefficients = ciphertext, bytes(_POLYNOMIAL_BYTES)
            else:
                self._evaluator.add_inplace(total, ciphertext)
        self._decryptor.decrypt(total, plaintext)
        slots = np.fromiter(self._encoder.decode_int64(plaintext), np.int64, DEGREE)
        return unpack(slots[1:], self._scheme.parameters.field_bits), int(slots[0])
