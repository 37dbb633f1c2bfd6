"""Checks that all processes of a run have the same settings, code and devices."""

import functools
import hashlib
import importlib.metadata
import json
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from mor_jax.config.parsing import flatten_settings
from mor_jax.distributed.initialize import requested_processes

_MOST = 12
"""Largest number of differences in a message."""

_SOURCES, _COMMIT = "mor_jax sources", "mor_jax commit"


def agree_on_start(config: dict[str, Any], code: dict[str, str] | None = None) -> None:
    """Compares settings, code and devices of all processes; call it before anything is written.

    config: the resolved configuration. code: by default the result of `code_version`.

    Raises:
        ValueError: they differ; raised in every process, with the values of each process.
    """
    if jax.process_count() == 1:
        return
    _check_device_counts()
    mine = {**(code or code_version()), "device": jax.devices()[0].device_kind}
    launch = {"--processes": requested_processes()}
    plain = json.loads(json.dumps(config))
    everyone = gather({"launch": launch, "code": mine, "config": plain})
    fixes = {
        "launch": "Start each with the same --processes",
        "code": "Install the same code and packages on every host",
        "config": "Start every process with the same --config",
    }
    for part, fix in fixes.items():
        flats = [
            {name: repr(value) for name, value in flatten_settings(process[part]).items()}
            for process in everyone
        ]
        if lines := _differences(flats):
            more = [f"  and {len(lines) - _MOST} more"] if len(lines) > _MOST else []
            listed = "\n".join(lines[:_MOST] + more)
            raise ValueError(f"the processes of the run differ in their {part}:\n{listed}\n{fix}")


def code_version() -> dict[str, str]:
    """Versions of this process's code: a hash of our sources, the git commit, and package versions.

    The hash detects an edited tree, and works without git.
    """
    package = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\n".encode() + path.read_bytes())
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
    return {_SOURCES: digest.hexdigest()[:12], _COMMIT: _commit(package.parent), **versions}


def gather(value: Any) -> list[Any]:
    """Gathers a JSON value from every process, in order; all processes call it together."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = np.asarray(multihost_utils.process_allgather(np.int32(len(text)))).ravel()
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(text)] = text
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [json.loads(bytes(row[:n])) for row, n in zip(rows, lengths, strict=True)]


def _check_device_counts() -> None:
    counts = Counter(device.process_index for device in jax.devices())
    if len(set(counts.values())) > 1:
        listed = "".join(f"  process {i}: {counts[i]}\n" for i in sorted(counts))
        raise ValueError(
            f"the processes of the run have different numbers of devices:\n{listed}"
            "Give each the same number: check CUDA_VISIBLE_DEVICES, JAX_NUM_CPU_DEVICES, "
            "--devices, and for a broken device"
        )


def _differences(flats: list[dict[str, str]]) -> list[str]:
    """`setting: process 0: a; processes 1, 2: b` for each setting that differs."""
    lines = []
    keys = functools.reduce(set.union, map(set, flats), set())
    if len({values.get(_SOURCES) for values in flats}) == 1:
        # With equal sources the commit does not matter.
        keys.discard(_COMMIT)
    for key in sorted(keys):
        holders: dict[str, list[int]] = {}
        for i, values in enumerate(flats):
            holders.setdefault(values.get(key, "absent"), []).append(i)
        if len(holders) > 1:
            parts = [f"{_named(who)}: {value}" for value, who in holders.items()]
            lines.append(f"  {key}: {'; '.join(parts)}")
    return lines


def _named(processes: list[int]) -> str:
    numbers = ", ".join(map(str, processes[:_MOST])) + (", ..." if len(processes) > _MOST else "")
    return f"process{'es' if len(processes) > 1 else ''} {numbers}"


def _commit(root: Path) -> str:
    try:
        command = ["git", "-C", str(root), "rev-parse", "--short", "HEAD"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


__all__ = ["agree_on_start", "code_version", "gather"]
