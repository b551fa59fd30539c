"""Photos that end or hang the process which opens them: see ``killer/sitecustomize.py``."""

from __future__ import annotations

import os
from pathlib import Path

from machine import ROOT

KILLER = str(Path(__file__).parent / "killer")


def killer_env(folder: Path) -> dict[str, str]:
    # A worker that is given a PYTHONPATH of its own is to import the tree that is tested.
    return {"PYTHONPATH": f"{KILLER}{os.pathsep}{ROOT}", "KILLER_LOG": str(folder / "killer.log")}
