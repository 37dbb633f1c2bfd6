"""Calibrations of routing at inference, stored as `<workdir>/calibrations/*.json`.

A calibration belongs to the weights that it was measured on: other weights give other logits.
"""

import dataclasses
import hashlib
import json
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath

from mor_jax.checkpoint import manifest, pretrained, run_dir
from mor_jax.checkpoint.checkpointer import complete_steps, step_directory
from mor_jax.checkpoint.load_weights import RunWeights
from mor_jax.config import ModelConfig
from mor_jax.config.parsing import check, fail, parse
from mor_jax.files import write_atomic
from mor_jax.types import Params

DIRECTORY = "calibrations"
ALWAYS, NEVER = -1e30, 1e30
"""Thresholds that every token, and no token, reaches; JSON has no infinities."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """Parameters of causal routing, and the depths and loss that they give.

    weights: `fingerprint` of the weights it is for; step: theirs, for people. recursions: that the
    model ran. thresholds: expert-choice's logits, one a recursion. depth_bias: token-choice's
    addition to the score of each depth. Exactly one of the two is given. wanted, shares: share of
    all tokens that goes through each recursion, asked for and found on text that the calibration
    had not seen. loss: there, nats per token. text, tokens: what it was made from.
    """

    weights: str
    step: int
    recursions: int
    thresholds: tuple[float, ...] | None = None
    depth_bias: tuple[float, ...] | None = None
    wanted: tuple[float, ...]
    shares: tuple[float, ...]
    loss: float
    text: str
    tokens: int

    @property
    def depth(self) -> float:
        """Mean recursions per token, as measured."""
        return sum(self.shares)

    def apply(self, cfg: ModelConfig, params: Params) -> tuple[ModelConfig, Params]:
        """The model with `depth_bias` among its parameters, where token-choice adds such a bias."""
        if self.depth_bias is None:
            return cfg, params
        return with_depth_bias(cfg, params, self.depth_bias)


def with_depth_bias(
    cfg: ModelConfig, params: Params, bias: tuple[float, ...]
) -> tuple[ModelConfig, Params]:
    """A token-choice model that adds `bias` (one number a recursion) to its scores of depths.

    Loss-free balancing has a place for exactly this; what it learned stays in.
    """
    router = dict(params["router"])
    router["bias"] = jnp.asarray(bias, jnp.float32) + jnp.asarray(router.get("bias", 0.0))
    changed = dataclasses.replace(cfg.router, load_balancing="loss_free")
    return dataclasses.replace(cfg, router=changed), {**params, "router": router}


def _is_for(calibration: Calibration, run: RunWeights, step: int) -> bool:
    """Whether those of `step` of the same run are the weights that it was made for."""
    # Once there is a checkpoint, the weights that a run started from are not found any more.
    if step not in complete_steps(run.path):
        return False
    try:
        return calibration.weights == fingerprint(dataclasses.replace(run, step=step))
    except manifest.Damaged:
        return False


def fingerprint(run: RunWeights) -> str:
    """Short hash of the weights `found`: of the sizes and sums of the files that hold them."""
    contents = manifest.read(_weights_directory(run))
    encoded = json.dumps([contents["arrays"], contents["files"]], sort_keys=True)
    return hashlib.sha256(encoded.encode()).hexdigest()[:24]


def created(run: RunWeights) -> int:
    """Unix time, in seconds, at which the weights `found` were completely written."""
    return int((_weights_directory(run) / manifest.FILE).stat().mtime)


def _weights_directory(run: RunWeights) -> epath.Path:
    if run.step == 0:
        return run.path / pretrained.DIRECTORY
    return step_directory(run.path, run.step)


def path_of(directory: epath.PathLike, name: str) -> epath.Path:
    """The file of the calibration `name` of a run, or `name` itself where it is a path.

    Raises `ValueError` for an empty name.
    """
    check(name != "", "name", name, "must not be empty", "Try 'fast'")
    if name.endswith(".json") or "/" in name:
        return epath.Path(name).expanduser()
    return run_dir.resolved_path(directory) / DIRECTORY / f"{name}.json"


def save(path: epath.Path, calibration: Calibration) -> None:
    """Writes a calibration atomically; replaces an older one of the same name.

    Raises `ValueError` where the directory cannot be written, or another file has the name.
    """
    check_replaceable(path)
    text = json.dumps(dataclasses.asdict(calibration), indent=2) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, text)
    except OSError as error:
        fail("name", str(path), f"cannot be written ({error})", "Give --name=FILE.json elsewhere")


def check_replaceable(path: epath.Path) -> None:
    """Raises `ValueError` unless `path` is a .json file that is free or holds a calibration."""
    fix = "Give another --name, such as 'fast' or FILE.json"
    check(path.suffix == ".json", "name", str(path), "must end with .json where it is a path", fix)
    if not path.exists():
        return
    try:
        _values(json.loads(path.read_text()))["weights"]
    except (OSError, ValueError, TypeError, KeyError):
        fail("name", str(path), "is there and is no calibration; it is not replaced", fix)


def load(run: RunWeights, name: str) -> Calibration:
    """The calibration `name` (or the file of that path), once it fits the weights `found`.

    Raises:
        ValueError: it does not exist, is damaged, or was made for other weights.
    """
    path = path_of(run.path, name)
    if not path.is_file():
        known = sorted(other.stem for other in path.parent.glob("*.json"))
        rule = f"there is no {path}; {path.parent} has {known or 'none'}"
        fail("calibration", name, rule, "Make it with mor calibrate")
    again = "Make it again with mor calibrate"
    try:
        calibration = parse(Calibration, _values(json.loads(path.read_text())), f"{path}: ")
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
        fail("calibration", str(path), f"is damaged or no calibration ({error})", again)
    if calibration.weights != fingerprint(run):
        rule = f"was made for other weights (step {calibration.step}) than {run}"
        fix = "Calibrate these with mor calibrate"
        if _is_for(calibration, run, calibration.step):
            fix = f"Give --step={calibration.step}, or calibrate these"
        fail("calibration", str(path), rule, fix)
    _check_fits(calibration, run.cfg.model, str(path))
    return calibration


def _values(values: Any) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise TypeError(f"{type(values).__name__} in place of an object")
    return values


def _check_fits(calibration: Calibration, cfg: ModelConfig, path: str) -> None:
    """Raises `ValueError` unless every list has one finite number for each recursion."""
    kind = {"expert": "thresholds", "token": "depth_bias"}.get(cfg.router.kind, "")
    rule, fix = (
        f"needs one finite number for each of {calibration.recursions} recursions",
        "Make it again",
    )
    for name in (kind, "shares"):
        values = getattr(calibration, name, None) or ()
        ok = len(values) == calibration.recursions and bool(np.all(np.isfinite(values)))
        check(ok, f"{path}: {name}", values, rule, fix)
