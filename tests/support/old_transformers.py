"""The oldest release of transformers that exports are promised to work with, for subprocesses."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from filelock import FileLock
from support.patience import PATIENCE

OLDEST = "4.56.0"
# Beside the other caches of the tests, which git ignores.
HOME = Path(__file__).parents[2] / ".pytest_cache"


def directory() -> Path:
    """Where it is installed, with what it needs beside torch and numpy; installs it once."""
    place = HOME / f"transformers-{OLDEST}"
    HOME.mkdir(exist_ok=True)
    with FileLock(f"{place}.lock"):
        if not place.exists():
            draft = place.with_suffix(".draft")
            shutil.rmtree(draft, ignore_errors=True)
            install = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(draft)]
            packages = [f"transformers=={OLDEST}", "tokenizers>=0.22,<0.23", "huggingface-hub<1"]
            subprocess.run([*install, *packages], check=True, capture_output=True, timeout=PATIENCE)
            # numpy and others are those of the tests; two of them in one process do not mix.
            for name in ("numpy", "numpy.libs"):
                shutil.rmtree(draft / name, ignore_errors=True)
            draft.rename(place)
    return place


def run(code: str, *args: str) -> str:
    """Standard output of `python -c code args` under the oldest release."""
    path = os.pathsep.join([str(directory()), str(Path(__file__).parents[2])])
    environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, *args]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
