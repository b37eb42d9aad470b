"""A short hash of the code behind a candidate, which changes when its behaviour may, and not with comments or docstrings.

Python files count by their syntax tree, CUDA files by their text without comments and with runs of blanks as one. No module is
imported for it (its parent packages are), and the hash is the same on every machine and Python version that parses the file alike.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

__all__ = ["join_hashes", "source_hash"]

_CUDA = (".cu", ".cuh")
_PINNED = "=="
_DIGITS = 12
_BLANK = r"(?:\s|//(?:\\\n|[^\n])*|/\*.*?\*/)+"
_CUDA_TOKENS = re.compile(
    rf"""(?P<blank>{_BLANK})|R"(?P<mark>[^()\\\s]*)\(.*?\)(?P=mark)"|"(?:\\.|[^"\\\n])*"|\d[\w'.]*|'(?:\\.|[^'\\\n])+'""", re.DOTALL
)


def source_hash(names: Sequence[str]) -> str:
    """Twelve hex digits over the modules named, in any order; a name ending in .cu or .cuh is a path, relative to the first module's folder, and one
    with == in it a distribution at its version, as fla-core==0.6.0, which counts by that text.

    Raises ModuleNotFoundError for a name without a file, SyntaxError for a file that does not parse.
    """
    pinned = [name for name in names if _PINNED in name]
    modules = [name for name in names if not name.endswith(_CUDA) and name not in pinned]
    parts = {name: _file_digest(_module_file(name)) for name in modules}
    for name in names:
        if name.endswith(_CUDA):
            path = _module_file(modules[0]).parent / name if modules else Path(name)
            parts[Path(name).name] = _file_digest(path)
    text = "\n".join([*(f"{name} {digest}" for name, digest in sorted(parts.items())), *sorted(pinned)])
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]


def join_hashes(forward: str, backward: str) -> str:
    """The source hash of a training pair, as `Entry.source` holds it."""
    return f"{forward}+{backward}"


def _module_file(name: str) -> Path:
    try:
        spec = importlib.util.find_spec(name)
    except ValueError:  # a module without a spec, made by hand
        spec = None
    if spec is None or spec.origin is None or not spec.has_location:
        raise ModuleNotFoundError(f"no file for the module {name!r}, whose source a candidate names", name=name)
    return Path(spec.origin)


def _file_digest(path: Path) -> str:
    status = path.stat()
    return _digest(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=512)
def _digest(path: Path, _mtime_ns: int, _size: int) -> str:
    content = path.read_bytes()
    if path.suffix == ".py":
        content = "".join(_walk(ast.parse(content, str(path)))).encode()
    elif path.suffix in _CUDA:
        content = _bare_cuda(content.decode("utf-8", "surrogateescape")).encode("utf-8", "surrogateescape")
    return hashlib.sha256(content).hexdigest()


def _walk(node: object) -> Iterator[str]:
    """A syntax tree as text: like ast.dump, but without what is empty or new in some Python version, and without bare strings."""
    if isinstance(node, ast.Constant):
        yield ascii(node.value)
    elif isinstance(node, ast.AST):
        yield f"{type(node).__name__}("
        for name, value in ast.iter_fields(node):
            if value is None or value == [] or name in ("type_comment", "type_ignores", "ctx"):
                continue
            yield f"{name}="
            yield from _walk([part for part in value if not _text(part, "")] if isinstance(node, ast.JoinedStr) else value)  # 3.12 adds some
        yield ")"
    elif isinstance(node, list):
        yield "["
        for item in node:
            if not (isinstance(item, ast.Expr) and _text(item.value)):  # a docstring, or one under an attribute
                yield from _walk(item)
                yield ","
        yield "]"
    else:
        yield ascii(node)


def _text(node: ast.AST, only: str | None = None) -> bool:
    """Whether a node is a string, or one certain string."""
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and only in (None, node.value)


def _bare_cuda(text: str) -> str:
    def shrink(match: re.Match[str]) -> str:
        blank = match["blank"]
        if blank is None:
            return match[0]
        return "\n" if "\n" in re.sub(r"/\*.*?\*/", "", blank, flags=re.DOTALL) else " "  # a line's end matters to the preprocessor

    return _CUDA_TOKENS.sub(shrink, text).strip()
