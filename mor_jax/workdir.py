"""The directory of a run: which run it belongs to, and what may change when the run goes on.

`config.json` in it holds the resolved configuration. A command with another one is refused before
anything is written, because weights, optimiser and data position would not belong together.
"""

import json
from typing import Any

from etils import epath

from mor_jax.config import TrainConfig
from mor_jax.manifest import write_atomic

CONFIG_FILE = "config.json"

# What a run may change between two starts: how long it runs, what it reports and keeps, and how
# the same numbers are computed on the hardware at hand. A trailing dot stands for a whole group.
_FREE = (
    "steps",
    "log.",
    "eval.",
    "checkpoint.",
    "mesh.",
    "sharding.",
    "hosts.",
    "profile.",
    "compilation_cache",
    "data.workers",
    "data.prefetch",
    "accumulate",
    "loss_chunk",
    "model.attention",
    "model.remat",
    "optim.max_skipped_steps",
)


def check_workdir(workdir: epath.PathLike, cfg: TrainConfig) -> bool:
    """Whether `workdir` holds a run of this configuration (True) or is free for one (False).

    Writes nothing. Raises `ValueError` when it is a file, a directory of something else, or the
    directory of a run whose configuration differs in more than a continued run may change; the
    message lists every such setting with both values.
    """
    path = epath.Path(workdir)
    if not path.exists():
        return False
    if not path.is_dir():
        raise ValueError(f"workdir={path}: is a file, a run needs a directory. Choose another")
    if not any(path.iterdir()):
        return False
    differing = _differences(_read(path), plain(cfg))
    if differing:
        raise ValueError(
            f"workdir={path}: holds a run of another configuration:\n"
            + "".join(f"  {key}: {old} there, {new} now\n" for key, old, new in differing)
            + "Choose another --workdir, give the settings of that run, or delete the directory "
            "to start over"
        )
    return True


def claim_workdir(workdir: epath.PathLike, cfg: TrainConfig) -> bool:
    """`check_workdir`, then makes the directory and records `cfg` in it. Returns the same."""
    exists = check_workdir(workdir, cfg)
    path = epath.Path(workdir)
    path.mkdir(parents=True, exist_ok=True)
    write_atomic(path / CONFIG_FILE, json.dumps(plain(cfg), indent=2) + "\n")
    return exists


def plain(cfg: TrainConfig) -> dict[str, Any]:
    """The configuration as JSON gives it back: tuples become lists."""
    return json.loads(json.dumps(cfg.to_dict()))


def _read(path: epath.Path) -> dict[str, Any]:
    file = path / CONFIG_FILE
    rule = "is not empty and not the directory of a run"
    fix = "Choose an empty or a new directory; nothing in it was changed"
    if not file.exists():
        raise ValueError(f"workdir={path}: {rule} (no {CONFIG_FILE}). {fix}")
    try:
        config = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"workdir={path}: {CONFIG_FILE} is damaged ({error}). {fix}") from error
    if not isinstance(config, dict) or not {"model", "optim", "data"} <= config.keys():
        raise ValueError(f"workdir={path}: {rule} ({CONFIG_FILE} is another program's). {fix}")
    return config


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, str, str]]:
    before, after = _flat(old), _flat(new)
    found = []
    for key in sorted(before.keys() | after.keys()):
        pair = [repr(side[key]) if key in side else "absent" for side in (before, after)]
        free = any(key == name or (name[-1] == "." and key.startswith(name)) for name in _FREE)
        if pair[0] != pair[1] and not free:
            found.append((key, *pair))
    return found


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        flat |= _flat(value, f"{path}.") if isinstance(value, dict) else {path: value}
    return flat
