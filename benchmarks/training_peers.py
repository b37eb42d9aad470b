"""Whom the Triton backend's training is measured against: how their functions are found, called and compiled ahead. Imported by training.py.

FLA runs on its Triton kernels, but for the one of its gated backward that it refuses on Hopper with Triton 3.4 to 3.7.0: that one is TileLang's,
which calls nvcc. FlashQLA is TileLang throughout. Their compilers take minutes, so processes side by side fill their caches on disk first.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from typing import cast

import torch
from against_fla import Cell, hurry, problem
from device_timing import leaves_of
from torch import Tensor
from training_steps import RULE, Problem, Run, posed, step

from titans_backends.contracts.gated_delta_rule import GatedDeltaRule

__all__ = ["OTHERS", "Function", "loaded", "release", "settle", "step_of", "subject_of", "takes", "warmed"]

Function = Callable[..., tuple[Tensor, Tensor]]
OTHERS: Mapping[str, tuple[str, str, str]] = {
    "fla": ("fla.ops.gated_delta_rule", "chunk_gated_delta_rule", "fla-core"),
    "flash_qla": ("flash_qla", "chunk_gated_delta_rule", "flash_qla"),
    "fla_ungated": ("fla.ops.delta_rule", "chunk_delta_rule", "fla-core"),
}
"""Module, function and distribution of each peer."""
UNGATED = ("1x8192 16/32 D128", "1x8192 12/12 D32", "8x1024 16/32 D128", "1x32768 16/32 D128")
"""Where the delta rule without a gate is measured beside the gated one."""


def environment() -> None:
    """What makes FLA take its Triton kernels, and TileLang's for the one that it refuses; it reads this when it is imported, and at calls."""
    os.environ.pop("FLA_DISABLE_BACKEND_DISPATCH", None)
    os.environ.update(FLA_FLASH_QLA="0", FLA_TILELANG="1" if find_spec("tilelang") is not None else "0")


