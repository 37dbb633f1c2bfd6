"""launch/*.sh with a stand-in interpreter: what they install, when, and what they start."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from support.patience import PATIENCE

ROOT = Path(__file__).parents[2]

# Records every call; makes a .venv with itself inside when asked for one.
FAKE_PYTHON = """#!/usr/bin/env bash
echo "$@" >> "$CALLS"
if [[ "$1" == -m && "$2" == venv ]]; then
  rm -rf "${@: -1}"
  mkdir -p "${@: -1}/bin"
  cp "$0" "${@: -1}/bin/python"
elif [[ "$1" == -c && "$2" == *version_info* ]]; then
  exit "${TOO_OLD:-0}"
elif [[ "$1" == --version ]]; then
  echo "Python 3.14.0"
elif [[ "$1" == -m && "$2" == pip && "$3" == install ]]; then
  exit "${PIP_FAILS:-0}"
fi
"""


@pytest.fixture
def clone(tmp_path):
    """The launch scripts and requirements alone, in a path with a space, and a fake Python."""
    root = tmp_path / "a clone"
    shutil.copytree(ROOT / "launch", root / "launch", ignore=shutil.ignore_patterns("*.py"))
    for path in [*ROOT.glob("requirements*"), ROOT / "pyproject.toml"]:
        shutil.copy(path, root)
    python = tmp_path / "fakepython"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    return root


def run(clone: Path, script: str, *args: str, **variables: str) -> tuple[int, str, list[str]]:
    """Exit code, output and the interpreter's calls since the last run."""
    calls = clone.parent / "calls"
    calls.unlink(missing_ok=True)
    environment = {
        "PATH": os.environ["PATH"],
        "CALLS": str(calls),
        "PYTHON": str(clone.parent / "fakepython"),
        **variables,
    }
    done = subprocess.run(
        [str(clone / "launch" / script), *args],
        cwd=clone.parent,
        env=environment,
        text=True,
        capture_output=True,
        timeout=PATIENCE,
    )
    made = calls.read_text().splitlines() if calls.exists() else []
    return done.returncode, done.stdout + done.stderr, made


def installs(calls: list[str]) -> list[str]:
    return [call for call in calls if "pip install" in call]


def test_quickstart_makes_the_environment_and_starts_training(clone):
    code, _, calls = run(clone, "quickstart.sh", "--config.steps=5")
    assert code == 0
    assert any("-m venv" in call and str(clone / ".venv") in call for call in calls)
    assert len(installs(calls)) == 1 and str(clone / "requirements.txt") in installs(calls)[0]
    assert installs(calls)[0].endswith(f"--editable {clone}")
    expected = f"{clone}/launch/train.py --config={clone}/configs/quickstart.py"
    assert calls[-1] == f"{expected} --workdir={clone}/runs/quickstart --config.steps=5"


def test_second_quickstart_installs_nothing(clone):
    run(clone, "quickstart.sh")
    code, _, calls = run(clone, "quickstart.sh")
    assert code == 0 and not installs(calls)
    assert not any("venv --" in call for call in calls)


def test_changed_requirements_are_installed(clone):
    run(clone, "quickstart.sh")
    with (clone / "requirements.txt").open("a") as file:
        file.write("another\n")
    _, _, calls = run(clone, "quickstart.sh")
    assert len(installs(calls)) == 1


def test_the_versions_are_those_of_the_lock(clone):
    _, _, calls = run(clone, "quickstart.sh")
    assert f"--constraint {clone}/requirements.lock" in installs(calls)[0]
    assert "--upgrade" not in installs(calls)[0]
    with (clone / "requirements.lock").open("a") as file:
        file.write("another==1.0\n")
    _, _, calls = run(clone, "quickstart.sh")
    assert len(installs(calls)) == 1, "a lock that changed is installed"


