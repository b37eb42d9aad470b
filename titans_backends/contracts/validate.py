"""Strict arguments: is this call what its contract says? Runs on a memo miss, never looks at values on a GPU unless asked.

Raises TypeError for a wrong kind of thing, ValueError for a wrong size, dtype, device or value; each names the argument, what it
got and what it accepts. NaN is never looked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor

from titans_backends.contracts.chunks import chunk_count, chunk_rows
from titans_backends.contracts.contract import Argument, Call, Contract, Option, arithmetic_dtype

__all__ = ["OPERAND_DTYPES", "bind_arguments", "check_devices", "check_indices", "check_option", "validate"]

OPERAND_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_KINDS: Mapping[str, tuple[type, ...]] = {"int": (int,), "float": (float, int), "bool": (bool,), "str": (str,)}


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def bind_arguments(contract: Contract, args: tuple[object, ...], kwargs: Mapping[str, object]) -> Call:
    """The call of these arguments; an unknown keyword, a missing or a doubled argument is a TypeError that lists the signature."""
    try:
        return contract.make_call(*args, **kwargs)
    except TypeError as error:
        unknown = [name for name in kwargs if name not in contract.parameters]
        told = f"got an unexpected keyword {', '.join(map(repr, unknown))}" if unknown else str(error).split(") ", 1)[-1].split("() ", 1)[-1]
        raise TypeError(f"{contract.name}: {told}; its parameters are {', '.join(contract.parameters)} (and backend)") from None


def validate(contract: Contract, call: Call) -> dict[str, int]:
    """Checks everything but the values of index tensors; returns the sizes bound to the contract's letters."""
    for option in contract.options:
        check_option(contract, option, getattr(call, option.name))
    tensors = _check_tensors(contract, call)
    check_devices(contract, tensors)
    _check_dtypes(contract, tensors)
    dims = _bind_dims(contract, tensors)
    _check_heads(contract, tensors, dims)
    _check_packing(contract, call, tensors, dims)
    if any("Z" in output.dims.split() for output in contract.outputs):
        chunk = int(getattr(call, "chunk_size"))  # noqa: B009  (a Call has no static fields)
        dims["Z"] = chunk_rows(dims["T"], chunk, dims["N"] if "cu_seqlens" in tensors else None)
    if dims.get("K") == 0 and "scale" in contract.option_by_name and getattr(call, "scale", 1.0) is None:
        raise ValueError(f"{contract.name}: scale=None stands for K ** -0.5, and K is 0 in q and k; pass a number, such as scale=1.0")
    contract.check(call, dims)
    return dims


def check_option(contract: Contract, option: Option, value: object) -> None:
    """Whether an option may have a value: TypeError or ValueError say what it may."""
    where = f"{contract.name}: {option.name}"
    if value is None and option.nullable:
        return
    if not isinstance(value, _KINDS[option.kind]) or (isinstance(value, bool) and option.kind != "bool"):
        accepted = {"int": "an int", "float": "a number", "bool": "True or False", "str": "a string"}[option.kind]
        raise TypeError(f"{where} must be {accepted}{' or None' if option.nullable else ''}, got {value!r} ({type(value).__name__})")
    if option.kind == "float" and isinstance(value, (int, float)):
        _check_number(where, value)
    if option.choices and value not in option.choices:
        raise ValueError(f"{where} must be one of {', '.join(map(repr, option.choices))}, got {value!r}")
    if option.minimum is not None and isinstance(value, int) and value < option.minimum:
        raise ValueError(f"{where} must be at least {option.minimum}, got {value}")


def _check_number(where: str, value: float) -> None:
    try:
        float(value)
    except OverflowError:
        raise ValueError(f"{where} must be a number that a float can hold, got an int of {len(str(value))} digits") from None


def _check_tensors(contract: Contract, call: Call) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for argument in contract.arguments:
        value = getattr(call, argument.name)
        where = f"{contract.name}: {argument.name}"
        if isinstance(value, Tensor):
            if value.is_nested:
                raise TypeError(f"{where} must be an ordinary tensor, got a nested one; pack its parts along T and pass cu_seqlens")
            if value.is_neg():
                raise TypeError(f"{where} is a lazily negated view, whose memory holds the opposite; pass it as .resolve_neg()")
            if value.layout != torch.strided:
                raise TypeError(f"{where} must be a strided tensor, got layout {value.layout}; call .to_dense() first")
            tensors[argument.name] = value
        elif argument.name == "alpha" and isinstance(value, (int, float)) and not isinstance(value, bool):
            _check_number(where, value)
        elif value is not None or not argument.optional or argument.name == "alpha":
            accepted = "a number or a torch.Tensor" if argument.name == "alpha" else "a torch.Tensor"
            raise TypeError(
                f"{where} must be {accepted}{' or None' if argument.optional and argument.name != 'alpha' else ''}, got {type(value).__name__}"
            )
    return tensors


