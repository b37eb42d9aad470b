"""Inputs for a contract: ordinary and hostile cases, made from its tables, the same from the same seed on every machine.

Conformance runs all of them on a backend; the tuner's gate runs the ones that fit a bucket, and its timing inputs come from here too.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from titans_backends.contracts.contract import Argument, Call, Contract, OptionValue

__all__ = ["Case", "Variant", "build", "case_dims", "cases", "cotangents", "poisoned"]

Keys = Literal["silu", "correlated"]
Decay = Literal["mild", "zero", "hard", "fast", "fleeting"]
Beta = Literal["sigmoid", "extreme"]
View = Literal["contiguous", "transposed", "misaligned", "expanded"]


@dataclass(frozen=True, slots=True)
class Variant:
    """A set of options and optional tensors worth testing. `gentle`: its formula amplifies, so no hostile keys (the lam transform)."""

    name: str
    options: Mapping[str, OptionValue] = field(default_factory=dict)
    given: tuple[str, ...] = ()
    gentle: bool = False


@dataclass(frozen=True, slots=True)
class Case:
    """One set of inputs: sizes, options, which optional tensors are there, and what is unpleasant about it.

    `lengths` packs sequences of these lengths (B is then 1, T their sum). `keys="correlated"`: nearly parallel keys.
    `decay`: mild (-0.1 to 0), zero, hard (a mix of 0, -20 and mild), fast (-7 to -3), or fleeting (-7 to -6). `beta="extreme"`: a mix of 0, 1 and 2.
    """

    name: str
    B: int = 2
    T: int = 65
    G: int = 2
    H: int = 2
    K: int = 16
    V: int = 16
    dtype: torch.dtype = torch.float32
    options: Mapping[str, OptionValue] = field(default_factory=dict)
    given: tuple[str, ...] = ()
    lengths: tuple[int, ...] | None = None
    keys: Keys = "silu"
    decay: Decay = "mild"
    beta: Beta = "sigmoid"
    view: View = "contiguous"
    seed: int = 0

    def __str__(self) -> str:
        return self.name


def case_dims(case: Case) -> dict[str, int]:
    """The contract's letters for a case."""
    tokens = case.T if case.lengths is None else sum(case.lengths)
    batch = case.B if case.lengths is None else 1
    chunk = case.options.get("chunk_size")
    chunk = chunk if isinstance(chunk, int) else 64
    spans = [tokens] if case.lengths is None else list(case.lengths)
    sequences = batch if case.lengths is None else len(case.lengths)
    return {
        "B": batch, "T": tokens, "G": case.G, "H": case.H, "K": case.K, "V": case.V, "N": sequences,
        "E": sequences + 1, "W": 4, "F": max(1, case.K // 2), "J": case.K + case.V, "X": case.K + case.V + 1, "Y": 1,
        "M": sum(math.ceil(length / chunk) for length in spans), "P": batch + 3 if "state_indices" in case.given else batch,
    }  # fmt: skip


def _shape(argument: Argument, dims: Mapping[str, int], case: Case) -> tuple[int, ...]:
    layout = argument.dims[-1] if argument.name != "alpha" else argument.dims[case.seed % len(argument.dims)]
    if layout.startswith("*"):  # fused_uw: one matrix per chunk and head
        chunk = case.options.get("_chunk", 64)
        assert isinstance(chunk, int)
        chunk = min(chunk, max(dims["T"], 1))
        return (dims["B"], -(-dims["T"] // chunk), dims["H"], *({"C": chunk, **dims}[letter] for letter in layout.split()[1:]))
    return tuple(dims[letter] for letter in layout.split())


def _view(x: Tensor, view: View) -> Tensor:
    """The same numbers behind other strides."""
    if x.dim() < 2 or view == "contiguous":
        return x
    if view == "transposed":  # heads outside, as a projection that was viewed and transposed leaves them
        first = 0 if x.dim() < 4 else 1
        return x.transpose(first, first + 1).contiguous().transpose(first, first + 1)
    if view == "misaligned":
        flat = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
        return flat[1:].view(x.shape).copy_(x)
    return x[:, :1].expand(x.shape) if x.shape[1] else x  # stride 0 along the tokens


def _fill(argument: Argument, shape: tuple[int, ...], case: Case, dims: Mapping[str, int], source: torch.Generator) -> Tensor:
    """float64 (or integer) contents on the CPU."""

    def normal() -> Tensor:
        return torch.randn(shape, generator=source, dtype=torch.float64)

    def uniform() -> Tensor:
        return torch.rand(shape, generator=source, dtype=torch.float64)

    kind = argument.fill
    if kind == "cu_seqlens":
        assert case.lengths is not None
        return torch.tensor([0, *torch.tensor(case.lengths, dtype=torch.int64).cumsum(0).tolist()], dtype=torch.int32)
    if kind == "slots":
        slots = torch.randperm(dims["P"], generator=source)[: dims["B"]]
        if dims["B"] > 1:
            slots[-1] = -1
        return slots
    if kind == "position":
        return torch.randint(0, _block(case), shape, generator=source)
    if kind in ("query", "key"):
        x = normal()
        x = x + 4 * torch.randn(shape[-1], generator=source, dtype=torch.float64) if case.keys == "correlated" else torch.nn.functional.silu(x)
        norm: Tensor = x.norm(dim=-1, keepdim=True)
        return x / norm.clamp_min(1e-12)
    if kind == "beta":
        return torch.randint(0, 3, shape, generator=source).double() if case.beta == "extreme" else uniform()
    if kind == "log_decay":
        mild = -0.1 * uniform()
        if case.decay == "mild":
            return mild
        if case.decay == "fast":
            return 40 * mild - 3
        if case.decay == "fleeting":
            return 10 * mild - 6
        pick = torch.randint(0, 3, shape, generator=source)
        return torch.zeros(shape, dtype=torch.float64) if case.decay == "zero" else torch.where(pick == 0, 0.0, torch.where(pick == 1, -20.0, mild))
    if kind == "decay_factor":
        factor = 0.3 + 0.6 * uniform()
        return torch.where(uniform() < 0.2, 0.0, factor) if case.decay == "hard" else factor
    if kind in ("gate", "mixing"):
        return torch.sigmoid(normal())
    if kind == "lower_triangular":
        return (normal() / math.sqrt(shape[-1])).tril()
    return 0.3 * normal() if kind == "state" else normal()


def _block(case: Case) -> int:
    """Tokens in a block of `deep_core`."""
    chunk, period = case.options.get("chunk_size", 64), case.options.get("period", 4)
    assert isinstance(chunk, int)
    assert isinstance(period, int)
    return chunk * period


def _transformed(case: Case, made: dict[str, Tensor], source: torch.Generator) -> None:
    """u and w as `uw_transform` gives them, so that the recurrence stays bounded."""
    from titans_backends.contracts.uw_transform import UWTransform, reference

    beta = torch.rand(made["u"].shape[:3], generator=source, dtype=torch.float64)
    chunk = case.options.get("chunk_size", 64)
    assert isinstance(chunk, int)
    u, w = reference(UWTransform(made["k"], made["u"], beta, made.get("g"), chunk_size=chunk, cu_seqlens=made.get("cu_seqlens")))
    assert u is not None
    assert w is not None
    made["u"], made["w"] = u.contiguous(), w.contiguous()


def build(contract: Contract, case: Case, device: torch.device | str = "cpu", *, requires_grad: bool = False) -> Call:
    """The call of a case: values drawn in float64, rounded to the case's dtype; gates stay float32 below float64.

    On the device "meta" nothing is drawn: sizes only, for a signature without the memory.
    """
    source = torch.Generator().manual_seed(zlib.crc32(f"{contract.name} {case.name} {case.seed}".encode()))
    dims = case_dims(case)
    made: dict[str, Tensor] = {}
    for argument in contract.arguments:
        if argument.name == "cu_seqlens" and case.lengths is None:
            continue
        if argument.optional and argument.name not in (*case.given, "cu_seqlens"):
            continue
        shape = _shape(argument, dims, case)
        if torch.device(device).type == "meta" and argument.name != "cu_seqlens":
            made[argument.name] = torch.empty(shape, dtype=torch.int64 if argument.role == "index" else torch.float64, device="meta")
        else:
            made[argument.name] = _fill(argument, shape, case, dims, source)
    if contract.name == "slow_core" and torch.device(device).type != "meta":
        _transformed(case, made, source)
    for name, tensor in made.items():
        role = contract.argument_by_name[name].role
        if role == "index":
            made[name] = tensor.to(device) if name != "cu_seqlens" else tensor
            continue
        wide = torch.float64 if case.dtype == torch.float64 else torch.float32
        x = tensor.to(case.dtype if role == "operand" else wide).to(device)
        made[name] = (_view(x, case.view) if role != "state" else x).requires_grad_(requires_grad)
    options = {name: value for name, value in case.options.items() if not name.startswith("_")}
    return contract.make_call(**made, **options)


def cotangents(contract: Contract, call: Call, outputs: tuple[Tensor | None, ...], seed: int = 0) -> tuple[Tensor | None, ...]:
    """A random gradient for each output that is there, in its dtype."""
    source = torch.Generator().manual_seed(zlib.crc32(f"{contract.name} cotangent {seed}".encode()))
    return tuple(None if o is None else torch.randn(o.shape, generator=source, dtype=torch.float64).to(o.device, o.dtype) for o in outputs)


def poisoned(tensor: Tensor) -> Tensor:
    """Fills a floating tensor with NaN in place: what a kernel fails to write then shows."""
    return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor


def cases(contract: Contract, dtype: torch.dtype = torch.float32) -> Iterator[Case]:
    """The conformance cases: every variant at an ordinary length, then the hostile ones on the first variants."""
    step = contract.max_tokens is not None
    base = Case(contract.name, dtype=dtype, T=3 if step else 65)
    for variant in contract.variants:
        yield replace(base, name=variant.name, options=variant.options, given=variant.given)
    if contract.name == "fused_uw":
        hostile = [replace(base, name=f"T={t}", T=t) for t in (0, 1, 2, 63, 200)]
        hostile += [replace(base, name=view, view=view, V=24) for view in ("transposed", "misaligned", "expanded")]
        yield from (replace(case, name=f"plain, {case.name}") for case in (*hostile, replace(base, name="B=0", B=0)))
        return
    first = contract.variants[0]
    hostile = [
        replace(base, name="B=0", B=0),
        replace(base, name="grouped heads", G=1, H=3),
        replace(base, name="K != V", K=32, V=8),
        replace(base, name="K != V, odd", K=20, V=36),
        replace(base, name="transposed", view="transposed"),
        replace(base, name="misaligned", view="misaligned"),
        replace(base, name="expanded", view="expanded"),
        replace(base, name="correlated keys, beta 0 1 2", keys="correlated", beta="extreme", B=1),
        replace(base, name="g 0 and -20", decay="hard"),
        replace(base, name="g 0", decay="zero"),
    ]
    if step:
        hostile += [replace(base, name=f"T={t}", T=t) for t in (1, 2, 8)]
        yield from (replace(case, name=f"{first.name}, {case.name}", options=first.options, given=first.given) for case in hostile)
        return
    hostile += [replace(base, name=f"T={t}", T=t) for t in (0, 1, 2, 63)]
    hostile.append(replace(base, name="T=200, correlated keys", T=200, B=1, keys="correlated"))
    for case in hostile:
        yield replace(case, name=f"{first.name}, {case.name}", options=first.options, given=first.given)
    if "chunk_size" in contract.option_by_name:  # short chunks of wide heads take tiles that no other case takes
        narrow = {**first.options, "chunk_size": 16}
        yield replace(base, name=f"{first.name}, chunks of 16, heads of 128", T=40, B=1, G=1, H=2, K=128, V=128, options=narrow, given=first.given)
    if dtype.itemsize == 2:  # rows that no 16-byte copy takes, and tokens that a kernel for short sequences does not get
        yield replace(base, name=f"{first.name}, odd heads, several blocks", T=300, B=1, G=1, K=60, V=100, options=first.options, given=first.given)
    for variant in contract.variants if "cu_seqlens" in contract.argument_by_name else ():
        packed = replace(base, lengths=(33, 0, 1, 66, 0), options=variant.options, given=variant.given)
        yield replace(packed, name=f"{variant.name}, packed with empty sequences")
    gated = [variant for variant in contract.variants if "g" in variant.given]
    for variant in gated:  # g's gradient is a small difference of large sums, also over what several tokens of the last chunk leave in the state
        if variant is gated[0] or variant.options.get("qk_l2norm"):
            yield replace(base, name=f"{variant.name}, g -7 to -3", T=80, decay="fast", options=variant.options, given=variant.given)
