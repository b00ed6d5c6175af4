"""The nnU-Net process: answers commands from FLARE's side until the pipe closes.

    python -m nnunet_flare.nnunet.worker FILE_DESCRIPTOR

Each command is a method of ``Commands``. Whatever a command needs travels with it or lies on
disk, so that a new process can go on where a dead one stopped; the open trainer is only a cache.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import traceback
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from nnunet_flare.errors import NNUNetFlareError, StateError, WorkerError
from nnunet_flare.nnunet.pipe import receive, send

Answer = tuple[dict[str, Any], dict[str, np.ndarray]]


def main(file_descriptor: int) -> None:
    """Answer commands until the parent goes; then end this process group, augmentation workers included."""
    with contextlib.suppress(OSError):  # the kernel should choose this process before FLARE's
        _write_text("/proc/self/oom_score_adj", "500")
    threading.Thread(target=_end_with_parent, args=(file_descriptor,), daemon=True).start()
    pipe = Connection(file_descriptor)
    from nnunet_flare.nnunet.commands import Commands  # seconds of imports, after the watch over the parent

    def progress(what: str, done: int, total: int) -> None:
        send(pipe, {"progress": [what, done, total]})

    worker = Commands(progress)
    while True:
        try:
            request, layers = receive(pipe)
        except EOFError:
            return
        content, answer = _answer(worker, request["command"], request["arguments"], layers)
        send(pipe, content, answer)


def _answer(worker: Any, command: str, arguments: Mapping[str, Any], layers: Mapping[str, np.ndarray]) -> Answer:
    print(f"command: {command}", flush=True)
    try:
        result = getattr(worker, command)(**arguments, **({"layers": layers} if layers else {}))
        return result if isinstance(result, tuple) else (result, {})
    except NNUNetFlareError as error:
        print(f"{error}\n{error.local_detail}", file=sys.stderr, flush=True)
        return {"error": error.to_reply()}, {}
    except Exception as error:  # the boundary: the text of a foreign error may name patients and stays here
        traceback.print_exc()
        return {"error": _foreign(command, error).to_reply()}, {}


def _foreign(command: str, error: Exception) -> NNUNetFlareError:
    if isinstance(error, OSError) and error.errno is not None:
        return StateError(
            field=f"nnU-Net process ({command})",
            expected="files that can be read and written",
            found=os.strerror(error.errno),
            remedy="free disk space or correct the permissions, then submit the job again; the last checkpoint is kept",
        )
    return WorkerError(
        field=f"nnU-Net process ({command})",
        expected="an answer",
        found=type(error).__name__,
        remedy="see the log of the nnU-Net process in the site's run folder",
    )


def _end_with_parent(file_descriptor: int) -> None:
    watch = select.poll()
    watch.register(file_descriptor, 0)  # hang-up is always reported
    watch.poll()
    os.killpg(os.getpgid(0), signal.SIGKILL)


def _write_text(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


if __name__ == "__main__":
    main(int(sys.argv[1]))
