"""The command `mor`: help without JAX, nearest names, completion, and the installed wheel."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from support.patience import PATIENCE

from mor_jax.cli import main
from mor_jax.runtime import exit_codes

ROOT = Path(__file__).parents[2]
MOR = [sys.executable, "-m", "mor_jax"]


def mor(*words, program=MOR, cwd=ROOT, **variables):
    return subprocess.run(
        [*program, *words],
        cwd=cwd,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


def test_help_lists_every_command_and_imports_no_dependency():
    code = "import sys; sys.argv = ['mor', '--help']; from mor_jax.cli.main import main; main(); "
    code += "print(sorted({'jax', 'numpy', 'absl', 'ml_collections'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    *lines, imported = done.stdout.splitlines()
    assert done.returncode == 0 and imported == "[]"
    for name, about in main.COMMANDS.items():
        assert any(line.split() == [name, *about.split()] for line in lines), name


def test_every_command_has_a_module_and_a_launch_script():
    for name in main.COMMANDS:
        file = f"{name.replace('-', '_')}.py"
        assert (ROOT / "mor_jax" / "cli" / file).is_file()
        assert f'run("{name}")' in (ROOT / "launch" / file).read_text()


@pytest.mark.parametrize("name", main.COMMANDS)
def test_help_of_a_command_names_it_and_shows_its_flags(name):
    done = mor(name, "--help", COLUMNS="100")
    assert done.returncode == exit_codes.OK, done.stderr
    # Commands with subcommands list the flags of each there.
    flags = [flag for flag in main.flags_of(name) if flag not in ("--help", "--config")]
    if f"mor {name} [-h] COMMAND" in done.stdout or "export|import" in done.stdout:
        return
    missing = [f for f in flags if f not in done.stdout.replace("--[no]", "--")]
    assert flags and not missing, (name, missing)


WRONG = [
    (["trian"], "trian: unknown command. Did you mean mor train?"),
    (["generate"], "missing: --workdir. mor generate --help"),
    (["generate", "--wrkdir=x"], "--wrkdir: unknown option. Did you mean --workdir?"),
    (["generate", "--workdir=x", "--step=y"], "--step: invalid int value: 'y'."),
    (["convert", "exprot"], "unknown command of mor convert. Did you mean export? mor convert"),
    (["generate", "--workdir=x", "hello"], "hello: unexpected. Options are --NAME=VALUE. mor"),
    (["--foo"], "--foo: unknown command. mor --help lists all"),
    (["train", "--config=mor:siz=360m", "--workdir=x"], "--config=mor:siz=360m: config argument"),
    (["train", "--config=mor", "--config.optim.lr=x", "--workdir=x"], "lr=x: must be a number."),
    (
        ["convert", "export", "--to=hff"],
        "must be one of hf, llama, reference, not 'hff'. Did you mean hf?",
    ),
    (["evaluate", "--workdir=x", "--lenght=3"], "--lenght: unknown option. Did you mean --length?"),
    (["train", "--config=mro", "--workdir=x"], "Did you mean --config=mor?"),
    (["train", "--config=zzz", "--workdir=x"], "Give a file or one of: from_study, from_workdir,"),
    (["train", "--config=mor", "--config.stpes=3"], "Did you mean --config.steps?"),
    (
        ["prepare-data", "--source=stdlib", "--heldout-share=0.1"],
        "Did you mean --validation-fraction?",
    ),
    (["completion", "fish"], "completion fish: must name a shell: bash or zsh"),
]


@pytest.mark.parametrize(("words", "message"), WRONG, ids=lambda value: str(value)[:30])
def test_a_wrong_word_is_refused_in_one_line(words, message, tmp_path):
    done = mor(*words, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == exit_codes.REFUSED
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and not done.stdout
    for part in message.split(".*"):
        assert part.strip() in line, line
    assert not list(tmp_path.iterdir())


def test_output_may_be_cut_off_by_a_reader():
    command = f"{sys.executable} -m mor_jax accounting --config=mor | head -1"
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.stdout.startswith("parameters") and "Traceback" not in done.stderr


def test_bash_completes_commands_and_flags():
    script = f'mor() {{ {sys.executable} -m mor_jax "$@"; }}; eval "$(mor completion bash)"; '
    script += (
        'complete_() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _mor; echo "${COMPREPLY[*]}"; }; '
    )
    script += "complete_ mor ev; complete_ mor generate --tem; complete_ mor plan --topo"
    done = subprocess.run(
        ["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.stdout.split() == ["evaluate", "--temperature", "--topology"], done.stderr


def install(place):
    """A wheel of this checkout, installed beside the packages of the running interpreter."""
    # A copy: building writes beside the sources.
    source = place / "source"
    names = ["mor_jax", "configs", "pyproject.toml", "README.md", "LICENSE"]
    names += [path.name for path in ROOT.glob("requirements*.txt")]
    source.mkdir()
    for name in names:
        subprocess.run(["cp", "-r", str(ROOT / name), str(source)], check=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    wheel = [*pip, "wheel", "-q", "--no-deps", "-w", str(place), str(source)]
    done = subprocess.run(wheel, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    (file,) = place.glob("*.whl")
    target = [*pip, "install", "-q", "--no-deps", "--target", str(place / "site"), str(file)]
    subprocess.run(target, check=True, capture_output=True, timeout=PATIENCE)
    return file, place / "site"


def check_contents(file):
    """Every module, and one top-level package."""
    names = set(zipfile.ZipFile(file).namelist())
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"mor_jax"}
    ours = {f"mor_jax/{p.relative_to(ROOT / 'mor_jax')}" for p in ROOT.glob("mor_jax/**/*.py")}
    ours |= {f"mor_jax/configs/{path.name}" for path in ROOT.glob("configs/*.py")}
    assert ours | {"mor_jax/py.typed"} <= names


def test_the_installed_command_works_in_an_empty_folder(tmp_path_factory, tmp_path):
    file, site = install(tmp_path_factory.mktemp("wheel"))
    check_contents(file)
    program, variables = [str(site / "bin" / "mor")], {"PYTHONPATH": str(site)}
    for n in range(40):
        (tmp_path / f"{n}.txt").write_text(f"{n} squared is {n * n}\n" * 40)
    train = "train --config=mor:recursions=2 --workdir=run --config.steps=2 "
    train += "--config.optim.warmup_steps=0 --config.optim.decay_steps=1 --config.batch_size=8 "
    train += "--config.seq_len=32 --config.eval.batches=1 --config.eval.batch_size=8 "
    train += "--config.eval.completion_tokens=0 --config.model.hidden_size=32 "
    train += "--config.data.sources=text:*.txt --config.eval.interval=None"
    for line, expected in (
        (train, "2 steps in"),
        ("accounting --config=mor:size=360m", "unique"),
        ("evaluate --workdir=run --batches=1", "causal"),
        ("convert export --to=hf --workdir=run --output=export", "modeling_mor.py"),
        ("convert import --from=hf --source=export --workdir=again", "mor train --config=from_w"),
    ):
        done = mor(*line.split(), program=program, cwd=tmp_path, **variables)
        assert done.returncode == exit_codes.OK, (line, done.stderr[-2000:])
        assert expected in done.stdout, (line, done.stdout)
    code = "import mor_jax.configs.mor as c; print(c.__file__, c.get_config('recursions=2').steps)"
    done = mor("-c", code, program=[sys.executable], cwd=tmp_path, **variables)
    assert str(site / "mor_jax" / "configs" / "mor.py") in done.stdout, done.stderr
