"""Decides which folders are packages, under which names they install, and what a package index shows of README.md.

`backends/` and `autotune_cache/` stand at the top for people and install inside the package, so that nothing named `backends`
lands in site-packages. Packages are discovered, never listed: a new backend's folder needs an `__init__.py` and nothing else.
"""

import re
import tomllib
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
INSIDE = {f"titans_backends.{folder}": folder for folder in ("backends", "autotune_cache")}


def packages() -> list[str]:
    """The library's packages, then those of the two folders under the names that they install as."""
    found = find_packages(include=["titans_backends", "titans_backends.*"])
    for name, folder in INSIDE.items():
        found += [name, *(f"{name}.{package}" for package in find_packages(folder))]
    return found


def description(text: str, repository: str | None) -> str:
    """The README for an index, where a link relative to the repository leads nowhere: it leads to `repository`, a page like GitHub's, or without
    one stands as its text and the file's name, and a picture is left out."""

    def place(found: re.Match[str]) -> str:
        picture, words, link = found.groups()
        if re.match(r"[a-z]+:|#", link):
            return found[0]
        if repository is not None:
            return f"{picture}[{words}]({repository.rstrip('/')}/{'raw' if picture else 'blob'}/HEAD/{link})"
        return "" if picture else f"{words} (`{link.partition('#')[0]}`)"

    parts = re.split(r"(^ *```.*?^ *```)", text, flags=re.DOTALL | re.MULTILINE)  # what stands in a block of code stays
    return "".join(part if index % 2 else re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", place, part) for index, part in enumerate(parts))


def repository() -> str | None:
    """Where the repository is, if pyproject.toml says so."""
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"].get("urls", {})
    found: str | None = urls.get("Repository")
    return found


if __name__ == "__main__":
    setup(
        packages=packages(),
        package_dir=INSIDE,
        long_description=description((ROOT / "README.md").read_text(encoding="utf-8"), repository()),
        long_description_content_type="text/markdown",
    )
