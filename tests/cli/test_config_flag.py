"""What is wrong with a command line or the file of a configuration: one line, exit code 2."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mor_jax.config.old_names import SETTINGS
from mor_jax.runtime import exit_codes

ROOT = Path(__file__).parents[2]

# Many command lines, one process: each is refused or taken before anything heavy is imported.
PARSE = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
from absl import flags
from ml_collections import config_flags
from mor_jax.cli.config_flag import parsed
config_flags.DEFINE_config_file("config", None, "")
flags.DEFINE_integer("processes", None, "")
flags.mark_flags_as_required(["config"])
for line in sys.stdin:
    sys.stderr.write(">")
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        sys.argv = ["program", *json.loads(line)]
        parsed(sys.argv)
        sys.exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
assert "jax" not in sys.modules
"""

GOOD = "--config=configs/mor.py"

OLDER = """\
from configs import mor
def get_config(arg=""):
    cfg = mor.get_config(arg)
    {}
    return cfg
"""

WRONG = [
    ([], r"--config: is missing\. Every flag is listed by --help"),
    (["--config=configs/nope.py"], "--config=configs/nope.py: cannot be read: .*No such file"),
    (["--config", "configs/nope.py"], "--config=configs/nope.py: cannot be read: .*No such file"),
    ([GOOD, "--config=configs/nope.py"], "--config=configs/nope.py: cannot be read: .*No such"),
    (["--config=configs"], "--config=configs: cannot be read: .*directory"),
    (["--config="], "--config=: cannot be read: .*empty"),
    (["--config=configs/mor.py:size=x"], "--config=.*: config argument 'size=x': .*mean 'debug'"),
    (["--config={tmp}/name.py"], "name.py:2: NameError: name 'undefined' is not defined"),
    (["--config={tmp}/syntax.py"], r"syntax\.py:1: .*':'"),
    (["--config={tmp}/module.py"], "module.py:1: ModuleNotFoundError: No module named 'nosuch'"),
    (["--config={tmp}/empty.py"], "empty.py: has no function get_config"),
    ([GOOD, "--config.stepz=3"], r"stepz=3: unknown setting\. Did you mean --config\.steps\?"),
    ([GOOD, "--config.optim.lrr=3"], r"optim\.lrr=3: unknown setting\. .*--config\.optim\.lr\?"),
    ([GOOD, "--config.optim.lr.x=3"], r"optim\.lr\.x=3: unknown setting\. .*--config\.optim\.lr\?"),
    ([GOOD, "--config.steps=abc"], "--config.steps=abc: must be a whole number"),
    ([GOOD, "--config.steps=1e3"], "--config.steps=1e3: must be a whole number"),
    ([GOOD, "--config.optim=3"], "--config.optim=3: is a group of settings"),
    ([GOOD, "--config.steps"], "Missing value for flag --config.steps"),
    ([GOOD, "--processes=two"], "--processes=two: invalid literal"),
    ([GOOD, "--workers=3"], "Unknown command line flag 'workers'"),
    *(
        (
            [GOOD, f"--config.{old}=1"],
            f"--config.{old}=1: unknown setting. It is called --config.{new} now",
        )
        for old, new in SETTINGS.items()
    ),
    (["--config={tmp}/sets.py"], r"sets\.py: length: unknown setting\. It is called seq_len now$"),
    (["--config={tmp}/reads.py"], r"reads\.py: width: unknown .*called model\.hidden_size now$"),
    ([GOOD, "workdir=runs/a"], r"workdir=runs/a: unknown argument.*--NAME=VALUE"),
]


@pytest.fixture
def files(tmp_path):
    for name, text in {
        "name": 'def get_config(arg=""):\n    return undefined\n',
        "syntax": 'def get_config(arg="")\n    return 1\n',
        "module": "import nosuch\n",
        "empty": "",
        "sets": OLDER.format("cfg.length = 64"),
        "reads": OLDER.format("cfg.seq_len = cfg.model.width"),
    }.items():
        (tmp_path / f"{name}.py").write_text(text)
    return tmp_path


def test_every_wrong_command_line_is_one_line(files):
    lines = [[word.format(tmp=files) for word in words] for words, _ in WRONG]
    done = subprocess.run(
        [sys.executable, "-c", PARSE, str(ROOT)],
        input="\n".join(map(json.dumps, [*lines, [GOOD, "--config.steps=7"]])),
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    told = done.stderr.split(">")[1:]
    codes = done.stdout.split()
    assert codes == [str(exit_codes.REFUSED)] * len(WRONG) + ["0"], done.stderr
    assert told[-1] == ""
    for (words, message), text in zip(WRONG, told, strict=False):
        assert text.startswith("error: ") and text.count("\n") == 1, (words, text)
        with pytest.raises(ValueError, match=message):
            raise ValueError(text)
