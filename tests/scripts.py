"""Imports a script of benchmarks/ or examples/ as its neighbours import it: by its name, its folder at the end of sys.path."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

__all__ = ["script"]

ROOT = Path(__file__).parent.parent


def script(path: str) -> ModuleType:
    """`script("examples/stsb.py")`."""
    folder = str((ROOT / path).parent)
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(Path(path).stem)
