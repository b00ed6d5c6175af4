"""The commands of this environment, as a user gives them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run(*command: str | Path, folder: Path, **environment: str) -> str:
    """What a command prints, run in a folder that is also its HOME."""
    program = Path(sys.executable).with_name(str(command[0]))
    variables = os.environ | {"HOME": str(folder)} | environment
    result = subprocess.run([program, *command[1:]], cwd=folder, env=variables, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout
