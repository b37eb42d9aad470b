"""The pages that nobody writes: one for each op, the backends, the commands and the public names, from contracts, manifests, the command line and docstrings."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import titans_backends as tb  # noqa: E402
from titans_backends import registry  # noqa: E402
from titans_backends.backend import Backend  # noqa: E402
from titans_backends.cli import app  # noqa: E402
from titans_backends.contracts import CONTRACTS  # noqa: E402

DEVICES = {"cpu": "CPU", "cuda": "GPU", "*": "whatever torch runs on"}
BEYOND = ("titans_backends.nn", "titans_backends.conformance")
"""Modules with public names of their own, beside the package's."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages."""
    pages = {
        "ops/index.md": _ops_page(),
        "reference/backends.md": _backends_page(),
        "reference/commands.md": _commands_page(),
        "reference/api.md": _api_page(),
    }
    for name, text in {**pages, **{f"ops/{op}.md": _op_page(op) for op in CONTRACTS}}.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Puts a page for each op where the navigation says `ops/`."""
    config.nav = [
        {"Ops": ["ops/index.md", *({op: f"ops/{op}.md"} for op in CONTRACTS)]} if entry == {"Ops": "ops/"} else entry for entry in config.nav or []
    ]
    return config


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines) + "\n"


def directions(backend: Backend, op: str) -> str:
    """Which directions a backend's module has, read from its file: importing it might want a package."""
    spec = importlib.util.find_spec(backend.ops[op])
    if spec is None or spec.origin is None:
        return "forward"
    bound = set()
    for node in ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            bound.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            bound |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign):
            bound |= {name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return "forward and backward" if "run_backward" in bound else "forward"


def _runs_on(backend: Backend) -> str:
    return ", ".join(DEVICES.get(kind, kind) for kind in backend.rank)


def _ordered() -> list[Backend]:
    return sorted((one for one in registry.known().values() if one.origin == "built in"), key=lambda one: (one.simplicity, one.name))


def _ops_page() -> str:
    rows = [[f"[`{op.name}`]({op.name}.md)", op.summary, ", ".join(b.name for b in _ordered() if op.name in b.ops)] for op in CONTRACTS.values()]
    told = (
        "Tensors are `[B, T, H, D]` with any strides, states `[B, H, K, V]` in float32 (float64 with float64 operands), decays natural logarithms of at most 0. "
        "These pages are made from the contracts in `titans_backends/contracts/`; `titans-backends ops NAME` prints the same. "
        "What the letters mean: [concepts](../concepts.md#what-a-formulas-letters-are)."
    )
    return f"# The ops\n\n{told}\n\n{table(['op', 'what it computes', 'backends'], rows)}"


def _op_page(name: str) -> str:
    told = json.loads(CliRunner().invoke(app, ["ops", name, "--json"]).stdout)
    layouts = {
        one["name"]: " or ".join(f"`[{', '.join(layout.replace('*', '...').split())}]`" for layout in one["layouts"]) for one in told["arguments"]
    }
    arguments = [
        [f"`{one['name']}`", layouts[one["name"]], one["dtype"], "optional" if one["optional"] else "", "yes" if one["differentiable"] else ""]
        for one in told["arguments"]
    ]
    options = [[f"`{one['name']}`", f"`{one['default']}`", one["accepts"], "yes" if one["in_key"] else ""] for one in told["options"]]
    outputs = [
        [
            f"`{one['name']}`",
            f"`[{', '.join(one['dims'].replace('*', '...').split())}]`",
            f"as `{one['like']}`" if one["like"] else "float32; float64 with float64 operands",
            f"`{one['when']}=True`" if one["when"] else "",
        ]
        for one in told["outputs"]
    ]
    serving = [
        [f"`{backend.name}`", directions(backend, name), _runs_on(backend), ", ".join(f"`{one}`" for one in backend.requires) or "nothing more"]
        for backend in _ordered()
        if name in backend.ops
    ]
    key = ", ".join(f"`{field}`" + ("" if value is None else f" ({value})") for field, value in told["key"].items())
    reference = inspect.cleandoc(CONTRACTS[name].reference.__doc__ or "")
    parts = [
        f"# {name}\n\n{told['summary']}.",
        f"```python\n{told['signature']}\n```",
        f"## Formula\n\n```text\n{told['documentation']}\n```",
        f"The reference that every backend is checked against, in `titans_backends/contracts/{name}.py`: {reference}" if reference else "",
        f"## Arguments\n\n{table(['name', 'layout', 'dtype', '', 'gradient'], arguments)}",
        f"## Options\n\n{table(['name', 'default', 'accepts', 'in the key'], options)}" if options else "",
        f"## Outputs\n\n{table(['name', 'layout', 'dtype', 'asked for by'], outputs)}",
        f"## Backends\n\n{table(['backend', 'has', 'runs on', 'needs'], serving)}",
        f"Whether one serves a certain call, and if not why, says `titans-backends explain {name}`.",
        f"## What a measurement depends on\n\nThe length is {told['seq_len']}. The key: {key}. A value in brackets is the default, which a table leaves out.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _backends_page() -> str:
    parts = [
        "# The backends",
        "Each is optional but `eager`. A package that is missing disables its backend and nothing else; `titans-backends doctor` says what is usable on a machine.",
        table(
            ["backend", "what it is", "ops", "runs on", "install"],
            [
                [f"`{one.name}`", one.summary, f"{len(one.ops)} of {len(CONTRACTS)}", _runs_on(one), f"`{one.install}`" if one.install else ""]
                for one in _ordered()
            ],
        ),
        "## Which has which op\n",
        table(
            ["op", *(one.name for one in _ordered())],
            [
                [
                    f"[`{op}`](../ops/{op}.md)",
                    *({"forward": "forward", "forward and backward": "both"}[directions(one, op)] if op in one.ops else "" for one in _ordered()),
                ]
                for op in CONTRACTS
            ],
        ),
        "both: forward and backward. Untuned, the order is that of the manifests' ranks for the kind of device:",
        *(f"- {DEVICES[kind]}: {', '.join(one.name for one in registry.order(kind) if one.origin == 'built in')}" for kind in ("cpu", "cuda")),
    ]
    return "\n\n".join(parts).replace("\n\n- GPU", "\n- GPU") + "\n"


def _commands_page() -> str:
    group = typer.main.get_command(app)
    parts = ["# Every command", "What `--help` says, as of this version. What the verbs are for: [the command line](../command-line.md)."]
    parts += [text for name, found in group.commands.items() if name != "autotune" for text in _command(f"titans-backends {name}", found)]  # type: ignore[attr-defined]
    return "\n\n".join(parts) + "\n"


def _command(name: str, found: object, depth: int = 2) -> list[str]:
    told = inspect.cleandoc(found.help or "")  # type: ignore[attr-defined]
    parts = [f"{'#' * depth} {name}", told.replace("\b", "")]
    inside = getattr(found, "commands", None)
    if inside:
        return parts + [text for key, one in inside.items() for text in _command(f"{name} {key}", one, depth + 1)]
    rows = []
    for one in found.params:  # type: ignore[attr-defined]
        if one.name == "help" or getattr(one, "hidden", False):
            continue
        words = one.opts + one.secondary_opts if one.param_type_name == "option" else [one.metavar or one.name.upper()]
        metavar = f" {one.metavar}" if one.param_type_name == "option" and one.metavar and not getattr(one, "is_flag", False) else ""
        shown = getattr(one, "show_default", None)
        default = (
            shown
            if isinstance(shown, str)
            else ""
            if shown is False or one.default in (None, False, ()) or callable(one.default)
            else str(one.default)
        )
        rows.append([", ".join(f"`{word}{metavar}`" for word in words), one.help or "", default])
    return [*parts, table(["option", "what it does", "default"], rows)] if rows else parts


def _api_page() -> str:
    parts = ["# Python", "The public names, from their docstrings. `import titans_backends as tb` imports torch and no kernel package."]
    names = [name for name in tb.__all__ if not name.startswith("_") and name.lower() != name.upper()]
    kinds = {
        "Calling ops": ["get_op", "Op", "BoundOp", "ops"],
        "Choosing": ["use_backend", "policy", "autotune", "reset"],
        "Facts": ["Machine", "detect", "Signature"],
        "For a backend": ["Backend", "Candidate", "Verdict", "ACCEPTED", "refused", "CONTRACT_VERSION"],
    }
    placed = {name for group in kinds.values() for name in group}
    kinds["Errors"] = [name for name in names if name.endswith("Error")]
    kinds["More"] = [name for name in names if name not in placed and not name.endswith("Error")]
    for title, group in kinds.items():
        chosen = [name for name in group if name in names]
        if chosen:
            parts += [f"## {title}", *(f"::: titans_backends.{name}" for name in chosen)]
    for module in BEYOND:
        found = importlib.import_module(module)
        parts += [f"## {module}", inspect.cleandoc(found.__doc__ or "").split("\n\n")[0], *(f"::: {module}.{name}" for name in found.__all__)]
    return "\n\n".join(parts) + "\n"
