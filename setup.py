"""Decides which folders are packages, and under which names they install.

`backends/` and `autotune_cache/` stand at the top for people and install inside the package, so that nothing named `backends`
lands in site-packages. Packages are discovered, never listed: a new backend's folder needs an `__init__.py` and nothing else.
"""

from setuptools import find_packages, setup

INSIDE = {f"titans_backends.{folder}": folder for folder in ("backends", "autotune_cache")}


def packages() -> list[str]:
    """The library's packages, then those of the two folders under the names that they install as."""
    found = find_packages(include=["titans_backends", "titans_backends.*"])
    for name, folder in INSIDE.items():
        found += [name, *(f"{name}.{package}" for package in find_packages(folder))]
    return found


setup(packages=packages(), package_dir=INSIDE)
