"""Tasks by name, with their data in hand before any model is loaded."""

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
"""Names for lists of tasks: those of the Mixture-of-Recursions paper's tables, and others that
recursive models are compared on."""

_MOST = 200


def expanded(names: Sequence[str]) -> list[str]:
    """Names as they were given, with commas or without, each once, `GROUPS` written out."""
    parts = [part for name in names for part in name.split(",") if part]
    return list(dict.fromkeys(name for part in parts for name in GROUPS.get(part, (part,))))


def resolved(
    names: Sequence[str], include_path: str | None, metadata: dict[str, Any]
) -> tuple[TaskManager, list[str]]:
    """A manager that knows the tasks, and their names and files: patterns and folders written out.

    include_path: folder of task files, which go before those of the same name. Raises `ValueError`
    for a name that is no task, group, tag, pattern, task file or folder of such.
    """
    if include_path is not None:
        fix = "Name the folder of your task files"
        ok = Path(include_path).is_dir()
        check(ok, "include_path", include_path, "is no directory", fix)
        # Reading the thousands of tasks that lm-eval brings takes many seconds.
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
        rule = "is no task that lm-eval knows, nor one of --include_path"
        fix = f"Did you mean {near[0]}? List them with: python -m lm_eval ls tasks"
        fail("tasks", name, rule, fix)
    return found


def loaded(specs: Sequence[str], manager: TaskManager) -> list[Any]:
    """Tasks and groups with their data, for `simple_evaluate`.

    specs: as `resolved`. Raises `ValueError` that names every task whose data cannot be had: then
    nothing is evaluated, so that no result is of fewer tasks than were asked for.
    """
    found: list[Any] = []
    lacking: dict[str, str] = {}
    for spec in specs:
        try:
            found += _top(manager.load([spec]))
        # Whatever reading, downloading or preparing data may raise, in any task's own code.
        except Exception as error:
            lacking[spec] = _why(error)
    rest = ",".join(spec for spec in specs if spec not in lacking)
    told = "; ".join(f"{spec}: {why}" for spec, why in lacking.items())
    fix = "Load them once where there is a network and bring its HF_HOME along, or give their data "
    fix += "as local files in task files of your own (--include_path)"
    fix += f", or leave them out: --tasks={rest}" if rest else ""
    rule = f"cannot be loaded, so nothing was evaluated ({told})"
    check(not lacking, "tasks", list(lacking), rule, fix)
    return found


def _why(error: BaseException) -> str:
    # Datasets wrap what happened in errors that only say where.
    while error.__cause__ is not None:
        error = error.__cause__
    told = " ".join(str(error).split())[:_MOST]
    return f"{type(error).__name__}: {told or 'it says no more; perhaps its data is empty'}"


def generation_settings(tasks: Sequence[Any], manager: TaskManager) -> list[dict[str, Any]]:
    """Those of the tasks in which something is written."""
    each = manager.load(list(tasks))["tasks"].values()
    written = [task for task in each if task.get_config("output_type") == "generate_until"]
    return [task.get_config("generation_kwargs") or {} for task in written]


def _top(loaded: dict[str, Any]) -> list[Any]:
    """The one group that was asked for, with what is in it, or the tasks."""
    inner = {child for children in loaded["group_map"].values() for child in children}
    groups = [group for name, group in loaded["groups"].items() if name not in inner]
    return groups or list(loaded["tasks"].values())
