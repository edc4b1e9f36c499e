"""The tritonserver of the nvidia-pytriton wheel: where it is, and what its process needs."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import resource
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

from builder.errors import UserError
from triton_repo.leftovers import SHM

STACK_BYTES = 1 << 32
SHM_NEEDED = 64 << 20  # bytes; each model has its own region, which grows by 64 MB at a time at most
_PR_SET_PDEATHSIG = 1  # prctl(2)


def find_tritonserver() -> Path:
    """The tritonserver binary. Raises UserError where the wheel or the stub for this Python is missing."""
    spec = importlib.util.find_spec("pytriton")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("tritonserver is missing; pip install 'ffn-fusion[triton]'")
    root = Path(spec.submodule_search_locations[0]) / "tritonserver"
    stub = _stub(root)
    if not stub.is_file():
        raise UserError(f"{stub}: missing; use Python 3.10 to 3.12, for which nvidia-pytriton ships a stub")
    return root / "bin" / "tritonserver"


def _stub(root: Path) -> Path:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return root / "python_backend_stubs" / version / "triton_python_backend_stub"


def check_shared_memory() -> None:
    """Raises UserError where too little is free for the models."""
    free = shutil.disk_usage(SHM).free if SHM.is_dir() else 0
    if free < SHM_NEEDED:
        raise UserError(
            f"{SHM}: {free >> 20} MB are free, Triton's models need {SHM_NEEDED >> 20}; "
            "remove what fills it, or give the container a larger --shm-size"
        )


def prepare() -> None:
    """In the child before its program: it stops when the thread that started it is gone."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    deepen_stacks()


def deepen_stacks() -> None:
    """Triton 2.51 reads JSON by recursion: 100,000 brackets end a server whose stacks are the usual 8 MB.

    New threads get this much address space, and memory as they use it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
    wanted = STACK_BYTES if hard == resource.RLIM_INFINITY else min(STACK_BYTES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_STACK, (wanted, hard))


def backend_directory(binary: Path, scratch: Path) -> Path:
    """The Python backend with this Python's stub, laid out so that the stub finds the wheel's libraries.

    The stub's rpath is $ORIGIN/../../../../nvidia_pytriton.libs. A stub that misses a library would
    leave the server waiting for ever, so its libraries are checked here.
    """
    root = binary.parent.parent
    libraries = root.parent.parent / "nvidia_pytriton.libs"
    backends = scratch / "a" / "b" / "c"
    python = backends / "python"
    python.mkdir(parents=True)
    (scratch / "nvidia_pytriton.libs").symlink_to(libraries)
    for file in (*(root / "backends" / "python").iterdir(), _stub(root)):
        if file.is_file():
            shutil.copy2(file, python / file.name)
    stub = python / "triton_python_backend_stub"
    check = subprocess.run(["ldd", stub], env=environment(), capture_output=True, text=True, check=False)
    missing = [line.split()[0] for line in check.stdout.splitlines() if "not found" in line]
    if missing:
        raise UserError(
            f"triton_python_backend_stub: {missing[0]} is missing; install a Python built with it"
        )
    return backends


def environment() -> dict[str, str]:
    """PATH begins with this Python, which the stub embeds; its library directory is searched as well."""
    values = {k: v for k, v in os.environ.items() if not k.startswith(("OMPI_", "PMIX_"))}
    values["PYTHONDONTWRITEBYTECODE"] = "1"  # a repository stays as it was written
    values["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), values.get("PATH", "")])
    directory = sysconfig.get_config_var("LIBDIR")
    if directory and list(Path(directory).glob("libpython3*.so*")):
        values["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, [directory, values.get("LD_LIBRARY_PATH")]))
    return values
