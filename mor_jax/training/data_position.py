"""Position in the data when a run resumes from a checkpoint.

Settings may have changed since it was saved (`--allow_changes`), also by a process that was killed
before its first save: the settings in the checkpoint count, not those of the last start.
"""

import contextlib
from collections.abc import Mapping
from typing import Any

from etils import epath

from mor_jax import data
from mor_jax.checkpoint import manifest
from mor_jax.checkpoint.checkpointer import complete_steps, step_directory
from mor_jax.config import TrainConfig
from mor_jax.config.parsing import check, fail

_SAME = ("num_workers", "prefetch")
"""Settings of `data` that change no sequence."""


def resumed_position(
    facts: Mapping[str, Any], cfg: TrainConfig, place: data.DataPosition, fingerprint: str
) -> data.DataPosition:
    """Position of a checkpoint in the data, under the settings `cfg`.

    facts: position, config and extra of the checkpoint. place: the beginning of the data of `cfg`;
    fingerprint: its hash.

    Raises:
        ValueError: these settings do not determine which sequences were read, or the text changed.
    """
    config, extra = facts["config"], facts["extra"]
    notes = extra.get("data")
    if notes is None and not _changed(config["data"], cfg):
        # Earlier versions stored one hash of everything that the sequences depend on.
        manifest.check_data(facts, fingerprint)
    jumps = [(first, end) for first, end in extra.get("jumps", ())]
    return data.resume_position(
        data.DataPosition.of(facts["position"], notes, config), place, jumps
    )


def check_state(facts: Mapping[str, Any], cfg: TrainConfig, state: Mapping[str, Any]) -> None:
    """Checks that a run can resume from the state of a checkpoint.

    facts: step and arrays of the checkpoint. state: shapes of the arrays of `cfg`, as checkpoints
    hold them.

    Raises:
        ValueError: the arrays differ, or its step is after the last one of `cfg`.
    """
    rule = f"the run has finished step {facts['step']}"
    fix = f"Give {facts['step']} or more, or start another run with --branch=RUN@STEP"
    check(facts["step"] <= cfg.steps, "steps", cfg.steps, rule, fix)
    saved, wanted = facts["arrays"], manifest.describe(state)
    names = [n for n in sorted(saved.keys() | wanted.keys()) if saved.get(n) != wanted.get(n)]
    if names:
        here, now = (arrays.get(names[0], "none") for arrays in (saved, wanted))
        rule = f"the checkpoint of step {facts['step']} holds {here} there, this model {now}"
        rule += f" ({len(names)} arrays differ)" if len(names) > 1 else ""
        fix = "Give the settings of model and optim that the run has, or choose another --workdir"
        fail(names[0], now, rule, fix)


def newest(workdir: epath.Path) -> dict[str, Any] | None:
    """Facts of the newest readable checkpoint; None without one."""
    for step in reversed(complete_steps(workdir)):
        # Restoring reports a damaged checkpoint, and falls back to the previous one too.
        with contextlib.suppress(manifest.Damaged):
            return manifest.read(step_directory(workdir, step))
    return None


def _changed(before: Mapping[str, Any], cfg: TrainConfig) -> bool:
    now = cfg.to_dict()["data"]
    names = (before.keys() | now.keys()) - set(_SAME)
    return any(_plain(before.get(name)) != _plain(now.get(name)) for name in names)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


__all__ = ["check_state", "newest", "resumed_position"]
