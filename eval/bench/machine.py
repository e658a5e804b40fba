"""What a figure of speed was measured on: processor, GPU, threads, load."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

CPUINFO = Path("/proc/cpuinfo")
# The instruction sets that kernels of torch, oneDNN and MKL choose by.
_FLAGS = (
    *("avx", "avx2", "fma", "avx512f", "avx512bw", "avx512_bf16", "avx512_vnni", "avx512_fp16", "amx_tile", "amx_bf16"),
    *("asimd", "sve", "sve2", "bf16", "i8mm"),
)


def machine(device: torch.device | str) -> dict[str, Any]:
    """Return processor, GPU if `device` is one, threads of torch, load average of the last minute, and versions."""
    found: dict[str, Any] = {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    if torch.device(device).type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        found |= {"gpu": gpu.name, "gpu_memory_gib": round(gpu.total_memory / 2**30, 1)}
    return found


def processor() -> dict[str, Any]:
    """Return vendor, family, model, flags and cores of the processor, as far as the system tells; see `vector_unit_bits`."""
    first = CPUINFO.read_text().partition("\n\n")[0] if CPUINFO.is_file() else ""
    pairs = (line.partition(":") for line in first.splitlines())
    fields = {key.strip(): value.strip() for key, _, value in pairs}
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    found = {
        "name": fields.get("model name") or platform.processor() or platform.machine(),
        "vendor": fields.get("vendor_id") or fields.get("CPU implementer"),
        **{
            name: _number(fields.get(key))
            for name, key in (("family", "cpu family"), ("model", "model"), ("stepping", "stepping"))
        },
        "flags": [flag for flag in _FLAGS if flag in flags],
        "cores": os.cpu_count(),
        "virtual_machine": "hypervisor" in flags,
    }
    found["vector_unit_bits"] = vector_unit_bits(found["vendor"], found["family"], found["model"], found["flags"])
    return {name: value for name, value in found.items() if value is not None}


def vector_unit_bits(vendor: str | None, family: int | None, model: int | None, flags: list[str]) -> int | None:
    """Return the width of the floating-point units, in bits, or None where it is not known from family and model.

    Flags do not tell it: AMD family 25 with AVX-512 (Zen 4) runs an instruction of 512 bits in two passes of 256.
    """
    if "avx512f" not in flags:
        return 256 if "avx2" in flags else None
    if vendor == "GenuineIntel":
        return 512
    if vendor == "AuthenticAMD" and family == 25:
        return 256
    # Zen 5: full width in servers; parts for notebooks have the same family and units of 256 bits.
    if vendor == "AuthenticAMD" and family == 26 and model is not None and model < 0x20:
        return 512
    return None


def describe_machine(found: dict[str, Any]) -> str:
    """Return a record's machine on one line."""
    cpu = found["processor"]
    family = f" (family {cpu['family']}, model {cpu['model']})" if "family" in cpu else ""
    name = found.get("gpu") or f"{cpu['name']}{family}"
    loads = [str(found[key]) for key in ("load_average", "load_average_after") if key in found]
    return f"{name}, {found['threads']} of {cpu['cores']} cores, load average {' to '.join(loads)}"


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isdigit() else None