def check_devices(contract: Contract, tensors: Mapping[str, Tensor]) -> None:
    """ValueError where a tensor is on another device than the first operand; cu_seqlens may stay on the CPU."""
    first = contract.operands[0]
    device = tensors[first].device
    for name, tensor in tensors.items():
        if tensor.device != device and not (name == "cu_seqlens" and tensor.device.type == "cpu"):
            also = " or cpu" if name == "cu_seqlens" else ""
            raise ValueError(
                f"{contract.name}: {name} is on {tensor.device}, but {first} is on {device}; it must be on {device}{also}: {name}.to({str(device)!r})"
            )


def _check_dtypes(contract: Contract, tensors: Mapping[str, Tensor]) -> None:
    first = contract.operands[0]
    dtype = tensors[first].dtype
    if dtype not in OPERAND_DTYPES:
        raise ValueError(f"{contract.name}: {first} has dtype {_names((dtype,))}; accepted are {_names(OPERAND_DTYPES)}")
    wide = arithmetic_dtype(dtype)
    for name, tensor in tensors.items():
        role = contract.argument_by_name[name].role
        accepted = {
            "operand": (dtype,),
            "gate": (dtype, torch.float32) if dtype != torch.float32 else (dtype,),
            "state": (torch.float32, torch.float64) if wide == torch.float64 else (torch.float32,),
            "index": (torch.int32, torch.int64),
        }[role]
        if tensor.dtype not in accepted:
            why = f" (that of {first})" if role == "operand" else ""
            raise ValueError(f"{contract.name}: {name} has dtype {_names((tensor.dtype,))}; it must be {_names(accepted).replace(', ', ' or ')}{why}")


def _matches(argument: Argument, tensor: Tensor) -> str | None:
    """The layout of the right rank, None where there is none."""
    for layout in argument.dims:
        letters = layout.split()
        if tensor.dim() == len(letters) or (layout.startswith("*") and tensor.dim() >= len(letters) - 1):
            return layout
    return None


def _bind_dims(contract: Contract, tensors: Mapping[str, Tensor]) -> dict[str, int]:
    dims: dict[str, int] = {}
    owner: dict[str, str] = {}
    leading: tuple[str, torch.Size] | None = None
    for name, tensor in tensors.items():
        argument = contract.argument_by_name[name]
        layout = _matches(argument, tensor)
        if layout is None:
            shapes = " or ".join(f"[{', '.join(d.split())}]" for d in argument.dims)
            raise ValueError(f"{contract.name}: {name} must have shape {shapes}, got {tuple(tensor.shape)} ({tensor.dim()} dimensions)")
        letters = layout.split()
        sizes = tuple(tensor.shape)
        if layout.startswith("*"):
            letters, tail = letters[1:], len(letters) - 1
            head, sizes = tensor.shape[:-tail], tuple(tensor.shape[-tail:])
            if leading is not None and head != leading[1]:
                raise ValueError(
                    f"{contract.name}: {name} has leading dimensions {tuple(head)}, but {leading[0]} has {tuple(leading[1])}; they must agree"
                )
            leading = leading or (name, head)
            dims["*"] = head.numel()
        for letter, size in zip(letters, sizes, strict=True):
            if letter == "N" and "cu_seqlens" not in tensors:
                letter = "B"
            if letter in ("M", "E"):
                continue
            if dims.setdefault(letter, size) != size:
                raise ValueError(
                    f"{contract.name}: {name} has {letter} = {size} in shape {tuple(tensor.shape)} ([{', '.join(layout.split())}]), "
                    f"but {owner[letter]} has {letter} = {dims[letter]} in shape {tuple(tensors[owner[letter]].shape)}"
                )
            owner.setdefault(letter, name)
    if "cu_seqlens" not in tensors and "B" in dims:
        dims["N"] = dims["B"]
    return dims


def _check_heads(contract: Contract, tensors: Mapping[str, Tensor], dims: Mapping[str, int]) -> None:
    if "G" not in dims:
        return
    groups, heads = dims["G"], dims["H"]
    if (groups == 0) != (heads == 0) or (groups and heads % groups):
        keys = " and ".join(name for name in ("q", "k") if name in tensors)
        values = "u" if "u" in tensors else "v"
        raise ValueError(
            f"{contract.name}: {keys} have {groups} heads and {values} has {heads}; the heads of q and k must divide those of {values} (q, k, v heads)"
        )


