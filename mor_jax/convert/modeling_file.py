"""The modelling file of exports: how it is written, and how that of an earlier export is renewed.

Every export carries its own copy, which the releases of transformers that follow may outgrow. The
copy ends with a checksum of itself: only one that is as it was written is replaced unasked.
"""

import dataclasses
import hashlib
import re
from importlib import resources
from pathlib import Path

from mor_jax.config.parsing import check
from mor_jax.convert.directory import PathLike, absolute, replace_file
from mor_jax.convert.hf_config import AUTO_MAP, CONFIG, read_config
from mor_jax.convert.marker import MARKER, renew
from mor_jax.convert.sources.paths import check_path

MODELING = "modeling_mor.py"
_SEAL = "# SHA-256 of all lines above, as mor_jax wrote them: "
# Files of exports from before they had a number and a checksum of their own.
_UNNUMBERED = {
    "48aca225be9cad065513671c24fbbaf20b0df3656f17cf0d77eab1f9be43e268",
    "9ad8cf5c920c83d8e6902647534a688a9f29c1827492246ff883ef638be261e7",
    "724ec9b4a6d14e9789ae179faa45f27d9171d89de342a91294fb3d1cb5e6a345",
    "c45b05ca431f8addc30b17e6405220eaa37473431b4af9a228ed6b8199495b1a",
    "045052a7767dd03a8f034770b462e4b85484aa8563867256356a4f1176099191",
    "50c7139fbd749b30cf31f148a668ea96e1af76f4b07abc54298f465e55f8fc37",
}


def modeling_text() -> str:
    """The file as an export of today carries it."""
    source = (resources.files("mor_jax.convert.hf") / MODELING).read_text(encoding="utf-8")
    return f"{source}\n{_SEAL}{_sum(source)}\n"


def modeling_version() -> str:
    """What it is called: "version 2 (956c41b6)"."""
    return _version(modeling_text())


@dataclasses.dataclass(frozen=True)
class RefreshResult:
    """What became of an export's modelling file.

    before, after: its versions, in words. changed: whether it was replaced. kept: where an edited
    file went; None: it had not been edited.
    """

    path: Path
    before: str
    after: str
    changed: bool
    kept: Path | None = None


def refresh(path: PathLike, *, force: bool = False) -> RefreshResult:
    """Gives an export the modelling file of today; weights and settings stay as they are.

    The file is the old one or the new one at any time. force: also one that was edited, which is
    kept beside, or one of a newer mor_jax.

    Raises:
        ValueError: no export of ours is there, its file was edited or is newer, or it cannot be
            written.
    """
    check_path("path", path)
    place = absolute(path)
    _check_export(place)
    target, new = place / MODELING, modeling_text()
    after = modeling_version()
    rule = f"must be a file, that of the export's {MODELING}"
    check(not target.is_dir(), "path", str(target), rule, "Move the directory away")
    if not target.is_file():
        _write(target, new)
        return RefreshResult(place, "no file at all", after, True)
    old = _read(target)
    if old == new:
        return RefreshResult(place, after, after, False)
    before, edited = _version(old), _is_edited(old)
    if not force:
        rule = "was changed after the export, and would lose the changes"
        fix = "Give --force: the changed file is kept beside the new one"
        check(not edited, "path", str(target), rule, fix)
        rule = f"is {before}, newer than that of this mor_jax ({after})"
        fix = "Update mor_jax, or give --force to go back"
        check(_number(old) <= _number(new), "path", str(target), rule, fix)
    kept = None
    if edited:
        kept = target.with_name(f"modeling_mor-edited-{_sum(old)[:8]}.py")
        replace_file(kept, target.read_bytes())
    _write(target, new)
    return RefreshResult(place, before, after, True, kept)


def _write(target: Path, text: str) -> None:
    replace_file(target, text.encode())
    # It is what this project made again: the export may be replaced like any other.
    listed = renew(target.parent, target.name)
    if listed is not None:
        replace_file(target.with_name(MARKER), listed)


def _check_export(place: Path) -> None:
    fix = "Give the directory of an export made with --to=hf"
    check(place.is_dir(), "path", str(place), "is no directory", fix)
    config = read_config(place)
    where = str(place / CONFIG)
    kind = config.get("model_type")
    rule = "only exports of type mor carry a modelling file of ours"
    check(kind == "mor", f"{where}: model_type", kind, rule, fix)
    named = config.get("auto_map")
    rule = f"must name the classes of {MODELING} beside it, or transformers reads another file"
    fix = f"Set it to {AUTO_MAP}"
    ok = isinstance(named, dict) and all(named.get(name) == to for name, to in AUTO_MAP.items())
    check(ok, f"{where}: auto_map", named, rule, fix)


def _read(target: Path) -> str:
    # Git on Windows writes other line ends, which change nothing.
    contents = target.read_bytes().replace(b"\r\n", b"\n")
    # Bytes that are no text would be an edit like any other.
    return contents.decode("utf-8", errors="surrogateescape")


def _is_edited(text: str) -> bool:
    body, found, seal = text.rpartition(f"\n{_SEAL}")
    if found:
        return seal.strip() != _sum(body)
    return _sum(text) not in _UNNUMBERED


def _number(text: str) -> int:
    found = re.search(r"^FILE_VERSION = (\d+)$", text, re.MULTILINE)
    return int(found[1]) if found else 0


def _version(text: str) -> str:
    number = _number(text)
    return f"version {number} ({_sum(text)[:8]})" if number else "a version without a number"


def _sum(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", errors="surrogateescape")).hexdigest()
