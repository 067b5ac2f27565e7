"""What the device is and can do: versions, clocks, bandwidth, matrix products, and attention by head width."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.checks import Check, said
from benchmarks.measuring import copy_bandwidth, median_seconds

HEADS = {"SD 1.5": {40: 4096, 80: 1024, 160: 256}, "SDXL": {64: 4096}}  # head width: tokens
CLOCKS = "clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu,memory.total,memory.used,driver_version"


def checks(device: torch.device, smoke: bool, seconds: float) -> list[Check]:
    found = [
        Check("clocks", lambda: clocks(device), 15),
        Check("copy bandwidth", lambda: bandwidth(device), 20),
        Check("matrix products", lambda: products(device, 128 if smoke else 8192), 20),
    ]
    for model, widths in HEADS.items():
        for width, tokens in widths.items():
            found.append(
                Check(
                    f"attention {model} {width}",
                    lambda m=model, w=width, t=tokens: attention(device, m, w, 32 if smoke else t),
                    30,
                )
            )
    return found


def clocks(device: torch.device) -> Iterator[dict[str, Any]]:
    if device.type != "cuda":
        yield {"check": "clocks", "value": "a CPU"}
        return
    has = torch.cuda.get_device_properties(device)
    yield {"check": "memory, GiB", "value": has.total_memory / 2**30}
    yield {"check": "compute capability", "value": f"{has.major}.{has.minor}, {has.multi_processor_count} processors"}
    if shutil.which("nvidia-smi") is None:
        yield {"check": "clocks", "value": "nvidia-smi is not there"}
        return
    words = ["nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader"]
    told = subprocess.run(words, capture_output=True, text=True, timeout=10, check=True).stdout.strip().splitlines()
    for name, value in zip(CLOCKS.split(","), told[0].split(",")):
        yield {"check": name, "value": value.strip()}


def bandwidth(device: torch.device) -> Iterator[dict[str, Any]]:
    yield {"check": "copy, GB/s", "value": copy_bandwidth(device) / 1e9}


def products(device: torch.device, size: int) -> Iterator[dict[str, Any]]:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        a = torch.randn(size, size, device=device).to(dtype)
        seconds = median_seconds(lambda a=a: a @ a, device)
        yield {"check": f"matrix product {size}, {str(dtype)[6:]}, TFLOP/s", "value": 2 * size**3 / seconds / 1e12}


def attention(device: torch.device, model: str, width: int, tokens: int) -> Iterator[dict[str, Any]]:
    """Which operation torch chooses, and for each: bits with and without a gradient, and of two backward passes."""
    from dpo.models.attention import BACKENDS, probe

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    query, key, value = (torch.randn(2, 8, tokens, width, device=device).to(dtype).requires_grad_() for _ in range(3))
    ours, _ = probe(device, dtype, [width], tuple(BACKENDS))
    for name, attend in {"torch's choice": torch.nn.functional.scaled_dot_product_attention, **BACKENDS}.items():
        label = f"attention {model}, head width {width}, {tokens} tokens: {name}"
        row: dict[str, Any] = {"check": label + (" (ours)" if name == ours.get(width) else "")}
        try:
            with torch.no_grad():
                free = attend(query, key, value)
            kept = attend(query, key, value)
            row["same bits with and without a gradient"] = torch.equal(free, kept)
            slope = torch.randn_like(kept)

            def backward(out: torch.Tensor = kept, slope: torch.Tensor = slope) -> tuple[torch.Tensor, ...]:
                return torch.autograd.grad(out, (query, key, value), slope, retain_graph=True)

            pairs = zip(backward(), backward())
            row["two backward passes, same bits"] = all(torch.equal(a, b) for a, b in pairs)
            with torch.no_grad():
                row["forward, us"] = 1e6 * median_seconds(lambda f=attend: f(query, key, value), device, 0.05)
            row["backward, us"] = 1e6 * median_seconds(backward, device, 0.05)
        except RuntimeError as error:  # an operation that does not serve this width is a finding, not a fault
            row["value"] = said(error)
        yield row
