"""A site's hold on the key of an encrypted run: open in memory, sealed on the disk, destroyed at the end.

``<run>/encryption/key.json`` is the envelope that the key holder sealed for this site, as the server relayed it: what
is needed to continue after a restart, and of no use without the site's private key. ``seen.json`` remembers the newest
sum of each vector that was decrypted here, so that the server cannot go back to an older one.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext

from nnunet_flare.encryption.envelope import Identity, open_envelope, peer_certificate, seal
from nnunet_flare.encryption.key import AggregationKey
from nnunet_flare.encryption.parameters import PARAMETERS
from nnunet_flare.errors import EncryptionError
from nnunet_flare.flare.identity import kit_identity, throw_away_identity
from nnunet_flare.flare.run import KEY_FOLDER
from nnunet_flare.nnunet.site import SiteSettings
from nnunet_flare.storage import read_json, write_json

__all__ = ["SiteKeys"]

_SEALED, _SEEN = "key.json", "seen.json"
_open: dict[tuple[Path, str], AggregationKey] = {}
"""Keys that this process has opened, by the folder of their envelope and the run's id."""


class SiteKeys:
    """One site's key of one run.

    Args:
        run: The run's folder at this site.
        run_id: Tells runs of one name apart.
        identity: The site's certificate and private key.
        settings: The site's.
    """

    def __init__(self, run: Path, run_id: str, identity: Identity, settings: SiteSettings) -> None:
        self._folder, self._run_id = run / KEY_FOLDER, run_id
        self.identity, self.settings = identity, settings
        self._place = self._folder, run_id

    @classmethod
    def of(cls, request: Mapping[str, Any], fl_ctx: FLContext) -> SiteKeys:
        """The keys of the site that a task came to, for the run that the task's request names."""
        workspace = fl_ctx.get_engine().get_workspace()
        settings = SiteSettings.load(fl_ctx.get_identity_name(), Path(workspace.get_site_config_dir()))
        if fl_ctx.get_prop(FLContextKey.SIMULATE_MODE):
            identity = throw_away_identity(settings)
        else:
            identity = kit_identity(Path(workspace.get_root_dir()), settings)
        return cls(settings.folder / "runs" / request["run"], request["run_id"], identity, settings)

    @property
    def has_key(self) -> bool:
        return (self._folder / _SEALED).exists()

    def key(self) -> AggregationKey:
        """The run's key.

        Raises:
            EncryptionError: this site has none, or its envelope cannot be opened.
        """
        if self._place not in _open:
            if not self.has_key:
                raise EncryptionError(
                    field="key",
                    expected="the key of an encrypted run",
                    found="none",
                    remedy="submit an encrypted job (jobs/ffe_he, jobs/asym_fedavg_he); the server hands out its key",
                    site=self.settings.site,
                )
            _open[self._place] = self._unsealed(read_json(self._folder / _SEALED))
        return _open[self._place]

    def make(self, parameters: str, peers: Mapping[str, str]) -> tuple[str, dict[str, Any]]:
        """Key holder: seal the run's key, a new one if there is none, for each peer.

        Args:
            parameters: Id of the parameter set.
            peers: Site -> its certificate in PEM, as the server relayed it.

        Returns:
            The key's id, and site -> envelope.

        Raises:
            EncryptionError: a certificate is not that of the site; nothing is sealed for anybody then.
        """
        certificates = {
            site: peer_certificate(pem, site=site, identity=self.identity) for site, pem in sorted(peers.items())
        }
        if self.has_key:
            key = self.key()
        elif parameters in PARAMETERS:
            key = AggregationKey.new(PARAMETERS[parameters])
        else:
            raise EncryptionError(
                field="parameters",
                expected=f"one of {', '.join(PARAMETERS)}",
                found=parameters,
                remedy="run the same version of nnunet-flare everywhere",
                site=self.settings.site,
            )
        envelopes = {}
        for site, certificate in certificates.items():
            context = self._context(key.id, to=site)
            sealed = seal(key.to_bytes(), context=context, to=certificate, sender=self.identity)
            envelopes[site] = {"context": context, "sender": self.identity.pem, "envelope": sealed}
        return key.id, envelopes

    def receive(self, sealed: Mapping[str, Any]) -> str:
        """Open an envelope and keep it; returns the key's id.

        Raises:
            EncryptionError: it is not one that a hospital sealed for this site and run, or the site has another key.
        """
        key = self._unsealed(sealed)
        if self.has_key and self.key().id != key.id:
            raise EncryptionError(
                field="key",
                expected=f"{self.key().id}, with which this run began",
                found=key.id,
                remedy="start a run of another name for a new key",
                site=self.settings.site,
            )
        write_json(self._folder / _SEALED, sealed)
        _open[self._place] = key
        return key.id

    def destroy(self) -> None:
        """Forget the key, in memory and on the disk."""
        _open.pop(self._place, None)
        shutil.rmtree(self._folder, ignore_errors=True)

    def newest_round(self, scope: str) -> int:
        """Round of the newest sum that was decrypted here, -1 before the first."""
        file = self._folder / _SEEN
        return int(read_json(file).get(scope, -1)) if file.exists() else -1

    def saw(self, rounds: Mapping[str, int]) -> None:
        """Remember the rounds (by scope) of sums that were decrypted here."""
        file = self._folder / _SEEN
        before = read_json(file) if file.exists() else {}
        if before | rounds != before:
            write_json(file, before | rounds)

    def _unsealed(self, sealed: Mapping[str, Any]) -> AggregationKey:
        try:
            context, pem = dict(sealed["context"]), sealed["sender"]
            expected = self._context(context["key"], to=self.settings.site, sender=context["from"])
            if context != expected:
                raise ValueError("another site's, or another run's")
            sender = peer_certificate(pem, site=context["from"], identity=self.identity)
            content = open_envelope(sealed["envelope"], context=context, sender=sender, recipient=self.identity)
            key = AggregationKey.from_bytes(content)
            if key.id != context["key"]:
                raise ValueError("another key")
            _ = key.cipher
        except (KeyError, TypeError, ValueError) as error:
            raise EncryptionError(
                field="envelope of the key",
                expected="one that a hospital sealed for this site and run",
                found=f"another, or a damaged one ({type(error).__name__})",
                remedy="submit the job again; if it stays so, start a run of another name",
                site=self.settings.site,
            ) from error
        return key

    def _context(self, key_id: str, *, to: str, sender: str | None = None) -> dict[str, str]:
        return {"run_id": self._run_id, "key": key_id, "from": sender or self.settings.site, "to": to}