def _check_packing(contract: Contract, call: Call, tensors: Mapping[str, Tensor], dims: dict[str, int]) -> None:
    packed = tensors.get("cu_seqlens")
    if packed is not None:
        if dims["B"] != 1:
            raise ValueError(f"{contract.name}: cu_seqlens packs sequences along T, so B must be 1, got {dims['B']}; reshape to [1, B * T, ...]")
        if not len(packed):
            raise ValueError(f"{contract.name}: cu_seqlens must have N + 1 entries, from 0 to T = {dims['T']}, got none")
        if dims.setdefault("N", len(packed) - 1) != len(packed) - 1:
            raise ValueError(
                f"{contract.name}: a state has N = {dims['N']} rows, but cu_seqlens has {len(packed)} entries, N + 1, for {len(packed) - 1} sequences"
            )
        if packed.device.type == "cpu":
            check_indices(contract, call)
    else:
        _check_chunks(contract, call, tensors)


def _check_chunks(contract: Contract, call: Call, tensors: Mapping[str, Tensor]) -> None:
    """One entry for each chunk, `[B, M, ...]`; packed, their number depends on the values of cu_seqlens."""
    per_chunk = [name for name in tensors if "M" in contract.argument_by_name[name].dims[0].split()]
    if not per_chunk:
        return
    packed = tensors.get("cu_seqlens")
    chunk = int(getattr(call, "chunk_size"))  # noqa: B009  (a Call has no static fields)
    chunks = chunk_count(tensors[contract.operands[0]].shape[1], chunk, packed)
    for name in per_chunk:
        shape = tuple(tensors[name].shape)
        if shape[1] != chunks:
            how = "the sum of ceil(len / chunk_size)" if packed is not None else "ceil(T / chunk_size)"
            raise ValueError(f"{contract.name}: {name} has M = {shape[1]} chunks in shape {shape}; it must have {how} = {chunks}")


def check_indices(contract: Contract, call: Call) -> None:
    """The values of cu_seqlens, state_indices and position. On a GPU this waits for the device: only `verify` and TITANS_BACKENDS_CHECK=1 ask."""
    tensors = contract.tensors(call)
    packed = tensors.get("cu_seqlens")
    if packed is not None:
        ends, tokens = packed.tolist(), tensors[contract.operands[0]].shape[1]
        if ends[0] != 0 or ends[-1] != tokens:
            raise ValueError(f"{contract.name}: cu_seqlens must start at 0 and end at T = {tokens}, got {ends[0]} and {ends[-1]}")
        falls = [i for i, (left, right) in enumerate(pairwise(ends)) if right < left]
        if falls:
            raise ValueError(
                f"{contract.name}: cu_seqlens must not fall, but goes from {ends[falls[0]]} to {ends[falls[0] + 1]} at entry {falls[0] + 1}"
            )
        _check_chunks(contract, call, tensors)
    if "position" in tensors and tensors["position"].numel():
        _check_positions(contract, call, tensors["position"])
    slots = tensors.get("state_indices")
    if slots is not None:
        named, pool = slots.tolist(), tensors["state"].shape[0]
        wrong = [slot for slot in named if not -1 <= slot < pool]
        if wrong:
            raise ValueError(f"{contract.name}: state_indices must be -1 (skip) or in [0, {pool}), the pool's slots, got {wrong[0]}")
        used = [slot for slot in named if slot >= 0]
        twice = sorted({slot for slot in used if used.count(slot) > 1})
        if twice:
            raise ValueError(f"{contract.name}: state_indices names slot {twice[0]} more than once; every row needs a slot of its own")


def _check_positions(contract: Contract, call: Call, position: Tensor) -> None:
    """Inside a block, where the op has blocks; else any number of tokens."""
    least, most = int(position.min()), int(position.max())
    if "period" not in contract.option_by_name:
        if least < 0:
            raise ValueError(f"{contract.name}: position must be at least 0, got {least}; pass how many tokens each row has seen")
        return
    block = int(getattr(call, "chunk_size")) * int(getattr(call, "period"))  # noqa: B009
    if least < 0 or most >= block:
        raise ValueError(
            f"{contract.name}: position must be in [0, chunk_size * period) = [0, {block}), got {least if least < 0 else most}; pass position % {block}"
        )
