"""Tasks by name; their data is loaded before any model."""

import difflib
import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval.tasks import TaskManager

from mor_jax.config.parsing import check, fail

GROUPS = {
    "paper": (
        "lambada_openai",
        "hellaswag",
        "piqa",
        "winogrande",
        "arc_easy",
        "arc_challenge",
        "mmlu",
    ),
    "paper_more": ("openbookqa", "truthfulqa"),
}
"""Named lists of tasks: those of the tables of the Mixture-of-Recursions paper, and others on which
recursive models are compared."""

_MOST = 200


def expanded(names: Sequence[str]) -> list[str]:
    """Unique names, split at commas, with `GROUPS` expanded."""
    parts = [part for name in names for part in name.split(",") if part]
    return list(dict.fromkeys(name for part in parts for name in GROUPS.get(part, (part,))))


def resolved(
    names: Sequence[str], include_path: str | None, metadata: dict[str, Any]
) -> tuple[TaskManager, list[str]]:
    """The task manager, and names and files with patterns and folders expanded.

    include_path: folder of task files, which override tasks of the same name. Raises `ValueError`
    for a name that is not a task, group, tag, pattern, task file or folder of task files.
    """
    if include_path is not None:
        fix = "Name the folder of your task files"
        ok = Path(include_path).is_dir()
        check(ok, "include_path", include_path, "is not a directory", fix)
        # Reading the thousands of tasks of lm-eval takes many seconds.
        own = TaskManager(include_path=include_path, include_defaults=False, metadata=metadata)
        if all(name in own.all_subtasks for name in names):
            return own, list(names)
    manager = TaskManager(include_path=include_path, metadata=metadata)
    return manager, [spec for name in names for spec in matching(name, manager)]


def matching(name: str, manager: TaskManager) -> list[str]:
    """Tasks and files that a name, pattern or folder stands for. Raises as `resolved`."""
    found = manager.match_tasks([name])
    if not found and Path(name).is_dir():
        name = str(Path(name) / "*.yaml")
    if name.endswith(".yaml"):
        found = sorted(str(Path(file).resolve()) for file in glob.glob(name))
        check(bool(found), "tasks", name, "matches no task file", "Check the path")
    if not found:
        near = difflib.get_close_matches(name, [*manager.all_tasks, *GROUPS], n=1, cutoff=0.0)
        rule = "is not a task of lm-eval or of --include_path"
        fix = f"Did you mean {near[0]}? List them with: python -m lm_eval ls tasks"
        fail("tasks", name, rule, fix)
    return found


def loaded(specs: Sequence[str], manager: TaskManager) -> list[Any]:
    """Tasks and groups with their data, for `simple_evaluate`.

    specs: as from `resolved`. Raises a `ValueError` that names every task whose data cannot be
    loaded: then nothing is evaluated, so no result has fewer tasks than requested.
    """
    found: list[Any] = []
    failed: dict[str, str] = {}
    for spec in specs:
        try:
            found += _top(manager.load([spec]))
        # Code of tasks may raise anything while it reads, downloads or prepares data.
        except Exception as error:
            failed[spec] = _why(error)
    rest = ",".join(spec for spec in specs if spec not in failed)
    reasons = "; ".join(f"{spec}: {why}" for spec, why in failed.items())
    fix = "Load them once on a machine with network access and copy its HF_HOME, or use task files "
    fix += "of your own with local data (--include_path)"
    fix += f", or leave them out: --tasks={rest}" if rest else ""
    rule = f"cannot be loaded, so nothing was evaluated ({reasons})"
    check(not failed, "tasks", list(failed), rule, fix)
    return found


def _why(error: BaseException) -> str:
    # The datasets library wraps the cause in errors that only say where.
    while error.__cause__ is not None:
        error = error.__cause__
    message = " ".join(str(error).split())[:_MOST]
    return f"{type(error).__name__}: {message or 'no message; its data may be empty'}"


def generation_settings(tasks: Sequence[Any], manager: TaskManager) -> list[dict[str, Any]]:
    """Generation settings of the tasks that generate text."""
    each = manager.load(list(tasks))["tasks"].values()
    written = [task for task in each if task.get_config("output_type") == "generate_until"]
    return [task.get_config("generation_kwargs") or {} for task in written]


def _top(loaded: dict[str, Any]) -> list[Any]:
    """The requested group with its members, or the tasks."""
    inner = {child for children in loaded["group_map"].values() for child in children}
    groups = [group for name, group in loaded["groups"].items() if name not in inner]
    return groups or list(loaded["tasks"].values())
