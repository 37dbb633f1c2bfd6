"""The benchmark of programs for absent GPUs: cases, what it skips, tables. None is compiled."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import gpu_compile
import timing
from gpu_compiling import matrix, report
from gpu_compiling.matrix import Case, config

from mor_jax.models.routing.router import capacity_tokens

DONE = {
    "capacities": [2048, 1408, 768],
    "arguments": 2 * 10**9,
    "temporaries": 10**9,
    "peak": 3 * 10**9,
    "accessed": 4e9,
    "flops": 2e12,
    "kernels": {"__cudnn$fmhaSoftmax": 5, "__cudnn$fmhaSoftmaxBackward": 3},
    "compile_seconds": 41.7,
}


def record(case: Case, **changes) -> dict:
    return {**dataclasses.asdict(case), **DONE, **changes}


def test_every_case_has_a_run_with_whole_tiles():
    cases = [*matrix.full(), *matrix.quick(), *matrix.multiples()]
    assert len(set(matrix.full())) == len(matrix.full()) > 50
    made = {case: config(case) for case in cases if case.program in ("train", "topk")}
    for case, cfg in made.items():
        assert cfg.batch_size == case.rows * case.devices and cfg.model.remat == "full"
        last = capacity_tokens(cfg.model, cfg.seq_len)[-1]
        if cfg.model.router.kind == "expert" and case.multiple is None:
            assert last % 32 == 0, case
    by_multiple = [made[case].model.router.capacity_multiple for case in matrix.multiples()[:4]]
    assert by_multiple == list(matrix.MULTIPLES)


def test_what_these_versions_compiled_is_not_compiled_again(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "RESULTS", tmp_path)
    assert gpu_compile.known() == {}
    first, second, third = matrix.full()[:3]
    version = {"version": gpu_compile.__version__}
    timing.report("gpu_compile", record(first, **version), save=True)
    timing.report("gpu_compile", record(second, version="0.0.1"), save=True)
    timing.report("gpu_compile", record(third, **version, error="refused"), save=True)
    assert list(gpu_compile.known()) == [first]
    assert gpu_compile.document(gpu_compile.known()).count("| 42 |") == 1


def test_tables_name_kernels_errors_and_ratios():
    good, bad = Case("expert, 3", "360m", "train"), Case("plain", "135m", "decode")
    text = report.table([record(good), {**dataclasses.asdict(bad), "error": "refused"}])
    assert "2048 1408 768 | 2.00 GB | 1.00 GB | 3.00 GB" in text
    assert "Softmax x 5, SoftmaxBackward x 3 | 42 |" in text and "**refused**" in text
    assert report.kernels({}) == "none"
    exact, rounded = (dataclasses.replace(good, multiple=n) for n in (1, 128))
    text = report.multiples([record(exact), record(rounded, peak=6 * 10**9)])
    assert "6.00 GB (2.000)" in text and "2.00 (1.000)" in text


@pytest.mark.parametrize("case", ["360m token, 3: train for 1 h100", "360m plain: decode"])
def test_cases_are_found_by_name(case):
    assert any(case in str(one) for one in matrix.full())


@pytest.mark.parametrize(
    ("only", "workers", "told"),
    [
        ("nonsense", 2, "--only=nonsense: must be part of a program's name, such as '360m plain"),
        ("", 2, "--only=: must be part"),
        (None, 0, "--workers=0: must be at least 1"),
    ],
)
def test_wrong_arguments_end_before_anything_is_downloaded(only, workers, told):
    with pytest.raises(SystemExit) as ended:
        gpu_compile.chosen(matrix.full(), only, workers)
    assert told in str(ended.value)


def test_the_environment_is_made_again_when_its_packages_change(tmp_path, monkeypatch):
    calls = []
    done = subprocess.CompletedProcess([], 0)
    monkeypatch.setattr(gpu_compile, "HOME", tmp_path / "home")
    monkeypatch.setattr(gpu_compile, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_compile.venv, "create", lambda place, **_: place.mkdir(exist_ok=True))
    monkeypatch.setattr(gpu_compile.subprocess, "run", lambda *a, **_: calls.append(a) or done)
    for name in gpu_compile.PACKAGES:
        (tmp_path / name).write_text(name)
    for _ in range(2):
        gpu_compile.make_environment()
    assert len(calls) == 1
    (tmp_path / "requirements.lock").write_text("jax==9")
    done.returncode = 1
    with pytest.raises(SystemExit, match="pip ended with code 1"):
        gpu_compile.make_environment()
    done.returncode = 0
    gpu_compile.make_environment()
    assert len(calls) == 3
