"""Without Triton, CuPy or Numba, each alone and all together: the library imports, the eager path is right, and `doctor` says how to get what is missing."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest

from tests import fresh
from titans_backends import registry

PACKAGES = {"triton": ("triton",), "cupy": ("cupy", "cupyx", "cupy_backends"), "numba": ("numba", "numba_cuda")}
"""What may be missing, by its distribution's name, and the modules that it brings."""
EACH_AND_ALL = [*((name,) for name in PACKAGES), tuple(PACKAGES)]  # of other people's kernels below nothing else depends
PACKAGES |= {"fla-core": ("fla", "einops"), "flash-qla": ("flash_qla", "tilelang"), "flashinfer-python": ("flashinfer", "cutlass")}

PROGRAM = """
import json, sys
sys.modules.update(dict.fromkeys(ABSENT))  # as if they were not installed: find_spec finds nothing, import raises ModuleNotFoundError
import torch
import titans_backends as tb
from titans_backends.contracts import CONTRACTS
from titans_backends.contracts.case import Case, build
from titans_backends.contracts.tolerance import compare, tolerance

wrong = []
for name, made in CONTRACTS.items():
    first = made.variants[0]
    call = build(made, Case("without", T=3 if made.max_tokens else 20, options=first.options, given=first.given), requires_grad=name == "fast_core")
    found = tb.get_op(name)(**{one: getattr(call, one) for one in made.parameters})
    if name == "fast_core":
        found[0].sum().backward()
        wrong += [] if call.q.grad is not None and call.q.grad.isfinite().all() else ["fast_core: no gradient"]
    for spec, got, want in zip(made.outputs, found, made.reference(made.to(call, torch.float64)), strict=True):
        if got is not None and want is not None and not compare(spec.name, got, want).within(tolerance(torch.float32).outputs):
            wrong.append(f"{name}: {spec.name}")
assert not wrong, wrong

from titans_backends.cli import main
sys.argv = ["titans-backends", "doctor", "--json", "--no-run", "--device", "cpu"]
main()
"""


@dataclass(frozen=True, slots=True)
class Done:
    """What the program said: doctor's backends by name, and the commands that it names."""

    backends: dict[str, dict[str, object]]
    commands: list[str]


def without(missing: tuple[str, ...]) -> Done:
    """Runs the program where the packages are missing; a failure shows what it said."""
    absent = tuple(module for name in missing for module in PACKAGES[name])
    done = fresh.run(f"ABSENT = {absent!r}\n{PROGRAM}")
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads(done.stdout)
    return Done({one["name"]: one for one in said["backends"]}, [one["command"] for one in said["findings"]])


@pytest.mark.parametrize("missing", EACH_AND_ALL, ids=" and ".join)
def test_eager_works_and_doctor_names_what_to_install(missing: tuple[str, ...]) -> None:
    modules = {module for name in missing for module in PACKAGES[name]}
    done = without(missing)
    assert done.backends["eager"]["state"] == "importable"
    for name, backend in registry.known().items():
        for package in modules & set(backend.requires):
            assert done.backends[name]["state"] == "refused"
            assert f"the package {package} is not installed" in str(done.backends[name]["reason"])
            assert (backend.install in done.commands) == (backend in registry.order("cpu"))  # for a GPU alone it would not help here


def test_every_backend_that_requires_a_package_says_how_to_get_it() -> None:
    wants = {name: backend for name, backend in registry.known().items() if backend.requires}
    assert {"triton", "numba_cpu"} <= set(wants)
    assert [name for name, backend in wants.items() if not backend.install.startswith("pip install ")] == []
    known = {module for modules in PACKAGES.values() for module in modules}
    assert [package for backend in wants.values() for package in backend.requires if package not in known] == []
