"""Environments of their own for releases of transformers, which share one copy of torch."""

import os
import subprocess
import sys
import venv
from pathlib import Path

TORCH = "torch==2.13.0"
# Beside torch, what every release takes from the shared environment.
SHARED = (TORCH, "numpy>=2.0", "safetensors>=0.6")
# Only there when an installation went through.
DONE = "installed.txt"


def interpreter(home: Path, version: str) -> Path:
    """Python of an environment that has transformers `version`; made if it is not there yet."""
    shared = _made(home / "torch", SHARED)
    return _bin(_made(home / f"transformers-{version}", _packages(version), beside=shared))


def _packages(version: str) -> tuple[str, ...]:
    # accelerate is what the Trainer of transformers needs.
    return (f"transformers=={version}", "accelerate>=1.10")


def _made(place: Path, packages: tuple[str, ...], beside: Path | None = None) -> Path:
    """An environment with `packages`, which also imports those of `beside`."""
    told = "\n".join(packages)
    if (place / DONE).exists() and (place / DONE).read_text() == told:
        return place
    print(f"{place}: installing {', '.join(packages)}", file=sys.stderr, flush=True)
    venv.create(place, clear=True, with_pip=True)
    if beside is not None:
        # Own packages come first, so that only what is missing is taken from there.
        (_packages_of(place) / "shared.pth").write_text(f"{_packages_of(beside).resolve()}\n")
    command = [str(_bin(place)), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run([*command, *packages], capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise ValueError(
            f"{place}: {', '.join(packages)} could not be installed: {last}. Try pip by hand: "
            f"{_bin(place)} -m pip install ..."
        )
    (place / DONE).write_text(told)
    return place


def _bin(place: Path) -> Path:
    return place / "bin" / "python"


def _packages_of(place: Path) -> Path:
    python = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return place / "lib" / python / "site-packages"


def settings(modules: Path) -> dict[str, str]:
    """Environment variables for a process there: nothing of the caller's, nothing downloaded.

    modules: where transformers copies the code of exports to.
    """
    inherited = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    offline = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(modules)}
    # Two threads of two libraries on two cores would wait for each other.
    return inherited | offline | {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
