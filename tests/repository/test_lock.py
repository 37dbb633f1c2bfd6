"""requirements.lock: one version of every package, which fits every range, from no named index."""

from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
RANGES = sorted(ROOT.glob("requirements*.txt"))


def requirements(path: Path) -> list[Requirement]:
    lines = (line.split(" #")[0].strip() for line in path.read_text().splitlines())
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def locked() -> dict[str, str]:
    """Name -> version."""
    found = {}
    for pin in requirements(ROOT / "requirements.lock"):
        (version,) = pin.specifier
        assert version.operator == "==", f"{pin}: is not one version"
        # A second entry would mean one version here and another on other Pythons.
        assert pin.name not in found, f"{pin.name}: is locked twice"
        found[canonicalize_name(pin.name)] = version.version
    return found


@pytest.mark.parametrize("path", RANGES, ids=lambda path: path.name)
def test_every_requirement_is_locked_within_its_range(path):
    versions, listed = locked(), requirements(path)
    assert listed
    for wanted in listed:
        version = versions.get(canonicalize_name(wanted.name))
        assert version is not None, f"{wanted.name} of {path.name}: run ./launch/lock.sh"
        assert wanted.specifier.contains(version), f"{path.name} wants {wanted}, locked: {version}"


def test_the_lock_names_no_index_and_no_file():
    text = (ROOT / "requirements.lock").read_text()
    assert "://" not in text and "--" not in text and " @ " not in text


def test_the_lock_has_what_locked_packages_need():
    """No dependency of a package that is installed here is missing from the lock."""
    from importlib.metadata import distribution

    versions = locked()
    for name in ("jax", "flax", "orbax-checkpoint", "transformers", "lm-eval", "openai"):
        for line in distribution(name).requires or []:
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                assert canonicalize_name(needed.name) in versions, f"{name} needs {needed.name}"


def test_images_and_scripts_install_the_lock():
    places = [*ROOT.glob("docker/*.Dockerfile"), ROOT / "launch" / "tpu_vm" / "pod.sh"]
    for path in places:
        installs = [line for line in path.read_text().splitlines() if "pip install" in line]
        assert installs, path
        for line in installs:
            assert "-c requirements.lock" in line, f"{path}: {line}"
    assert "!requirements.lock" in (ROOT / ".dockerignore").read_text().splitlines()