def test_latest_upgrades_an_environment_of_its_own_every_time(clone):
    run(clone, "quickstart.sh")
    for _ in range(2):
        code, _, calls = run(clone, "quickstart.sh", LATEST="1")
        assert code == 0 and "--upgrade --upgrade-strategy=eager" in installs(calls)[0]
        assert "requirements.lock" not in installs(calls)[0]
    assert (clone / ".venv-latest").is_dir()
    _, _, calls = run(clone, "quickstart.sh")
    assert not installs(calls), "the locked environment is as it was"


def test_a_failed_installation_stops_and_is_tried_again(clone):
    code, _, calls = run(clone, "quickstart.sh", PIP_FAILS="1")
    assert code != 0 and "train.py" not in calls[-1]
    code, _, calls = run(clone, "quickstart.sh")
    assert code == 0 and len(installs(calls)) == 1


def test_an_existing_run_says_how_to_start_over(clone):
    (clone / "runs" / "quickstart").mkdir(parents=True)
    _, output, _ = run(clone, "quickstart.sh")
    assert f"rm -r '{clone}/runs/quickstart'" in output


def test_a_broken_environment_is_made_anew(clone):
    (clone / ".venv" / "bin").mkdir(parents=True)
    (clone / ".venv" / "bin" / "python").symlink_to("/nonexistent/python")
    code, _, calls = run(clone, "quickstart.sh")
    assert code == 0 and any("-m venv" in call for call in calls)


def test_an_old_python_is_refused_with_the_fix(clone):
    tools = clone.parent / "tools"
    tools.mkdir()
    for name in ("bash", "env", "dirname", "cat"):
        (tools / name).symlink_to(shutil.which(name))
    (tools / "python3").symlink_to(clone.parent / "fakepython")
    code, output, calls = run(clone, "quickstart.sh", TOO_OLD="1", PATH=str(tools))
    assert code != 0
    assert "needs Python 3.11" in output and "PYTHON=" in output
    assert not installs(calls)


def test_an_interpreter_that_does_not_run_is_named_not_passed_over(clone):
    code, output, calls = run(clone, "quickstart.sh", PYTHON="/nowhere/python")
    assert code != 0 and "PYTHON=/nowhere/python: is no interpreter that runs" in output
    assert not calls


def test_a_missing_lock_is_said_with_the_fix(clone):
    (clone / "requirements.lock").unlink()
    code, output, calls = run(clone, "quickstart.sh")
    assert code != 0 and "requirements.lock: is missing. Get it back: git checkout" in output
    assert not installs(calls)


def test_test_script_checks_before_it_tests(clone):
    code, _, calls = run(clone, "test.sh", "-k", "router")
    assert code == 0
    assert str(clone / "requirements-dev.txt") in installs(calls)[0]
    assert calls[-3:-1] == ["-m ruff check .", "-m ruff format --check ."]
    assert calls[-1].startswith("-m pytest") and calls[-1].endswith("-k router")


@pytest.mark.parametrize("code", [0, 5])
def test_busy_loops_run_beside_the_tests_and_end_with_them(clone, code):
    # The stand-in for pytest sees who else runs, and fails as asked.
    beside = """#!/usr/bin/env bash
if [[ "$1 $2" == "-m pytest" ]]; then
  pgrep -P "$PPID" > "$CALLS.beside"
  exit CODE
fi
"""
    fake = clone.parent / "fakepython"
    fake.write_text(
        beside.replace("CODE", str(code)) + FAKE_PYTHON.removeprefix("#!/usr/bin/env bash")
    )
    assert run(clone, "test.sh", BUSY="1")[0] == code
    processes = (clone.parent / "calls.beside").read_text().split()
    # One loop a core, and the tests themselves.
    assert len(processes) >= os.cpu_count() + 1
    assert not [number for number in processes if Path(f"/proc/{number}").exists()]


def test_ci_runs_the_test_script():
    assert "./launch/test.sh" in (ROOT / ".ci" / "run").read_text()
    for script in ("launch/quickstart.sh", "launch/test.sh", ".ci/run"):
        assert os.access(ROOT / script, os.X_OK), f"{script} is not executable"
