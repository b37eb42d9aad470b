"""From CUDA C++ to a cubin: NVRTC for one architecture, and the folder on disk that keeps what it made.

An entry's name is the hash of the source with all it includes, the options and NVRTC's version; it opens with the hash of its own content, and what
does not match it is compiled again, with a warning. Needs no GPU and no CUDA
toolkit: NVRTC is a wheel of its own, which CUDA builds of torch bring, and no header is included.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import warnings
from pathlib import Path

import platformdirs

from .launch import Form
from .sources import closure

__all__ = ["CompileError", "architecture", "cubin", "folder", "options"]

_DIGEST_BYTES = 32


class CompileError(RuntimeError):
    """NVRTC refused a kernel; the message holds its log."""


def folder() -> Path:
    """Where cubins are kept: beside the user's tables, on Linux below XDG_CACHE_HOME."""
    return Path(platformdirs.user_cache_dir("titans_backends")) / "cubins"


def architecture(sm: int) -> str:
    """NVRTC's name for a compute capability, 90 for 9.0: Hopper's own instructions need the `a`."""
    return f"sm_{sm}a" if sm == 90 else f"sm_{sm}"


def options(form: Form, arch: str) -> tuple[str, ...]:
    """NVRTC's options for a form."""
    macros = (f"-D{name}={int(value) if isinstance(value, bool) else value}" for name, value in form.macros)
    return (f"--gpu-architecture={arch}", "--std=c++17", *macros)


def cubin(form: Form, arch: str) -> bytes:
    """The form compiled for an architecture, from disk where it was compiled before. CompileError with NVRTC's log where it does not compile."""
    nvrtc = _nvrtc()
    texts, chosen = closure(form.source), options(form, arch)
    version = ".".join(map(str, nvrtc.getVersion()))
    told = "\0".join([version, *chosen, *(part for item in texts.items() for part in item)])
    path = folder() / f"{form.kernel}_{arch}_{hashlib.sha256(told.encode()).hexdigest()[:24]}.cubin"
    found = _read(path)
    if found is None:
        found = _compile(nvrtc, form, texts, chosen)
        _write(path, found)
    return found


def _nvrtc():  # type: ignore[no-untyped-def]
    """CuPy's binding of NVRTC; importing CuPy first lets it find the library in its wheels."""
    import cupy  # noqa: F401
    from cupy_backends.cuda.libs import nvrtc

    return nvrtc


def _compile(nvrtc, form: Form, texts: dict[str, str], chosen: tuple[str, ...]) -> bytes:  # type: ignore[no-untyped-def]
    (name, text), *headers = texts.items()
    program = nvrtc.createProgram(text, name, [header.encode() for _, header in headers], [each.encode() for each, _ in headers])
    try:
        nvrtc.compileProgram(program, chosen)
        return bytes(nvrtc.getCUBIN(program))
    except nvrtc.NVRTCError as error:
        raise CompileError(f"{form.source} with {' '.join(chosen)}: {error}\n{nvrtc.getProgramLog(program)}") from error
    finally:
        nvrtc.destroyProgram(program)


def _read(path: Path) -> bytes | None:
    """What a file holds, if it is whole."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        warnings.warn(f"{path} cannot be read ({error.strerror}), so it is compiled in every process; make it readable or remove it", stacklevel=2)
        return None
    body = content[_DIGEST_BYTES:]
    if body and hashlib.sha256(body).digest() == content[:_DIGEST_BYTES]:
        return body
    warnings.warn(f"{path} is damaged ({len(content)} bytes that do not match their hash); it is compiled again and replaced", stacklevel=2)
    return None


def _write(path: Path, content: bytes) -> None:
    """The whole file or none of it; a folder that cannot be written costs a compilation per process, and a warning."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(hashlib.sha256(content).digest() + content)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        warnings.warn(f"{path} cannot be written ({error.strerror}), so kernels are compiled in every process; set XDG_CACHE_HOME", stacklevel=2)
