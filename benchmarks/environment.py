"""What a run was made on: hardware, driver, versions, commit."""

import os
import pathlib
import platform
import subprocess

import torch

__all__ = ["describe_environment", "git_commit"]


def describe_environment(device: torch.device) -> dict[str, str]:
    """Hardware and software of this run, as a flat dictionary in the order of the report."""
    described = _describe_gpu(device) if device.type == "cuda" else {"hardware": _cpu_name()}
    described["torch"] = torch.__version__
    described["triton"] = _version("triton")
    described["flexdecode"] = _version("flexdecode")
    described["python"] = platform.python_version()
    described["system"] = f"{platform.system()} {platform.machine()}"
    described["commit"] = git_commit(pathlib.Path(__file__).resolve().parents[1])
    return described


def _describe_gpu(device: torch.device) -> dict[str, str]:
    properties = torch.cuda.get_device_properties(device)
    memory = properties.total_memory / 2**30
    query = ["nvidia-smi", f"--id={device.index or 0}", "--query-gpu=driver_version", "--format=csv,noheader"]
    return {
        "hardware": f"{properties.name}, {properties.multi_processor_count} SMs, {memory:.0f} GiB",
        "driver": _output(query) or "unknown",
        "CUDA": torch.version.cuda or "none",
        "cuDNN": str(torch.backends.cudnn.version()),
    }


def _cpu_name() -> str:
    cores = f"{os.cpu_count()} CPU cores"
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        if names:
            return f"{names[0]}, {cores}"
    return f"{platform.processor() or platform.machine()}, {cores}"


def _version(package: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed as a package"


def git_commit(folder: pathlib.Path) -> str:
    """The commit of a checkout, and whether there are changes; "unknown" without a git repository."""
    here = ["git", "-C", str(folder)]
    commit = _output([*here, "rev-parse", "--short=12", "HEAD"])
    if not commit:
        return "unknown"
    changed = _output([*here, "status", "--porcelain", "--untracked-files=no"])
    return f"{commit} with uncommitted changes" if changed else commit


def _output(command: list[str]) -> str:
    """What a command prints, or "" if it cannot run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
