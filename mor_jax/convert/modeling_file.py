"""The modelling file of exports: writes it, and refreshes that of an earlier export.

Every export has its own copy, which later releases of transformers may break. The copy ends with
its checksum: an edited copy is replaced only with --force.
"""

import dataclasses
import hashlib
import re
from importlib import resources
from pathlib import Path

from mor_jax.config.parsing import check
from mor_jax.convert.hf_config import AUTO_MAP, CONFIG, read_config
from mor_jax.convert.output_directory import PathLike, absolute, replace_file
from mor_jax.convert.output_manifest import MANIFEST, updated_manifest
from mor_jax.convert.sources.paths import check_path

MODELING = "modeling_mor.py"
_SEAL = "# SHA-256 of all lines above, as mor_jax wrote them: "
# SHA-256 of files from before they had a version number and a checksum line.
_UNNUMBERED = {
    "48aca225be9cad065513671c24fbbaf20b0df3656f17cf0d77eab1f9be43e268",
    "9ad8cf5c920c83d8e6902647534a688a9f29c1827492246ff883ef638be261e7",
    "724ec9b4a6d14e9789ae179faa45f27d9171d89de342a91294fb3d1cb5e6a345",
    "c45b05ca431f8addc30b17e6405220eaa37473431b4af9a228ed6b8199495b1a",
    "045052a7767dd03a8f034770b462e4b85484aa8563867256356a4f1176099191",
    "50c7139fbd749b30cf31f148a668ea96e1af76f4b07abc54298f465e55f8fc37",
}


def modeling_text() -> str:
    """The current modelling file, with its checksum line."""
    source = (resources.files("mor_jax.convert.hf") / MODELING).read_text(encoding="utf-8")
    return f"{source}\n{_SEAL}{_sum(source)}\n"


def modeling_version() -> str:
    """Its version and checksum: "version 2 (956c41b6)"."""
    return _version(modeling_text())


@dataclasses.dataclass(frozen=True)
class RefreshResult:
    """Result of a refresh.

    before, after: versions of the file, as text. changed: whether it was replaced. backup: the copy
    of an edited file; None if it was not edited.
    """

    path: Path
    before: str
    after: str
    changed: bool
    backup: Path | None = None


def refresh(path: PathLike, *, force: bool = False) -> RefreshResult:
    """Replaces an export's modelling file by the current one; weights and settings do not change.

    The replacement is atomic. force: also replaces an edited file, after making a backup, or a file
    of a newer mor_jax.

    Raises:
        ValueError: `path` is not an export of ours, its file was edited or is newer, or it cannot
            be written.
    """
    check_path("path", path)
    export = absolute(path)
    _check_export(export)
    target, new = export / MODELING, modeling_text()
    after = modeling_version()
    rule = f"must be a file, the export's {MODELING}"
    check(not target.is_dir(), "path", str(target), rule, "Move the directory away")
    if not target.is_file():
        _write(target, new)
        return RefreshResult(export, "no file", after, True)
    old = _read(target)
    if old == new:
        return RefreshResult(export, after, after, False)
    before, edited = _version(old), _is_edited(old)
    if not force:
        rule = "was changed after the export, and the changes would be lost"
        fix = "Pass --force: the changed file is kept as a backup"
        check(not edited, "path", str(target), rule, fix)
        rule = f"is {before}, newer than that of this mor_jax ({after})"
        fix = "Update mor_jax, or pass --force to downgrade"
        check(_number(old) <= _number(new), "path", str(target), rule, fix)
    backup = None
    if edited:
        backup = target.with_name(f"modeling_mor-edited-{_sum(old)[:8]}.py")
        replace_file(backup, target.read_bytes())
    _write(target, new)
    return RefreshResult(export, before, after, True, backup)


def _write(target: Path, text: str) -> None:
    replace_file(target, text.encode())
    # The file counts as unmodified again, so that --overwrite may replace the export.
    manifest = updated_manifest(target.parent, target.name)
    if manifest is not None:
        replace_file(target.with_name(MANIFEST), manifest)


def _check_export(export: Path) -> None:
    fix = "Give the directory of an export made with --to=hf"
    check(export.is_dir(), "path", str(export), "is not a directory", fix)
    config = read_config(export)
    where = str(export / CONFIG)
    kind = config.get("model_type")
    rule = "only exports of type mor have a modelling file of mor_jax"
    check(kind == "mor", f"{where}: model_type", kind, rule, fix)
    auto_map = config.get("auto_map")
    rule = f"must name the classes of {MODELING} beside it, or transformers loads another file"
    fix = f"Set it to {AUTO_MAP}"
    valid = isinstance(auto_map, dict) and all(
        auto_map.get(name) == to for name, to in AUTO_MAP.items()
    )
    check(valid, f"{where}: auto_map", auto_map, rule, fix)


def _read(target: Path) -> str:
    # Git on Windows converts line ends, which does not count as an edit.
    contents = target.read_bytes().replace(b"\r\n", b"\n")
    # Invalid UTF-8 counts as an edit.
    return contents.decode("utf-8", errors="surrogateescape")


def _is_edited(text: str) -> bool:
    body, separator, seal = text.rpartition(f"\n{_SEAL}")
    if separator:
        return seal.strip() != _sum(body)
    return _sum(text) not in _UNNUMBERED


def _number(text: str) -> int:
    match = re.search(r"^FILE_VERSION = (\d+)$", text, re.MULTILINE)
    return int(match[1]) if match else 0


def _version(text: str) -> str:
    number = _number(text)
    return f"version {number} ({_sum(text)[:8]})" if number else "an unnumbered version"


def _sum(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", errors="surrogateescape")).hexdigest()
