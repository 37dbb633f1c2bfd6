"""The documentation says what is true: its commands run, its links lead somewhere, its table of
settings is complete.

Every line of a ```bash block and every ```python block of README.md, CONTRIBUTING.md and docs/ is
run in a copy of the repository in which a tiny quickstart has been trained. Lines that train get
`TINY_RUN` appended; all others run as they stand. A block that cannot run here says why:
```bash skip: needs a GPU. Even there, every `mor` line names a command and flags that exist.
"""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from support.patience import PATIENCE

from configs import mor
from mor_jax.cli import main
from mor_jax.config import TrainConfig
from mor_jax.runtime import exit_codes

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGE_IDS = [str(page.relative_to(ROOT)) for page in PAGES]

# A run of seconds; the model stays as it was chosen.
SHORT_RUN = """\
--config.steps=3 --config.optim.warmup_steps=1 --config.optim.decay_steps=1 \
--config.batch_size=8 --config.seq_len=64 --config.grad_accum_steps=1 \
--config.loss_chunk_size=None \
--config.eval.interval=None --config.eval.batches=1 --config.eval.batch_size=8 \
--config.eval.completion_tokens=4 --config.checkpoint.interval=None \
--config.mesh.data=None --config.mesh.fsdp=1 --config.mesh.tensor=1"""

# Any shipped configuration at a size that trains in seconds; structure stays as it was chosen.
TINY_RUN = f"""{SHORT_RUN} \
--config.model.hidden_size=32 --config.model.num_heads=4 --config.model.num_kv_heads=2 \
--config.model.head_dim=8 --config.model.intermediate_size=64 --config.model.vocab_size=256 \
--config.model.max_seq_len=256 --config.data.sources=stdlib --config.data.tokenizer=bytes"""

# What the Python blocks read. The command itself is on the page too.
EXPORT = "mor convert export --to=hf --workdir=runs/quickstart --output=exports/quickstart"

TRAINING = (
    "mor train ",
    "launch/train.py",
    "launch/quickstart.sh",
    "launch/local_multiprocess.sh",
)


class Block(NamedTuple):
    language: str
    info: str
    text: str


def blocks(page: Path) -> list[Block]:
    fences = re.findall(r"^```(\w+)([^\n]*)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    return [Block(language, info.strip(), text) for language, info, text in fences]


def runnable(page: Path, language: str) -> list[str]:
    return [b.text for b in blocks(page) if b.language == language and not b.info]


def commands(text: str) -> list[str]:
    joined = text.replace("\\\n", " ")
    return [line.strip() for line in joined.splitlines() if line.split("#")[0].strip()]


@pytest.fixture(scope="session")
def copy(tmp_path_factory):
    """A copy of the repository with a stand-in .venv and a tiny finished quickstart."""
    root = tmp_path_factory.mktemp("docs") / "copy"
    ignored = (".git", "runs", "data", "__pycache__", ".pytest_cache", ".ruff_cache")
    top = {str(ROOT / name) for name in ignored} | {str(path) for path in ROOT.glob(".venv*")}

    def skip(folder, names):
        return [n for n in names if f"{folder}/{n}" in top or n == "__pycache__"]

    shutil.copytree(ROOT, root, ignore=skip)
    python = root / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    # pip is not called: the packages of the running interpreter are the ones under test.
    python.write_text(
        f'#!/usr/bin/env bash\n[[ "$1 $2" == "-m pip" ]] && exit 0\nexec "{sys.executable}" "$@"\n'
    )
    python.chmod(0o755)
    # The installed command, of this copy.
    mor_command = python.with_name("mor")
    mor_command.write_text(f'#!/usr/bin/env bash\nexec "{sys.executable}" -m mor_jax "$@"\n')
    mor_command.chmod(0o755)
    execute(f"./launch/quickstart.sh {TINY_RUN}", root)
    return root


def execute(command: str, root: Path) -> str:
    """Runs a shell command as a reader would, on one CPU device; fails with its output."""
    path = f"{root / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"
    # Threads of PyTorch that wait for each other on busy cores would take many times as long.
    settings = {"PATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", "-ec", command],
        cwd=root,
        env={name: value for name, value in os.environ.items() if name != "LATEST"} | settings,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}"
    return done.stdout


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_fences_are_run_or_say_why_not(page):
    for block in blocks(page):
        assert block.language in ("bash", "python", "text", "json", "yaml", "bibtex", "mermaid")
        if block.language in ("bash", "python") and block.info:
            assert re.fullmatch(r"skip: \w.{5,}", block.info), f"{page}: {block.info!r}"


