"""The cubins on disk: compiled once, compiled again when they are damaged or another NVRTC made them, and never in the way of a call."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from titans_backends.backends.cupy import compile as cubins
from titans_backends.backends.cupy.launch import Form

FORM = Form("fused_uw.cu", "fused_uw", (("DTYPE", "float"), ("ALIGNED", True)))


class NVRTCError(Exception):
    """What the compiler raises."""


class FakeNVRTC:
    """CuPy's binding as far as `compile` uses it: counts compilations, and refuses what is told to be wrong."""

    NVRTCError = NVRTCError

    def __init__(self) -> None:
        self.version, self.compiled, self.wrong = (13, 0), 0, False
        self.alive: list[int] = []
        self.seen: list[tuple[str, ...]] = []

    def getVersion(self) -> tuple[int, int]:
        return self.version

    def createProgram(self, text: str, name: str, headers: list[bytes], names: list[bytes]) -> int:
        assert "__global__" in text
        assert len(headers) == len(names)
        assert all(isinstance(each, bytes) for each in (*headers, *names))
        self.alive.append(len(self.alive))
        return self.alive[-1]

    def compileProgram(self, program: int, options: tuple[str, ...]) -> None:
        self.seen.append(options)
        if self.wrong:
            raise NVRTCError("NVRTC_ERROR_COMPILATION (6)")
        self.compiled += 1

    def getCUBIN(self, program: int) -> bytes:
        return f"cubin {self.version} {self.seen[-1]}".encode()

    def getProgramLog(self, program: int) -> str:
        return "fused_uw.cu(1): error: everything"

    def destroyProgram(self, program: int) -> None:
        self.alive.remove(program)


@pytest.fixture
def nvrtc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeNVRTC:
    """A compiler that is not there, and a cache folder of this test's own."""
    fake = FakeNVRTC()
    monkeypatch.setattr(cubins, "_nvrtc", lambda: fake)
    monkeypatch.setattr(cubins.platformdirs, "user_cache_dir", lambda name: str(tmp_path / name))
    return fake


def entry() -> Path:
    """The one file in the folder."""
    (path,) = cubins.folder().glob("*.cubin")
    return path


def test_a_form_is_compiled_once_for_all_processes(nvrtc: FakeNVRTC) -> None:
    assert cubins.cubin(FORM, "sm_90a") == cubins.cubin(FORM, "sm_90a")
    assert nvrtc.compiled == 1
    assert not nvrtc.alive, "a program was not destroyed"
    assert [path.name for path in cubins.folder().iterdir()] == [entry().name], "something else was left in the folder"


def test_options_name_the_architecture_and_every_macro(nvrtc: FakeNVRTC) -> None:
    cubins.cubin(FORM, cubins.architecture(120))
    assert nvrtc.seen == [("--gpu-architecture=sm_120", "--std=c++17", "-DDTYPE=float", "-DALIGNED=1")]
    assert cubins.architecture(90) == "sm_90a"


@pytest.mark.parametrize("change", ["architecture", "macro", "NVRTC", "source"])
def test_what_goes_into_a_cubin_is_in_its_name(nvrtc: FakeNVRTC, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cubins.cubin(FORM, "sm_80")
    form, arch = FORM, "sm_80"
    if change == "architecture":
        arch = "sm_89"
    elif change == "macro":
        form = Form(FORM.source, FORM.kernel, (("DTYPE", "Half"), ("ALIGNED", True)))
    elif change == "NVRTC":
        nvrtc.version = (13, 1)
    else:
        texts = cubins.closure(FORM.source)
        monkeypatch.setattr(cubins, "closure", lambda name: {**texts, "ptx.cuh": texts["ptx.cuh"] + "\n"})
    cubins.cubin(form, arch)
    assert nvrtc.compiled == 2
    assert len(list(cubins.folder().glob("*.cubin"))) == 2


@pytest.mark.parametrize("damage", [b"", b"\0" * 20, "flip", "cut"])
def test_a_damaged_file_is_named_and_replaced(nvrtc: FakeNVRTC, damage: bytes | str) -> None:
    good = cubins.cubin(FORM, "sm_90a")
    content = entry().read_bytes()
    if damage == "flip":
        damage = content[:40] + bytes([content[40] ^ 1]) + content[41:]
    entry().write_bytes(content[:-1] if damage == "cut" else damage)  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match=rf"{entry().name} is damaged .* compiled again"):
        assert cubins.cubin(FORM, "sm_90a") == good
    assert entry().read_bytes() == content
    assert cubins.cubin(FORM, "sm_90a") == good
    assert nvrtc.compiled == 2


def test_a_folder_that_cannot_be_written_costs_a_warning_and_a_compilation(nvrtc: FakeNVRTC) -> None:
    cubins.folder().parent.mkdir(parents=True, exist_ok=True)
    cubins.folder().write_text("a file where the folder should be")  # the tests may run as root, whom no permission stops
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"cannot be (read|written) .*(XDG_CACHE_HOME|readable)"):
            assert cubins.cubin(FORM, "sm_90a")
    assert nvrtc.compiled == 2


def test_a_file_that_is_written_half_is_never_seen(nvrtc: FakeNVRTC, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(UserWarning, match="No space left on device"):
        assert cubins.cubin(FORM, "sm_90a")
    assert not list(cubins.folder().iterdir())


def test_threads_that_compile_at_once_leave_one_whole_file(nvrtc: FakeNVRTC) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = set(pool.map(lambda _: cubins.cubin(FORM, "sm_90a"), range(16)))
    assert len(made) == 1
    assert entry().read_bytes()[32:] == made.pop()


def test_what_does_not_compile_says_so_with_the_log_and_keeps_nothing(nvrtc: FakeNVRTC) -> None:
    nvrtc.wrong = True
    with pytest.raises(cubins.CompileError, match=r"(?s)fused_uw\.cu with .*-DDTYPE=float.*error: everything"):
        cubins.cubin(FORM, "sm_90a")
    assert not nvrtc.alive
    assert not cubins.folder().exists()
