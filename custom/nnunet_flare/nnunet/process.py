"""The site's nnU-Net process, seen from FLARE's side.

nnU-Net runs in a process of its own, so that running out of memory or a crash in native code becomes an error reply
instead of the end of the federation, and FLARE's processes never load torch.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_flare.errors import WorkerError, error_from_reply
from nnunet_flare.nnunet.pipe import receive, send

__all__ = ["NNUNetProcess"]

_POLL_SECONDS = 0.2
Progress = Callable[[str, int, int], None]


class NNUNetProcess:
    """One child process that answers commands (``nnunet_flare.nnunet.worker``); started again after any error.

    Args:
        log_file: Receives the child's standard output and error.
        num_threads: Threads of torch and OpenMP in the child.
    """

    def __init__(self, *, log_file: Path, num_threads: int) -> None:
        self._log_file = log_file
        self._num_threads = num_threads
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the child if none is alive, so that its imports overlap with other work."""
        if self._process is not None:
            if self._process.poll() is None:
                return
            self.close()
        self._log_file.parent.mkdir(parents=True, exist_ok=True)
        self._pipe, far_end = Pipe()
        environment = os.environ | {
            "OMP_NUM_THREADS": str(self._num_threads),
            "OMP_WAIT_POLICY": "passive",
            "MPLBACKEND": "agg",
            "nnUNet_def_n_proc": "1",
            "nnUNet_wandb_enabled": "0",  # it would upload plans and dataset.json past FLARE
        }
        with far_end, self._log_file.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "nnunet_flare.nnunet.worker", str(far_end.fileno())],
                pass_fds=[far_end.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )
        # Augmentation workers inherit the pipe: without this, a dead child would leave a read on it waiting for ever.
        threading.Thread(target=_end_group_after, args=(self._process.pid,), daemon=True).start()

    def call(
        self,
        command: str,
        arguments: Mapping[str, Any],
        layers: Mapping[str, np.ndarray] | None = None,
        *,
        cancelled: Callable[[], bool] = lambda: False,
        progress: Progress = lambda what, done, total: None,
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Run one command in the child and return its content and layers.

        Raises:
            NNUNetFlareError: what the child raised, field by field; the child is started afresh next time.
            WorkerError: the child died, or the call was cancelled.
        """
        self.start()
        try:
            send(self._pipe, {"command": command, "arguments": dict(arguments)}, layers)
            while True:
                while not self._pipe.poll(_POLL_SECONDS):
                    if cancelled():
                        raise self._died(command, "the job was stopped")
                content, answer = receive(self._pipe)
                if "progress" not in content:
                    break
                progress(*content["progress"])
        except (EOFError, OSError) as error:
            raise self._died(command, self._cause_of_death()) from error
        except BaseException:  # the child would still answer, and be taken for the answer to the next call
            self.close()
            raise
        if "error" in content:
            self.close()
            raise error_from_reply(content["error"])
        return content, answer

    def _cause_of_death(self) -> str:
        if self._process is None:
            return "its process is gone"
        code = self._process.wait(timeout=30)
        self.close()
        return f"its process was ended by signal {-code}" if code < 0 else f"its process ended with status {code}"

    def _died(self, command: str, found: str) -> WorkerError:
        return WorkerError(
            field=f"nnU-Net process ({command})",
            expected="an answer",
            found=found,
            remedy=f"see {self._log_file.name} in the site's run folder; signal 9 is most often too little memory",
        )

    def close(self) -> None:
        """End the child and every process it started; safe to call twice."""
        if self._process is None:
            return
        self._pipe.close()
        _kill_group(self._process.pid)
        self._process.wait()
        self._process = None


def _end_group_after(child: int) -> None:
    """Wait for a child without collecting it: ``Popen`` still can, and until then no other group has its number."""
    with contextlib.suppress(ChildProcessError):
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        _kill_group(child)


def _kill_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)
