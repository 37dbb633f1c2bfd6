"""The documentation as a site: it builds without a warning, and its notebook runs on the way."""

import os
import re
import subprocess
import sys
from pathlib import Path

from support.patience import PATIENCE

import mor_jax

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "docs" / "_ext"))

import api_pages  # noqa: E402
import docstrings  # noqa: E402


def test_the_site_builds(tmp_path):
    """In one test, so that it is built once however tests are spread over processes."""
    site = build(tmp_path / "html")
    check_pages_and_modules(site)
    check_links(site)
    check_notebook(site)


def build(output: Path) -> Path:
    """Builds the site; that executes the notebook, since its cache is empty."""
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "docs", str(output)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "XLA_FLAGS": ""},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return output


def check_pages_and_modules(site: Path) -> None:
    for page in (ROOT / "docs").glob("*.md"):
        assert (site / f"{page.stem}.html").is_file(), page.name
    shown = "".join(page.read_text() for page in (site / "api").glob("*.html"))
    for folder in api_pages.folders():
        for module in api_pages.modules(folder):
            assert f'id="module-{module}"' in shown, module
    assert (site / "searchindex.js").stat().st_size > 100_000


def check_links(site: Path) -> None:
    page = (site / "index.html").read_text()
    assert re.search(r'href="https://github\.com/[\w./-]+/blob/main/README\.md"', page)
    assert 'href="api/mor_jax.html#module-mor_jax.types"' in page
    everything = "".join(path.read_text() for path in site.rglob("*.html"))
    named = set(
        re.findall(r'href="https://github\.com/[\w-]+/mor_jax/blob/main/([^"#?]+)', everything)
    )
    named |= set(
        re.findall(r'href="https://github\.com/[\w-]+/mor_jax/tree/main/([^"#?]+)', everything)
    )
    assert len(named) > 100
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


def test_sources_of_the_reference_are_at_their_lines():
    path, line = api_pages.source_line("mor_jax.types", "Batch.segments")
    assert path == Path(mor_jax.__file__).parent / "types.py"
    assert path.read_text().splitlines()[line - 1].strip().startswith("segments:")
    assert api_pages.source_line("mor_jax.types", "Nothing") is None


def test_docstrings_become_restructured_text():
    text = """Rows of `x_`, times *two*.

    python -m this

first: one,
    and more.
second: `two`.

Raises:
    ValueError: no `x`."""
    assert docstrings.convert(text.splitlines()) == [
        "Rows of \\ ``x_``\\ , times \\*two\\*.",
        "",
        "::",
        "",
        "        python -m this",
        "",
        "**first**",
        "    one, and more.",
        "",
        "**second**",
        "    \\ ``two``\\ .",
        "",
        "Raises:",
        "    ValueError: no \\ ``x``\\ .",
        "",
    ]


FIND_YOUR_WAY = (ROOT / "docs" / "find_your_way.md").read_text()


def test_paths_and_symbols_of_find_your_way_exist():
    rows = [line for line in FIND_YOUR_WAY.splitlines() if line.startswith("| ")]
    assert len(rows) >= 2 * 2 + 15
    for path, symbol in re.findall(r"`([\w-]+/[\w./-]*)(?::(\w+))?`", FIND_YOUR_WAY):
        assert (ROOT / path).exists(), path
        if symbol:
            text = (ROOT / path).read_text()
            assert re.search(rf"^(?:class|def) {symbol}\b", text, re.MULTILINE), (path, symbol)


def check_notebook(site: Path) -> None:
    """Its cells print a depth for every byte, and equal losses of the run and its export."""
    page = re.sub(r"<[^>]+>", "", (site / "first_steps.html").read_text())
    assert re.search(r"def mean\(values\):\n[1-3]{17}\n", page)
    losses = re.findall(r"(?:run|export) +loss (\d\.\d{4})", page)
    assert len(losses) == 2 and len(set(losses)) == 1
    assert re.search(r"loss_causal +\d\.\d{3}\n", page) and "modeling_mor.py" in page