def loaded(names: Iterable[str]) -> dict[str, Function]:
    """The peers' functions; what cannot be had is said and left out."""
    environment()
    found: dict[str, Function] = {}
    for name in names:
        module, function, _ = OTHERS[name]
        if name == "fla" and wants_tilelang():
            print("fla: its gated backward refuses Triton's kernel on this card and tilelang is not installed: left out", file=sys.stderr, flush=True)
            continue
        try:
            found[name] = getattr(import_module(module), function)
        except Exception as error:  # whatever a stranger's import raises
            print(f"{name}: left out: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr, flush=True)
    return found


def wants_tilelang() -> bool:
    """Whether FLA's gated backward would refuse: Hopper, Triton 3.4 to 3.7.0, no TileLang."""
    release = tuple(int(part) for part in re.findall(r"\d+", version("triton"))[:3])
    return torch.cuda.get_device_capability()[0] == 9 and (3, 4) <= release < (3, 7, 1) and find_spec("tilelang") is None


def takes(name: str, cell: Cell, names: Iterable[str]) -> bool:
    """Whether a peer is measured on a cell."""
    if name == "flash_qla":
        return cell.D == 128
    return name != "fla_ungated" or "fla" not in names or str(cell) in UNGATED


def subject_of(name: str, subject: Problem) -> Problem:
    """What a peer computes: the cell's problem, or that without its decay, and with beta in q's dtype, as FLA's chunk_delta_rule has it."""
    if name != "fla_ungated":
        return subject
    call = cast(GatedDeltaRule, subject.call)
    return replace(subject, call=GatedDeltaRule(call.q, call.k, call.v, call.beta.to(call.q.dtype), output_final_state=True))


def step_of(name: str, function: Function, subject: Problem) -> Run:
    """A peer's forward and backward of its own problem. The ungated rule has no grouped heads: q and k are repeated before, and their gradients not summed."""
    given = leaves_of(RULE, subject.call)
    if name == "fla_ungated":
        for one in ("q", "k"):
            given[one] = given[one].detach().repeat_interleave(given["v"].shape[2] // given[one].shape[2], 2).requires_grad_()
        return step(subject, lambda x: function(x["q"], x["k"], x["v"], x["beta"], output_final_state=True), given)
    return step(subject, lambda x: function(x["q"], x["k"], x["v"], x["g"], x["beta"], output_final_state=True), given)


def settle(name: str, function: Function, cell: Cell) -> None:
    """Has a peer run once on 8192 tokens of a cell's heads: FLA tunes itself at its first call, and keeps the choice for every length."""
    step_of(name, function, subject_of(name, posed(RULE, "", problem(replace(cell, B=1, T=8192)))))()
    torch.cuda.synchronize()


def warm(name: str, cells: list[Cell], index: int, count: int) -> None:
    """In a process of its own: a share of what a peer compiles for some cells, into its cache on disk."""
    try:
        function = loaded([name])[name]
        hurry((index, count))
        if name == "flash_qla":
            compile_share(index, count)
        for cell in cells:
            step_of(name, function, subject_of(name, posed(RULE, "", problem(cell))))()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
    except Exception as error:  # the measured run says what it means
        print(f"{name} ahead, {cells[0]}, share {index} of {count}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr, flush=True)


def compile_share(index: int, count: int) -> None:
    """Lets FlashQLA build every n-th of its TileLang kernels, and launch none: a process gets through all of a step in its share of the time."""
    numbers: dict[str, int] = {}

    def shared(builder: Callable[..., object]) -> Callable[..., object]:
        def build(*args: object, **kwargs: object) -> object:
            key = repr((str(builder), args, sorted(kwargs.items())))
            if key not in numbers:
                numbers[key] = len(numbers)
                if numbers[key] % count == index:
                    builder(*args, **kwargs)
            return lambda *_, **__: None

        return build

    for module in [one for name, one in sys.modules.items() if name.startswith("flash_qla")]:
        for name in [name for name, value in vars(module).items() if name.startswith("tilelang_") and callable(value)]:
            setattr(module, name, shared(getattr(module, name)))


def warmed(names: Iterable[str], cells: Sequence[Cell], workers: int, limit_s: float) -> float:
    """Compiles for the peers in processes side by side, as long as they may take; returns the seconds."""
    start, jobs = time.perf_counter(), list[tuple[str, list[Cell], int, int]]()
    for name in sorted(names, key=lambda name: name != "flash_qla"):  # its kernels take longest
        kinds: dict[tuple[int, int, int, int], list[Cell]] = {}
        for cell in (cell for cell in cells if takes(name, cell, names)):
            kinds.setdefault((cell.B, cell.G, cell.H, cell.D), []).append(cell)
        for (batch, *_), found in kinds.items():
            if name == "flash_qla":  # which of its kernels it takes depends on the length
                jobs += [(name, found, index, 3) for index in range(3)]
            elif batch == 1:
                jobs += [(name, [replace(found[0], T=2048)], index, 3) for index in range(3)]
            else:  # Triton's kernels do not know the batch, TileLang's does
                jobs.append((name, [replace(found[0], B=1, T=2048), replace(found[0], T=1024)], 0, 3))
    running: list[tuple[BaseProcess, str]] = []
    while jobs or running:
        running = [(process, said) for process, said in running if process.is_alive()]
        while jobs and len(running) < workers:
            job = jobs.pop(0)
            started = get_context("spawn").Process(target=warm, args=job)
            started.start()
            running.append((started, f"{job[0]} {job[1][0]} {job[2]}"))
        if time.perf_counter() - start > limit_s:
            for process, _ in running:
                process.terminate()
            left = [said for _, said in running] + [f"{job[0]} {job[1][0]} {job[2]}" for job in jobs]
            print(f"peers ahead: cut off after {limit_s:.0f} s, left to the run: {', '.join(left)}", file=sys.stderr, flush=True)
            break
        time.sleep(0.1)
    return time.perf_counter() - start


def release(name: str) -> str:
    """A peer's version."""
    try:
        return version(OTHERS[name][2])
    except PackageNotFoundError:
        return "unknown"
