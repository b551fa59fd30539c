"""Photos that end or hang the process which opens them: see ``killer/sitecustomize.py``."""

from __future__ import annotations

from pathlib import Path

KILLER = str(Path(__file__).parent / "killer")


def killer_env(folder: Path) -> dict[str, str]:
    return {"PYTHONPATH": KILLER, "KILLER_LOG": str(folder / "killer.log")}
