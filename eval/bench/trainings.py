"""Figures that need trainings: scripts of this repository run as stages, each once, however often the whole is started."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path


class StageError(ValueError):
    """A script that did not end well."""


def stage(
    product: Path, script: Path, *options: object, resumes: bool = False, environment: Mapping[str, str] | None = None
) -> None:
    """Run a script in a process of its own unless its product is there.

    Args:
        product: the file that is there when all is done, written by the script or by the caller after it.
        script: its path; the folder above its own is put on Python's path.
        options: of its command line.
        resumes: give it --resume where an earlier run left a config.json beside the product.
        environment: variables to add to those of this process.

    Raises StageError if it ends with another status than 0; the script itself has said why.
    """
    if product.exists():
        return
    begun = resumes and (product.parent / "config.json").exists()
    command = [sys.executable, str(script), *map(str, options), *(["--resume"] if begun else [])]
    print("==", " ".join(command), flush=True)
    began = time.monotonic()
    variables = {**os.environ, "PYTHONPATH": str(script.resolve().parents[1]), **(environment or {})}
    status = subprocess.run(command, check=False, env=variables).returncode
    if status:
        raise StageError(f"{script.name} ended with status {status}; the same command goes on where this one stopped")
    print(f"== {time.monotonic() - began:.0f} s", flush=True)
