"""nnU-Net's commands within the test's own process: a federation in ``loopback`` without any child process."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from unittest import mock

import pytest

from nnunet_flare.errors import error_from_reply
from nnunet_flare.flare.executor import NNUNetExecutor
from nnunet_flare.nnunet.commands import Commands
from nnunet_flare.nnunet.worker import _answer


class InlineProcess:
    """``NNUNetProcess`` without a process: the real commands and the worker's answers, one at a time, in this one.

    What the process itself adds is tested in test_process.py; here it would cost each site its imports.
    """

    turn = threading.RLock()

    def __init__(self, *, log_file: Path, num_threads: int) -> None:
        self._environment: dict[str, str] = {}
        self.close()

    def start(self) -> None: ...

    def close(self) -> None:
        self._commands = Commands(lambda what, done, total: None)

    def call(self, command, arguments, layers=None, *, cancelled=None, progress=None):
        if cancelled is not None:
            assert not cancelled()
        with self.turn, mock.patch.dict(os.environ, self._environment):
            content, answer = _answer(self._commands, command, json.loads(json.dumps(arguments)), layers or {})
            self._environment = dict(os.environ)
        if "error" in content:
            raise error_from_reply(content["error"])
        return content, answer


def run_inline(patch: pytest.MonkeyPatch) -> None:
    for module in ("controller", "executor"):
        patch.setattr(f"nnunet_flare.flare.{module}.NNUNetProcess", InlineProcess)
    execute = NNUNetExecutor.execute

    def execute_in_turn(*arguments):
        with InlineProcess.turn:  # sites share this process's environment
            return execute(*arguments)

    patch.setattr(NNUNetExecutor, "execute", execute_in_turn)
