"""The same run as a plain, a recursive and a routed model."""

import importlib.util
from pathlib import Path
from typing import Any

from mor_jax.config.parsing import check

_TAKES = {
    "vanilla": ("size",),
    "recursive": ("size", "recursions", "sharing", "kv"),
    "mor": ("size", "recursions", "sharing", "kv", "routing"),
}


def sibling_variants(choices: str, folder: Path, overrides: dict[str, Any]) -> list[Any]:
    """The configurations vanilla, recursive and mor of `folder`, with the same settings.

    choices: what stands behind the colon of --config=FILE:...; each takes those that it knows.
    overrides: dotted setting -> value.

    Raises:
        ValueError: the folder has no such configurations.
    """
    found = []
    for name, takes in _TAKES.items():
        path = folder / f"{name}.py"
        rule = "comparing needs vanilla.py, recursive.py and mor.py beside the configuration"
        check(path.exists(), "config", str(path), rule, "Use one of configs/")
        items = [item for item in choices.split(",") if item.partition("=")[0] in takes]
        # Updating keys and values needs routing: a recursive model shares all of them.
        items = [
            "kv=shared" if (name, item) == ("recursive", "kv=shared_update") else item
            for item in items
        ]
        config = load_configuration(path).get_config(",".join(items))
        config.update_from_flattened_dict(overrides)
        found.append(config)
    return found


def load_configuration(path: Path) -> Any:
    """The module of a configuration file."""
    spec = importlib.util.spec_from_file_location(f"compared_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
