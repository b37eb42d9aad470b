"""What every test meets: `--backend`, a worker per core, a cache and an environment that are not the user's, and the golden files.

The whole suite runs in pytest-xdist's workers, the slow modules first; named files, `--pdb` and `-n` run as they are asked to.

A test that takes `backend_name` runs once per backend that the registry knows, or on those that `--backend` names and no other.
A test that takes `golden_file` and is marked `golden("hf_*")` runs once per file that matches; without the files it is skipped, with the reason.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

SHARED_GOLDEN = Path(__file__).parent.parent / "shared" / "golden"
OWN_GOLDEN = Path(__file__).parent / "tests" / "golden"
ABSENT = "../shared/golden is absent"
MOST_WORKERS = 8
"""Each has torch in its memory."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backend",
        action="append",
        default=[],
        metavar="NAME",
        help="run the tests that run on every backend on this one only; may be repeated, or hold several names with commas between",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Before pytest-xdist reads its options: a worker per core where the whole suite runs and nothing was said about workers."""
    if "PYTEST_XDIST_WORKER" in os.environ or not config.pluginmanager.hasplugin("xdist") or config.args_source is pytest.Config.ArgsSource.ARGS:
        return  # a worker comes here too, and what a test starts: neither starts workers of its own
    if config.option.numprocesses is None and not config.option.tx and config.option.dist == "no":
        config.option.numprocesses, config.option.dist = "auto", "worksteal"
        config.option.maxprocesses = config.option.maxprocesses or MOST_WORKERS


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long begins first, so that no worker waits for it in the end; before all, what `slow(longest=True)` marks."""

    def turn(item: pytest.Item) -> int:
        slow = item.get_closest_marker("slow")
        return 2 if slow is None else 0 if slow.kwargs.get("longest") else 1

    items.sort(key=turn)


def pytest_configure(config: pytest.Config) -> None:
    asked = _asked(config)
    if asked:
        known = _known()
        unknown = [name for name in asked if name not in known]
        if unknown:
            raise pytest.UsageError(f"--backend: unknown {', '.join(map(repr, unknown))}. Known: {', '.join(known)}. See: titans-backends doctor")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend_name" in metafunc.fixturenames:
        metafunc.parametrize("backend_name", _asked(metafunc.config) or _known())
    if "golden_file" in metafunc.fixturenames:
        marker = metafunc.definition.get_closest_marker("golden")
        if marker is None or not marker.args:
            raise pytest.UsageError(f"{metafunc.definition.nodeid} takes golden_file and does not say which. Mark it: @pytest.mark.golden('hf_*')")
        metafunc.parametrize("golden_file", _golden_files(marker.args), ids=lambda path: path.stem)


def _asked(config: pytest.Config) -> list[str]:
    """The backends that `--backend` names, each once, in the order given."""
    names = [name.strip() for value in config.getoption("--backend") for name in value.split(",")]
    if "" in names:
        raise pytest.UsageError("--backend: an empty name. Type: pytest --backend eager")
    return list(dict.fromkeys(names))


def _known() -> list[str]:
    """The registry's backends; imported here, so that tests without a backend do without the registry."""
    from titans_backends import registry

    return list(registry.known())


def _golden_files(patterns: tuple[str, ...]) -> list[object]:
    """The shared golden files that match; one skip where the folder is absent, an error where nothing in it matches."""
    if not SHARED_GOLDEN.is_dir():
        return [pytest.param(SHARED_GOLDEN, marks=pytest.mark.skip(reason=ABSENT))]
    files = sorted({path for pattern in patterns for path in SHARED_GOLDEN.glob(f"{pattern}.safetensors")})
    if not files:
        raise pytest.UsageError(f"golden: no file matches {patterns} in ../shared/golden")
    return list(files)


@pytest.fixture(scope="session", autouse=True)
def isolated_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A user's cache folder for this run alone, none of our switches set, no terminal's width; processes that a test starts inherit all three."""
    cache_home = tmp_path_factory.mktemp("xdg_cache")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("TITANS_BACKENDS_")]:
            patch.delenv(name)
        for name in ("COLUMNS", "LINES"):  # a worker of pytest-xdist has them, some shells too
            patch.delenv(name, raising=False)
        patch.setenv("XDG_CACHE_HOME", str(cache_home))
        yield cache_home


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """One torch thread, here and in children: two OpenMP threads that wait for each other on busy cores made tiny cases ten times slower."""
    import torch

    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of shared golden files; a skip where it is absent."""
    if not SHARED_GOLDEN.is_dir():
        pytest.skip(ABSENT)
    return SHARED_GOLDEN


@pytest.fixture(scope="session")
def own_golden() -> Path:
    """The project's own small golden files, which are always there."""
    return OWN_GOLDEN
