"""`--backend` restricts the tests that take `backend_name`, and refuses names that the registry does not know."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests import fresh
from titans_backends import registry

ROOT = Path(__file__).resolve().parent.parent


def collect(*options: str) -> subprocess.CompletedProcess[str]:
    """Collects this file in a process of its own."""
    return fresh.run_pytest("--collect-only", *options, str(Path(__file__)), cwd=ROOT)


def test_a_backend_name_is_one_that_the_registry_knows(backend_name: str) -> None:
    assert backend_name in registry.known()


def test_the_cache_and_the_switches_are_not_the_users(isolated_user: Path) -> None:
    assert os.environ["XDG_CACHE_HOME"] == str(isolated_user)
    assert [name for name in os.environ if name.startswith("TITANS_BACKENDS_")] == []


def test_one_backend_is_collected_where_one_is_named() -> None:
    done = collect("--backend", "eager,eager")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("test_a_backend_name_is_one_that_the_registry_knows[") == 1
    assert "test_a_backend_name_is_one_that_the_registry_knows[eager]" in done.stdout


def test_an_unknown_backend_is_a_usage_error_that_lists_the_known_ones() -> None:
    done = collect("--backend", "eager", "--backend", "eagre")
    assert done.returncode == 4, done.stdout + done.stderr
    assert "unknown 'eagre'" in done.stderr
    assert [name for name in registry.known() if name not in done.stderr] == []
