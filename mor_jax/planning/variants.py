"""The same run as a vanilla, a recursive and a MoR model."""

import importlib.util
from pathlib import Path
from typing import Any

from mor_jax.config.parsing import check

_CHOICES = {
    "vanilla": ("size",),
    "recursive": ("size", "recursions", "sharing", "kv"),
    "mor": ("size", "recursions", "sharing", "kv", "routing"),
}


def sibling_variants(choices: str, folder: Path, overrides: dict[str, Any]) -> list[Any]:
    """The configurations vanilla, recursive and mor of `folder`, with the same settings.

    choices: the text after the colon of --config=FILE:...; each configuration takes the choices it
        supports.
    overrides: dotted setting -> value.

    Raises:
        ValueError: one of the three files does not exist.
    """
    configs = []
    for name, supported in _CHOICES.items():
        path = folder / f"{name}.py"
        rule = "does not exist; comparing needs vanilla.py, recursive.py and mor.py in one folder"
        check(path.exists(), "config", str(path), rule, "Use a configuration from configs/")
        items = [item for item in choices.split(",") if item.partition("=")[0] in supported]
        # Only a routed model updates shared keys and values; a recursive model shares all of them.
        items = [
            "kv=shared" if (name, item) == ("recursive", "kv=shared_update") else item
            for item in items
        ]
        config = load_configuration(path).get_config(",".join(items))
        config.update_from_flattened_dict(overrides)
        configs.append(config)
    return configs


def load_configuration(path: Path) -> Any:
    """Imports a configuration file as a module."""
    spec = importlib.util.spec_from_file_location(f"compared_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