WITH_COMMANDS = [p for p in PAGES if runnable(p, "bash")]
WITH_PYTHON = [p for p in PAGES if runnable(p, "python")]


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda p: p.name)
def test_commands_run(page, copy):
    # Whatever a page exports it makes itself.
    shutil.rmtree(copy / "exports", ignore_errors=True)
    for text in runnable(page, "bash"):
        for command in commands(text):
            trains = any(name in command for name in TRAINING) and "--dry_run" not in command
            # Weights that were imported have their own size.
            tiny = SHORT_RUN if "from_workdir" in command else TINY_RUN
            execute(f"{command} {tiny}" if trains else command, copy)


def mor_lines(page: Path) -> list[list[str]]:
    """The words after `mor` in every call, of blocks that are run and of those that are not."""
    texts = [block.text for block in blocks(page) if block.language == "bash"]
    lines = [shlex.split(line, comments=True) for text in texts for line in commands(text)]
    return [line[line.index("mor") + 1 :] for line in lines if "mor" in line]


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_commands_and_their_flags_exist(page):
    for words in mor_lines(page):
        name, flags = words[0], main.flags_of(words[0])
        assert name in main.COMMANDS or name in ("completion", "--help", "--version"), name
        # Flags after `--` are those of a launcher, and lm-eval has its own.
        own = words[: words.index("--")] if "--" in words else words
        if not any(word.startswith("--tasks") for word in own):
            given = [word.partition("=")[0] for word in own[1:] if word.startswith("--")]
            named = {*flags, *(flag.replace("--", "--no-") for flag in flags)}
            unknown = [f for f in given if f not in named and not f.startswith("--config.")]
            assert not unknown, f"mor {name}: {unknown}"


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_pages_name_the_installed_command(page):
    """The scripts of `launch/` that have a command stand only where a container has no `mor`."""
    for text in (block.text for block in blocks(page) if block.language == "bash"):
        for name in re.findall(r"python launch/(\w+)\.py", text):
            assert name.replace("_", "-") not in main.COMMANDS or "docker run" in text, name


def test_page_of_commands_is_complete():
    text = (ROOT / "docs" / "commands.md").read_text()
    sections = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    headings = {section.splitlines()[0].strip("`"): section for section in sections}
    for name in main.COMMANDS:
        section = headings[f"mor {name}"]
        assert re.search(rf"^mor {name}\b", section, re.MULTILINE), f"mor {name}: no example"
        flags = re.findall(r"^\| .*?\|", section, re.MULTILINE)
        for flag in re.findall(r"`(--[\w-]+)", " ".join(flags)):
            assert flag == "--config" or flag in main.flags_of(name), f"mor {name}: {flag}"
    codes = {v for k, v in vars(exit_codes).items() if k.isupper() and isinstance(v, int)}
    assert codes == set(map(int, re.findall(r"^\| (\d+) \|", text, re.MULTILINE)))


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda p: p.name)
def test_python_blocks_run(page, copy):
    # One after the other, as a reader would who has them in one session.
    text = "\n".join(runnable(page, "python"))
    if "exports/quickstart" in text and not (copy / "exports" / "quickstart").exists():
        execute(EXPORT, copy)
    execute(f"python -c {shlex.quote(text)}", copy)


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_readme_fits():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def settings_table() -> dict[str, str]:
    """Setting -> default as written, of the tables of docs/configuration.md."""
    found, prefix = {}, ""
    for line in (ROOT / "docs" / "configuration.md").read_text().splitlines():
        if line.startswith("### "):
            names = re.findall(r"`([\w.]+)`", line)
            prefix = f"{names[0]}." if len(names) == 1 else ""
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        names = re.findall(r"`([\w.]+)`", cells[0])
        if line.startswith("| `") and len(cells) == 3 and cells[1][:1] != "`":
            values = cells[1].split(", ") if len(names) > 1 else [cells[1]]
            found.update(zip((prefix + n for n in names), values, strict=True))
    return found


def test_table_of_settings_is_complete_and_true():
    def leaves(tree: dict, path: str = "") -> dict[str, object]:
        out = {}
        for key, value in tree.items():
            deeper = isinstance(value, dict)
            out |= leaves(value, f"{path}{key}.") if deeper else {path + key: value}
        return out

    def read(text: str) -> object:
        words = {"None": None, "true": True, "false": False}
        if text in words:
            return words[text]
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError):
            return text

    config = TrainConfig.from_dict(mor.get_config().to_dict())
    assert {k: read(v) for k, v in settings_table().items()} == leaves(config.to_dict())
