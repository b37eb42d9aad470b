"""The flavours of a new backend: what each needs, where it runs, and for which ops it has a kernel to begin with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from titans_backends.errors import unknown

__all__ = ["KINDS", "Kind", "kind_named"]


@dataclass(frozen=True, slots=True)
class Kind:
    """One flavour. `rank` and `imports` are the manifest's source text; `ops` are those with a kernel, `any_op` says that every other op begins with its
    contract's reference; `dependencies` are what the plugin's pyproject.toml asks for beside titans-backends; `cpu_alone`: its tests want no GPU."""

    name: str
    summary: str
    rank: str
    ops: tuple[str, ...] = ("fused_uw",)
    any_op: bool = False
    requires: tuple[str, ...] = ()
    install: str = ""
    dependencies: tuple[str, ...] = ()
    imports: str = ""
    cpu_alone: bool = False
    advice: str = ""


KINDS: Mapping[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("torch", "a backend written with torch", '{"cpu": 9, "cuda": 9}', any_op=True),
        Kind(
            "triton",
            "a backend written in Triton",
            '{"cuda": 9} | ({"cpu": 9} if os.environ.get("TRITON_INTERPRET") == "1" else {})',
            requires=("triton",),
            install="pip install 'titans-backends[triton]'",
            dependencies=("triton>=3.6",),
            imports="import os\n\n",
            advice="without a GPU it runs in Triton's interpreter: put TRITON_INTERPRET=1 before verify and pytest",
        ),
        Kind(
            "numba",
            "a backend written in Numba, for a CPU",
            '{"cpu": 9}',
            requires=("numba",),
            install="pip install 'titans-backends[numba]'",
            dependencies=("numba>=0.61",),
            cpu_alone=True,
        ),
        Kind(
            "cupy",
            "a backend written in CUDA, compiled by CuPy",
            '{"cuda": 9}',
            requires=("cupy",),
            install="pip install 'titans-backends[cuda13]'  (or [cuda12], as torch.version.cuda says)",
            advice="it wants a GPU: without one, verify and pytest find nothing to run",
        ),
    )
}
"""Every flavour by name, the one that works everywhere first."""


def kind_named(name: str, op: str) -> Kind:
    """A flavour that can begin this op; UnknownNameError or ValueError says which there are, or what else could."""
    if name not in KINDS:
        raise unknown("kind", name, KINDS)
    kind = KINDS[name]
    if op not in kind.ops and not kind.any_op:
        ready = " and ".join(kind.ops)
        raise ValueError(f"the kind {name} has a kernel to begin with for {ready}, not for {op}; begin {op} with --kind torch, which needs none")
    return kind
