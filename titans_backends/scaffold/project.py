"""The files of a new backend: a project of its own, or a folder of a checkout's `backends/`. Nothing that exists is written over."""

from __future__ import annotations

import importlib.resources
import string
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from titans_backends.scaffold.kinds import Kind

__all__ = ["Project", "in_tree", "plugin"]

_TEMPLATES = "titans_backends.scaffold"


@dataclass(frozen=True, slots=True)
class Project:
    """Text by path, relative to `folder`; and what to type next, in order."""

    folder: Path
    files: Mapping[str, str]
    next: tuple[str, ...]

    def write(self) -> None:
        """Writes every file; ValueError, and nothing written, where the folder has something in it already."""
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise ValueError(f"{self.folder} is there already, and nothing is written over; name another with --output, or remove it")
        for name, text in self.files.items():
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")


def plugin(name: str, op: str, kind: Kind, folder: Path | None = None) -> Project:
    """A distribution of its own, by default in `titans-backends-NAME/`: manifest, op module, test, and the entry point by which the library finds it."""
    distribution = f"titans-backends-{name.replace('_', '-')}"
    folder = Path(distribution) if folder is None else folder
    commands = (f"titans-backends verify --backend {name}", "pytest", f"titans-backends tune --op {op}", f"titans-backends explain {op}")
    words = _words(name, op, kind, name) | {"distribution": distribution, "next": "\n".join(commands)}
    files = {
        "pyproject.toml": _rendered("pyproject.toml", words),
        "README.md": _rendered("README.md", words),
        f"{name}/__init__.py": _rendered("manifest.py", words),
        f"{name}/{op}.py": _rendered(_module(op, kind), words),
        "tests/test_conformance.py": _rendered("test_conformance.py", words),
    }
    return Project(folder, files, (f"cd {folder}", "pip install -e '.[test]'", *commands))


def in_tree(name: str, op: str, kind: Kind, checkout: Path) -> Project:
    """A folder of a checkout's `backends/`, where it is found by looking and tested with the others."""
    words = _words(name, op, kind, f"titans_backends.backends.{name}")
    files = {"__init__.py": _rendered("manifest.py", words), f"{op}.py": _rendered(_module(op, kind), words)}
    commands = (
        f"titans-backends verify --backend {name}",
        f"pytest tests/test_conformance.py --backend {name}",
        f"titans-backends tune --op {op}",
        f"titans-backends explain {op}",
    )
    return Project(checkout / "backends" / name, files, commands)


def _words(name: str, op: str, kind: Kind, package: str) -> dict[str, str]:
    requires = "".join(f'"{one}",' for one in kind.requires)
    return {
        "name": name,
        "op": op,
        "package": package,
        "summary": kind.summary,
        "rank": kind.rank,
        "imports": kind.imports,
        "torch_import": "" if kind.cpu_alone else "import torch\n",
        "device": '"cpu"' if kind.cpu_alone else '"cuda" if torch.cuda.is_available() else "cpu"',
        "requires": f'    requires=({requires}),\n    install="{kind.install}",\n' if requires else "",
        "dependencies": ", ".join(f'"{one}"' for one in ("titans-backends", *kind.dependencies)),
    }


def _module(op: str, kind: Kind) -> str:
    return f"{kind.name}/{op if op in kind.ops else 'any_op'}.py"


def _rendered(template: str, words: Mapping[str, str]) -> str:
    text = importlib.resources.files(_TEMPLATES).joinpath("templates", f"{template}.tmpl").read_text(encoding="utf-8")
    return string.Template(text).substitute(words)
