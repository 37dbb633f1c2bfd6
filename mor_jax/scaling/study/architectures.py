"""Architectures and sizes of a study, from the shipped configurations or the user's own.

An architecture is a name: `plain`, `recursive-3`, `mor-2`, `mor-3-shared`, `token-3`, or
`NAME=FILE[:CHOICES]` for a configuration file. A size is one that the file knows (`360m`) or a
width (`w64`), from which the other dimensions follow by `Shapes`.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

from mor_jax.config.old_names import rename_hint
from mor_jax.config.parsing import check, fail, flatten_settings
from mor_jax.planning.variants import load_configuration

FAMILIES = {"recursive": "recursive", "mor": "mor", "token": "mor"}
KV = {"shared": "shared", "update": "shared_update"}
_MOST = 100_000
"""Upper bound of widths and depths: larger values are typing errors."""
NAMED = "plain, recursive-3, mor-2, mor-3-shared, mor-3-update, token-3, or NAME=FILE[:CHOICES]"


@dataclasses.dataclass(frozen=True)
class Architecture:
    """name: in the study. file: its configuration. choices: the part after the colon."""

    name: str
    file: Path
    choices: str

    @classmethod
    def parse(cls, text: str, folder: Path) -> "Architecture":
        """From one of the forms above; `folder` holds the shipped configurations.

        Raises:
            ValueError: another form, or a file that does not exist.
        """
        name, separator, rest = text.partition("=")
        if separator:
            file, _, choices = rest.partition(":")
            architecture = cls(name, Path(file), choices)
        else:
            architecture = cls(name, *_shipped(text, folder))
        ok = re.fullmatch(r"[a-z0-9][a-z0-9_.-]*", architecture.name) is not None
        rule = "is part of run names: only lower-case letters, digits, - _ . are allowed"
        check(ok, "architectures", text, rule, f"Choose one of {NAMED}")
        exists, rule = architecture.file.is_file(), f"file {architecture.file} does not exist"
        check(exists, "architectures", text, rule, f"Choose one of {NAMED}")
        return architecture

    def config(self, size: str, overrides: dict[str, Any]) -> Any:
        """Its ConfigDict, unlocked, at a size that the file knows, or the debug size for a width.

        Raises `ValueError` for a size or a setting that it does not have.
        """
        named = "" if is_width(size) else f"size={size}"
        choices = ",".join(filter(None, (self.choices, named)))
        config = self._load(choices)
        settings = flatten_settings(config.to_dict())
        for setting in overrides:
            known = setting in settings
            fix = rename_hint(setting) or "docs/configuration.md lists them"
            check(known, f"config.{setting}", overrides[setting], "unknown setting", fix)
            try:
                config.update_from_flattened_dict({setting: overrides[setting]})
            except TypeError as error:
                rule = f"has the wrong type ({error})"
                fail(f"config.{setting}", overrides[setting], rule, "Write it as a Python literal")
        return config

    def _load(self, choices: str) -> Any:
        try:
            return load_configuration(self.file).get_config(choices).unlock()
        except ValueError:
            raise
        # A user's file may fail in any way.
        except Exception as error:
            rule = f"{self.file} is not a configuration file ({type(error).__name__}: {error})"
            fail("architectures", self.name, rule, "Name a file like those in configs/")


def _shipped(text: str, folder: Path) -> tuple[Path, str]:
    if text == "plain":
        return folder / "vanilla.py", ""
    match = re.fullmatch(r"(recursive|mor|token)-(\d+)(?:-(shared|update))?", text)
    if match is None:
        fail("architectures", text, "unknown architecture", f"Choose one of {NAMED}")
    family, recursions, kv = match.groups()
    choices = [f"recursions={recursions}"]
    choices += ["routing=token"] if family == "token" else []
    choices += [f"kv={KV[kv]}"] if kv else []
    return folder / f"{FAMILIES[family]}.py", ",".join(choices)


def is_width(size: str) -> bool:
    """Whether a size is a width, `w64`."""
    return re.fullmatch(r"w\d+", size) is not None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shapes:
    """How the dimensions of a model follow from its width.

    heads = width / head_dim; key/value heads: the largest divisor of the heads up to half of them;
    MLP: 8/3 of the width, up to the next multiple of 16; layers: `layers`, or the number nearest to
    width / `aspect`, in both cases the nearest that all architectures of the study can have, so
    that they have the same depth.
    """

    head_dim: int = 32
    layers: int | None = None
    aspect: float = 16.0

    def __post_init__(self) -> None:
        """Raises `ValueError` on a value out of range."""
        for name in ("head_dim", "layers", "aspect"):
            value = getattr(self, name)
            rule = f"must be in (0, {_MOST:,}]"
            check(value is None or 0 < value <= _MOST, name, value, rule, "Leave it out")

    def settings(self, size: str, layers: int) -> dict[str, int]:
        """Settings of the model of a width. Raises `ValueError` if heads do not divide it."""
        width = int(size[1:])
        rule = f"must be a multiple of head_dim={self.head_dim}"
        nearest = min(max(round(width / self.head_dim), 1), _MOST // self.head_dim) * self.head_dim
        ok = 0 < width <= _MOST and width % self.head_dim == 0 and size == f"w{width}"
        check(ok, "sizes", size, f"{rule}, at most {_MOST:,}", f"Try w{nearest}")
        heads = width // self.head_dim
        halves = [g for g in range(1, heads + 1) if heads % g == 0 and 2 * g <= max(heads, 2)]
        return {
            "hidden_size": width,
            "num_heads": heads,
            "num_kv_heads": halves[-1],
            "head_dim": self.head_dim,
            "intermediate_size": -(-8 * width // 48) * 16,
            "num_layers": layers,
        }

    def target_layers(self, size: str) -> float:
        """Layers by the shape rule alone, before matching the architectures' depths."""
        layers = float(self.layers or int(size[1:]) / self.aspect)
        rule = f"would have {layers:.3g} layers, more than {_MOST:,}"
        check(layers <= _MOST, "sizes", size, rule, "Choose another --aspect or give --layers")
        return layers


__all__ = ["Architecture", "Shapes", "is_width"]
