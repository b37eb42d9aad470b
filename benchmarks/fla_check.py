"""FLA's layers and models against themselves on our ops, and our functions of FLA's signatures against FLA's in time.

    python benchmarks/fla_check.py [--device cuda] [--parts layers,decode,models,compiled,times] [--only PATTERN,...] [--seconds 900] [--json FILE]

Small random weights, nothing downloaded. layers: values and gradients against the float64 layer, FLA's own forward beside it, then with its calls
registered on our ops and swapped by `accelerate` on each backend; within 2e-3 in float32 and 2e-2 in bfloat16. decode: a prompt and single tokens
through FLA's cache, dense and padded on the left, and caches handed from FLA's layer to ours and back. models: logits of FLA's own models and of
transformers' Qwen3Next, registered and accelerated. compiled: `torch.compile(fullgraph=True)`. times: medians of interleaved calls, eager (events on
the stream, and the host's clock) and from a CUDA graph. OK and BAD are checks; LEFT is what the time did not reach, and what FLA itself refuses.
Exit status 1 where a check is BAD; a time is no failure. FLA's kernels compile and tune themselves at their first call, which takes most of the time.
`--only` takes what matches a shell pattern, so that processes side by side can share the work: a layer with its dtype in layers ("DeltaNet float32"),
a layer in decode and compiled, GatedDeltaNet, DeltaNet and Qwen3Next in models, a case in times ("fused_recurrent*"). `--untuned` leaves FLA's kernels
in their first configuration: as right, soon there, not fast, so not with times.
On a CPU, where they do not run, small layers are compared with the float64 layer alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

PARTS = ("compiled", "layers", "decode", "models", "times")
MISSING = "FLA is not installed. Type: pip install flash-linear-attention==0.6.0"


def part(name: str) -> Callable[..., None]:
    """The function behind a part's name; FLA is imported with it."""
    import fla_layers
    import fla_models
    import fla_times

    home = {"layers": fla_layers, "decode": fla_layers, "models": fla_models, "compiled": fla_models, "times": fla_times}
    return getattr(home[name], name)  # type: ignore[no-any-return]


def names(text: str) -> list[str]:
    """Parts, as they were typed."""
    given = [name for name in text.split(",") if name]
    if strange := [name for name in given if name not in PARTS]:
        raise argparse.ArgumentTypeError(f"{', '.join(strange)} is not among {', '.join(PARTS)}")
    return given


def untuned() -> None:
    """Triton's autotuner, which FLA uses, gets one configuration of each kernel."""
    from triton.runtime.autotuner import Autotuner

    pruned = Autotuner.prune_configs
    Autotuner.prune_configs = lambda self, given, *more: pruned(self, given, *more)[:1]


def main() -> int:
    """Runs the parts, tells and writes what they found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--parts", type=names, default=list(PARTS))
    parser.add_argument("--only", type=lambda text: text.split(","), default=["*"], metavar="PATTERN,...")
    parser.add_argument("--untuned", action="store_true", help="FLA's kernels in their first configuration")
    parser.add_argument("--seconds", type=float, default=900.0)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    if importlib.util.find_spec("fla") is None:
        print(MISSING, file=sys.stderr)
        return 2
    from fla_found import Found

    import titans_backends as tb

    warnings.simplefilter("ignore")  # FLA's, of deprecated torch names
    torch.backends.cuda.matmul.allow_tf32 = False
    if asked.untuned:
        if "times" in asked.parts:
            parser.error("--untuned makes FLA slow: name the --parts without times")
        untuned()
    found = Found(torch.device(asked.device), asked.seconds, asked.only)
    place = torch.cuda.get_device_name() if found.gpu else platform.machine()
    told = {"device": place, "torch": torch.__version__, "fla": importlib.import_module("fla").__version__, "titans_backends": tb.__version__}
    try:
        for name in asked.parts:
            if found.left < 10:
                found.say(None, f"{name}: no time left")
                continue
            found.attempt(name, part(name), found)
            print(f"{name} done at {found.passed:.0f} s", flush=True)
    finally:  # of an interrupted run what there is
        if asked.json is not None:
            asked.json.write_text(json.dumps({**told, "checks": found.checks, "times": found.times}, indent=1) + "\n", encoding="utf-8")
    print(
        f"{', '.join(f'{key} {value}' for key, value in told.items())}: {found.count('OK')} OK, {found.count('BAD')} BAD, {found.count('LEFT')} LEFT"
    )
    return 1 if found.count("BAD") else 0


if __name__ == "__main__":
    raise SystemExit(main())
