"""Errors that name what came, what was expected, from whom, and what to do.

    NNUNetFlareError
    ├── ConfigError          a job or site setting is unknown, misspelt or out of range
    ├── DatasetError         a raw data set cannot be used as it is
    ├── PlansError           planning failed, or the sites' network plans differ
    ├── LayerMismatchError   layers of two networks do not fit each other
    ├── UpdateError          a site's update is not finite or not what was asked for
    ├── StateError           run state on disk is locked, broken or of another run
    ├── PolicyError          a site's policy files are missing or not those that were installed
    ├── EncryptionError      encrypted values, a key or a certificate are not those agreed on
    ├── DecryptionError      a decrypted sum is not that of the sites named: its key is destroyed, the job ends
    ├── WorkerError          the nnU-Net process of a site died or misbehaved
    ├── ParticipationError   fewer sites answered than the job needs
    ├── UnreachableError     no answer from the FLARE server
    └── RefusedError         the FLARE server refuses a command

Every error carries the same fixed fields, so that it can travel as a reply from a site to the server
(``to_reply``) without its text being able to carry anything else. ``local_detail`` (case names, paths, a
traceback) stays in the log of the site where the error arose and is never part of a reply.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

__all__ = [
    "ConfigError",
    "DatasetError",
    "DecryptionError",
    "EncryptionError",
    "LayerMismatchError",
    "NNUNetFlareError",
    "ParticipationError",
    "PlansError",
    "PolicyError",
    "RefusedError",
    "StateError",
    "UnreachableError",
    "UpdateError",
    "WorkerError",
    "error_from_reply",
]

_REPLY_FIELDS = ("field", "expected", "found", "remedy", "site")
_MAX_FIELD_CHARS = 500


class NNUNetFlareError(Exception):
    """Root of all errors that this package raises on purpose.

    Args:
        field: The setting, file, layer or phase at fault.
        expected: What would have been right.
        found: What came instead. Never a case identifier, a path of a patient's file or a voxel value.
        remedy: What the reader should do.
        site: The site at fault; empty until somebody knows it.
        local_detail: Text for the log of the site where the error arose; never sent.
    """

    code = "error"

    def __init__(
        self, *, field: str, expected: str, found: str, remedy: str, site: str = "", local_detail: str = ""
    ) -> None:
        super().__init__(field, expected, found, remedy)
        self.field = field
        self.expected = expected
        self.found = found
        self.remedy = remedy
        self.site = site
        self.local_detail = local_detail

    def __reduce__(self) -> tuple[Callable[[], NNUNetFlareError], tuple[()]]:
        """Keyword-only arguments survive the way back from a process pool."""
        values = {name: getattr(self, name) for name in (*_REPLY_FIELDS, "local_detail")}
        return partial(type(self), **values), ()

    def __str__(self) -> str:
        prefix = f"{self.site}: " if self.site else ""
        return f"{prefix}{self.field}: expected {self.expected}, found {self.found}; {self.remedy}"

    def to_reply(self) -> dict[str, str]:
        """The fixed-schema form that may leave a site: JSON values only, without ``local_detail``."""
        return {"code": self.code} | {name: getattr(self, name)[:_MAX_FIELD_CHARS] for name in _REPLY_FIELDS}


class ConfigError(NNUNetFlareError):
    code = "config"


class DatasetError(NNUNetFlareError):
    code = "dataset"


class PlansError(NNUNetFlareError):
    code = "plans"


class LayerMismatchError(NNUNetFlareError):
    code = "layer_mismatch"


class UpdateError(NNUNetFlareError):
    code = "update"


class StateError(NNUNetFlareError):
    code = "state"


class PolicyError(NNUNetFlareError):
    code = "policy"


class EncryptionError(NNUNetFlareError):
    code = "encryption"


class DecryptionError(NNUNetFlareError):
    code = "decryption"


class WorkerError(NNUNetFlareError):
    code = "worker"


class ParticipationError(NNUNetFlareError):
    code = "participation"


class UnreachableError(NNUNetFlareError):
    code = "unreachable"


class RefusedError(NNUNetFlareError):
    code = "refused"


def error_from_reply(reply: Mapping[str, object]) -> NNUNetFlareError:
    """Rebuild the error that a site sent; unknown codes become the root class, and nothing in it steers a terminal.

    >>> str(error_from_reply(ConfigError(field="fold", expected="0 to 4", found="7", remedy="fix it").to_reply()))
    'fold: expected 0 to 4, found 7; fix it'
    """
    kinds = {kind.code: kind for kind in NNUNetFlareError.__subclasses__()}
    kind = kinds.get(str(reply.get("code")), NNUNetFlareError)
    texts = {name: str(reply.get(name, ""))[:_MAX_FIELD_CHARS] for name in _REPLY_FIELDS}
    return kind(**{name: "".join(c if c.isprintable() else " " for c in text) for name, text in texts.items()})
