"""An engine that runs the CuPy backend's kernels on CPU tensors: g++ compiles a `.cu` with emulator.h, where every CUDA thread is a fibre.

It takes the launches of `backends/cupy/launch.py` as CuPy's engine does: `with launch.using(EmulatorEngine(folder)): ...`. Every other launch runs its
threads in reversed order, so that a missing barrier shows as other bits.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path

from filelock import FileLock
from titans_backends.backends.cupy import sources
from titans_backends.backends.cupy.launch import Blocks, Form, Loaded

__all__ = ["EmulatorEngine", "EmulatorError", "missing"]

HEADER = Path(__file__).with_name("emulator.h")
_OPTIONS = (
    "-std=c++20", "-Og", "-fPIC", "-fno-exceptions", "-fno-strict-aliasing", "-fwrapv", "-fsanitize=alignment", "-fno-sanitize-recover=alignment", "-w",
)  # fmt: skip
_LINKED = ("-shared", "-static-libgcc", "-Wl,-Bsymbolic")
"""Not for the header: g++ takes no precompiled one that was made with these."""


def _kept() -> Path:
    """What outlives the process."""
    return Path(tempfile.gettempdir()) / f"titans_backends_emulator_{os.getuid()}"


class EmulatorError(RuntimeError):
    """A kernel that does not compile as C++, or what the emulator found wrong with a launch."""


class _Launch(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("threads", ctypes.c_uint * 3),
        ("cluster", ctypes.c_uint),
        ("shared", ctypes.c_uint),
        ("reverse", ctypes.c_int),
    )


def missing() -> str | None:
    """Why kernels cannot be emulated here; None where they can."""
    if platform.machine() not in ("x86_64", "AMD64") or platform.system() != "Linux":
        return "the CUDA emulator switches its fibres in x86-64 assembly for Linux"
    return None if shutil.which("g++") else "g++ is not installed: apt install g++"


class EmulatorEngine:
    """Compiles each form once, into `folder`; the default one outlives the process, and an entry's name is the hash of all that goes into it."""

    def __init__(self, folder: Path | None = None, include: tuple[Path, ...] = ()) -> None:
        self.include = (sources.FOLDER, *include)
        self.folder = folder or _kept()
        self.launches = 0

    def device(self) -> int:
        """There is one."""
        return 0

    def stream(self, device: int) -> int:
        """There is one, and a launch on it is done when it returns."""
        return 0

    def load(self, form: Form) -> Loaded:
        """A form as a function in this process."""
        text = "\n".join(
            [*(f"#define {name} {int(value) if isinstance(value, bool) else value}" for name, value in form.macros), f'#include "{form.source}"']
        )
        text += f"\nEMULATE({form.kernel})\n"
        closure = "\n".join(sources.closure(form.source).values())
        name = hashlib.sha256("\n".join([text, closure, HEADER.read_text(), *_OPTIONS, *_LINKED]).encode()).hexdigest()[:32]
        library = self.folder / f"{name}.so"
        if not library.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{library}.lock"):  # another process of the same run may be at it
                if not library.exists():
                    self._compile(text, library, f"{form.source} {dict(form.macros)}")
        emulate = ctypes.PyDLL(str(library)).emulate
        emulate.restype = ctypes.c_char_p
        emulate.argtypes = (ctypes.POINTER(_Launch), ctypes.c_char_p, ctypes.c_size_t)
        cluster = int(dict(form.macros).get("CLUSTER", 1))

        def launch(blocks: Blocks, threads: int, shared: int, stream: int, layout: struct.Struct, values: tuple[object, ...]) -> None:
            self.launches += 1
            params = layout.pack(*values)
            shape = _Launch(blocks, (threads, 1, 1), cluster, shared, self.launches % 2)
            error = emulate(ctypes.byref(shape), params, len(params))
            if error:
                raise EmulatorError(
                    f"{form.kernel}: {error.decode()} ({blocks} blocks of {threads} threads, {shared} bytes shared, {dict(form.macros)})"
                )

        return launch

    def _compile(self, text: str, library: Path, what: str) -> None:
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            source, made = Path(folder) / "kernel.cpp", Path(folder) / "kernel.so"
            source.write_text(text)
            places = [f"-I{place}" for place in self.include]
            command = ["g++", *_OPTIONS, *_LINKED, "-include", str(_precompiled()), *places, str(source), "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise EmulatorError(f"{what} does not compile as C++:\n{done.stderr[:4000]}")
            os.replace(made, library)


def _precompiled() -> Path:
    """A copy of emulator.h with its precompiled form beside it, which g++ takes by itself: a third of a kernel's compilation."""
    text = HEADER.read_text()
    header = _kept() / hashlib.sha256("\n".join([text, *_OPTIONS]).encode()).hexdigest()[:32] / HEADER.name
    made = header.with_name(f"{HEADER.name}.gch")
    if not made.exists():
        header.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{made}.lock"):  # another process of the same run may be at it
            if not made.exists():
                header.write_text(text)
                command = ["g++", *_OPTIONS, "-x", "c++-header", str(header), "-o", f"{made}.new"]
                if subprocess.run(command, capture_output=True, check=False).returncode == 0:  # else the kernel's own compilation says what is wrong
                    os.replace(f"{made}.new", made)
    return header
