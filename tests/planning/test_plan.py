"""The pod plan: topologies, steps that do not fit, the tables, and the real TPU compiler."""

import dataclasses
import io
import json
import math
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from rich.console import Console
from support.patience import PATIENCE
from support.tiny import train_config

from mor_jax.config import MeshConfig, ShardingConfig, TrainConfig
from mor_jax.models.flops import flops
from mor_jax.planning import alternatives, aot
from mor_jax.planning.aot import OutOfMemory, parse_out_of_memory, parse_topology
from mor_jax.planning.build import make_plan
from mor_jax.planning.report import CollectiveCost, MemoryUse, Plan, StepTimes, TooLarge
from mor_jax.planning.tables import format_bytes, print_comparison, print_plan
from mor_jax.planning.variants import sibling_variants
from mor_jax.runtime.hardware import CHIPS

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def no_flags_of_cpus(monkeypatch):
    """The TPU compiler aborts the process on flags that it does not know."""
    monkeypatch.delenv("XLA_FLAGS", raising=False)


# --- Topologies.


@pytest.mark.parametrize(
    ("name", "kind", "slices", "devices"),
    [
        ("v5e:16x16", "TPU v5 lite", 1, 256),
        ("2xv5e:16x16", "TPU v5 lite", 2, 512),
        ("V6E:4x8", "TPU v6 lite", 1, 32),
        ("v5p:4x4x4", "TPU v5", 1, 64),
        ("v5p:8x8x16", "TPU v5", 1, 1024),
        ("tpu7x:2x2x1", "TPU7x", 1, 8),
        ("h100:8x4", "NVIDIA H100 80GB HBM3", 4, 32),
        ("a100-40g:8", "NVIDIA A100-SXM4-40GB", 1, 8),
    ],
)
def test_topologies(name, kind, slices, devices):
    topology = parse_topology(name)
    assert (topology.kind, topology.slices, topology.devices) == (kind, slices, devices)
    assert topology.chip is CHIPS[kind]


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("v5e", "topology='v5e': is not NAME:SHAPE. Try v5e:16x16"),
        ("v5x:4x4", "unknown device 'v5x'; known are .*Did you mean v5"),
        ("v5e:16x15", "v5e slices have 2 dimensions.*The nearest is v5e:16x16"),
        ("v5e:4x4x4", "The nearest is v5e:8x8"),
        ("v5p:8x4x4", "The nearest is v5p:4x4x8"),
        ("0xv5e:2x2", "needs at least one slice"),
        ("h100:16x2", "at most 8 GPUs per node. Try h100:8x4"),
        ("2xh100:8x4", "GPUs are written"),
    ],
)
def test_an_unknown_topology_is_named_with_the_nearest(name, match):
    with pytest.raises(ValueError, match=match):
        parse_topology(name)


def test_devices_of_two_slices_stand_slice_by_slice():
    found = aot.devices(parse_topology("2xv6e:2x2"))
    assert [device.slice_index for device in found] == [0] * 4 + [1] * 4
    assert {device.device_kind for device in found} == {"TPU v6 lite"}


def test_a_missing_compiler_is_named_with_the_fix(monkeypatch):
    monkeypatch.setattr(aot.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    fix = r"libtpu.*pip install -c requirements\.lock -r requirements-tpu\.txt"
    with pytest.raises(ValueError, match=fix):
        aot.devices(parse_topology("v5e:2x2"))


def on(name: str, rows: int, sharding: ShardingConfig | None = None, **mesh: int) -> TrainConfig:
    """A tiny run on a mesh of these sizes."""
    axes = {"slice": 1, "data": 1, "fsdp": 1, "tensor": 1} | mesh
    sharding = sharding or ShardingConfig()
    return train_config(name, batch_size=rows, mesh=MeshConfig(**axes), sharding=sharding)


@pytest.mark.parametrize(
    ("topology", "cfg", "match"),
    [
        ("v5e:2x2", on("plain", 8, fsdp=8), "axes multiply to 8, but there are 4 devices"),
        ("v5e:2x2", on("plain", 9, data=None, fsdp=3), r"multiply to 3, .* Try mesh\.fsdp=2"),
        ("v5e:2x2", on("plain", 6, fsdp=4), "batch_size=6: must be a multiple of 4"),
        ("2xv5e:2x2", on("plain", 8, fsdp=8), r"mesh\.slice=1: .*2 slices.*Set it to 2"),
        ("h100:8x4", on("plain", 32, fsdp=32), "needs 32 fake CPU devices"),
    ],
)
def test_a_mesh_that_does_not_match_is_refused(topology, cfg, match):
    jax.devices()  # From here on the number of fake devices is fixed.
    with pytest.raises(ValueError, match=match):
        aot.mesh_of(cfg, parse_topology(topology))


# --- A plan without the chip's compiler: the step sharded over CPU devices.


@pytest.fixture(scope="module")
def gpu_plan() -> Plan:
    plan = make_plan(on("middle_cycle", 16, fsdp=4, data=2), parse_topology("h100:8"))
    assert isinstance(plan, Plan)
    return plan


def test_bytes_by_shapes(gpu_plan):
    # Every parameter has an axis of width 32, which fsdp shards; two moments and a counter.
    assert gpu_plan.memory.parameters == 4 * gpu_plan.parameters // 4
    assert gpu_plan.memory.optimizer == 2 * gpu_plan.memory.parameters + 4
    assert gpu_plan.memory.temporaries is None
    assert any("No compiler for GPUs is available" in note for note in gpu_plan.notes)


def test_flops_and_ceilings(gpu_plan):
    cfg = on("middle_cycle", 16)
    report, tokens = flops(cfg.model, cfg.seq_len), 16 * cfg.seq_len
    assert gpu_plan.model_flops == report.training() * tokens / 8
    assert gpu_plan.hardware_flops == report.hardware() * tokens / 8
    assert gpu_plan.times.matrix == gpu_plan.hardware_flops / 989e12
    assert gpu_plan.times.inside == gpu_plan.inside / 450e9
    assert gpu_plan.times.memory is None
    assert gpu_plan.tokens_per_second == pytest.approx(tokens / gpu_plan.times.step)
    assert gpu_plan.budget == tokens * cfg.steps


@pytest.mark.parametrize("how", ["once", "per_recursion"])
def test_the_shared_block_is_gathered_as_often_as_asked(how):
    cfg = on("middle_cycle", 16, ShardingConfig(all_gather_shared=how), fsdp=8)
    plan = make_plan(cfg, parse_topology("h100:8"))
    assert isinstance(plan, Plan)
    times = {row.what: row.forward + row.backward for row in plan.gathered}
    assert cfg.model.num_recursions > 1 and cfg.model.remat == "none"
    if how == "once":
        assert times["shared block"] == pytest.approx(1, abs=0.05)
    else:
        assert times["shared block"] >= cfg.model.num_recursions * 0.95


# --- What does not fit.

TOTAL = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory"
    " required for HLO temporaries (22.53G) exceeds available HBM (15.75G). HLO module: jit_f.\n"
)
LISTED = """RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. \
Exceeded hbm capacity by 4.75G.

Total hbm usage >= 20.75G:
    reserved        256.00M
    program          18.50G
    arguments         2.00G

  Largest program allocations in hbm:

  1. Size: 12.00G
     Operator: op_name="jit(f)/dot_general" source_file="x.py" source_line=1
     Shape: bf16[32,4096,49152]{2,1,0:T(8,128)(2,1)}
     Unpadded size: 12.00G
     ==========================

  2. Size: 512.0K
     Shape: f32[1024,128]{1,0:T(8,128)}
     ==========================
"""


def test_messages_of_the_compiler():
    found = parse_out_of_memory(TOTAL)
    assert found is not None
    assert (found.needed, found.available) == (int(22.53 * 2**30), int(15.75 * 2**30))
    found = parse_out_of_memory(LISTED)
    assert found is not None
    assert (found.needed, found.available) == (int(20.5 * 2**30), int(15.75 * 2**30))
    assert found.largest == (
        (12 * 2**30, "bf16[32,4096,49152]{2,1,0:T(8,128)(2,1)} jit(f)/dot_general"),
        (512 * 2**10, "f32[1024,128]{1,0:T(8,128)}"),
    )


def test_places_in_memory_are_read_from_the_compilers_report():
    report = """Memory Space: default (color=0)
Total bytes: 152 (152B)
  cumulative_size;       size;       offset; used_by_n_values; shapes_list
  ------------------------------------------------------------
   64.00MiB(  5%);   64.00MiB;     58146816;                2; f32[4], 2\u00d7bf16[2,16,256,4096]
  128.00MiB( 11%);   64.00MiB;    125255680;                2; f32[4], 2\u00d7bf16[2,16,256,4096]
  128.50MiB( 14%);  512.00KiB;    226705408;                1; f32[131072]

Memory Space: vmem (color=1)
  ------------------------------------------------------------
  128.00MiB( 14%);  128.00MiB;            0;                1; f32[1]
"""
    assert aot.largest_temporaries(report) == [
        (128 * 2**20, "2 x f32[4], 2\u00d7bf16[2,16,256,4096]"),
        (2**19, "1 x f32[131072]"),
    ]
    assert aot.largest_temporaries(report, limit=1) == aot.largest_temporaries(report)[:1]
    assert aot.largest_temporaries("no such report") == []


def test_another_error_is_not_taken_for_memory():
    assert parse_out_of_memory("INVALID_ARGUMENT: needs 20G of 15G") is None
    assert parse_out_of_memory("RESOURCE_EXHAUSTED: too many open files") is None


def test_changes_go_from_gentle_to_thorough():
    cfg = dataclasses.replace(on("middle_cycle", 16, data=2, fsdp=4), grad_accum_steps=1)
    mesh = aot.mesh_of(cfg, parse_topology("v5e:2x4"))
    changes = list(alternatives.candidates(cfg, mesh, state_fits=True))
    assert changes[:5] == [
        {"model.remat": "block"},
        {"grad_accum_steps": 2},
        {"sharding.all_gather_shared": "per_recursion"},
        {"model.remat": "full"},
        {"mesh.data": 1, "mesh.fsdp": 8, "mesh.tensor": 1},
    ]
    assert len({str(change) for change in changes}) == len(changes)
    only = list(alternatives.candidates(cfg, mesh, state_fits=False))
    assert only and all(
        change.keys() <= {"mesh.data", "mesh.fsdp", "mesh.tensor"} for change in only
    )


def refusing(monkeypatch, fits) -> None:
    """A compiler that accepts only configurations for which `fits` holds."""
    compile_step = aot.compile_step

    def small(cfg, mesh):
        if not fits(cfg):
            raise OutOfMemory(3 * 2**30, 2 * 2**30, ())
        return compile_step(cfg, mesh)

    monkeypatch.setattr(aot, "compile_step", small)


def test_the_first_change_that_fits_is_found_and_shown(monkeypatch):
    refusing(monkeypatch, lambda cfg: cfg.model.remat == "full")
    cfg, topology = on("plain", 8, fsdp=8), parse_topology("h100:8")
    answer = make_plan(cfg, topology)
    assert isinstance(answer, TooLarge)
    reported = []
    answer = alternatives.try_alternatives(
        cfg, topology, answer, 60, lambda *one: reported.append(one)
    )
    assert [(a.settings, a.short) for a in answer.attempts] == reported
    assert reported == [({"model.remat": "block"}, 2**30), ({"model.remat": "full"}, None)]
    text = printed(print_plan, answer)
    assert "does not fit" in text and "1.07 GB too much" in text
    assert "fits with --config.model.remat=full" in text
    assert "activations saved for the backward pass (estimate)" in text


def test_trying_ends_with_its_time(monkeypatch):
    refusing(monkeypatch, lambda cfg: False)
    cfg, topology = on("plain", 8, fsdp=8), parse_topology("h100:8")
    answer = make_plan(cfg, topology)
    assert isinstance(answer, TooLarge)
    answer = alternatives.try_alternatives(cfg, topology, answer, -1)
    assert answer.out_of_time and not answer.attempts
    assert "--try_seconds" in printed(print_plan, answer)


# --- Tables.

GB = 10**9
SAMPLE = Plan(
    variant="plain",
    topology="2xv5e:16x16",
    chip="TPU v5 lite",
    chips=512,
    slices=2,
    mesh={"slice": 2, "data": 1, "fsdp": 256, "tensor": 1},
    settings={"batch_size": 512, "remat": "full", "gather_shared": None},
    parameters=GB,
    memory=MemoryUse(
        parameters=GB,
        optimizer=2 * GB,
        batch=8192,
        arguments=3 * GB,
        temporaries=4 * GB,
        program=GB,
        host=0,
        available=16 * GB,
        estimate=0,
    ),
    exchanges=(
        CollectiveCost(
            kind="all-gather", what="other parameters", count=3, inside=2e9, between=0.0
        ),
        CollectiveCost(kind="all-reduce", what="all else", count=1, inside=0.0, between=1e9),
    ),
    gathered=(),
    model_flops=60e12,
    hardware_flops=80e12,
    memory_traffic=100e9,
    times=StepTimes(matrix=0.4, memory=0.1, inside=0.01, between=0.3),
    mfu=0.76,
    tokens=10**6,
    budget=216e9,
    seconds=1.0,
)


def printed(how, *arguments) -> str:
    out = io.StringIO()
    how(*arguments, Console(file=out, width=200))
    return out.getvalue()


def test_a_plan_in_plain_text():
    text = printed(print_plan, SAMPLE)
    for words in (
        "plain on 2xv5e:16x16 (512 chips, slice=2 fsdp=256)",
        "batch_size 512, remat full",
        "50% of 16.00 GB: fits",
        "400 ms  bottleneck",
        "network between slices",
        "for 216G tokens",
    ):
        assert words in text, text
    lines = [line.split() for line in text.splitlines()]
    assert ["total", "4", "2.00", "GB", "1.00", "GB"] in lines
    assert SAMPLE.days == 1.0 and SAMPLE.tokens_per_second == 2.5e6


def test_the_longest_time_binds_and_unknown_ones_do_not():
    times = StepTimes(matrix=0.1, memory=None, inside=0.2, between=None)
    assert (times.binds, times.step) == ("inside", 0.2)


def test_variants_side_by_side_with_ratios():
    other = dataclasses.replace(SAMPLE, variant="mor", model_flops=30e12, memory_traffic=None)
    lines = printed(print_comparison, [SAMPLE, other]).splitlines()
    assert any(line.split() == ["model", "FLOPs", "60T", "30T", "(0.50)"] for line in lines)
    assert any(
        line.split() == ["main", "memory", "traffic", "100.00", "GB", "unknown"] for line in lines
    )


def test_sizes_in_decimal_units():
    assert [format_bytes(n) for n in (12, 1.5e3, 2.87e9, 3e12)] == [
        "12 B",
        "1.50 kB",
        "2.87 GB",
        "3.00 TB",
    ]


def test_siblings_take_the_choices_and_settings_that_they_know():
    choices = "size=360m,recursions=2,kv=shared_update,routing=expert"
    found = sibling_variants(choices, ROOT / "configs", {"model.remat": "full", "mesh.fsdp": 4})
    plain, recursive, mor = (TrainConfig.from_dict(values.to_dict()) for values in found)
    assert (
        plain.model.num_recursions,
        recursive.model.num_recursions,
        mor.model.num_recursions,
    ) == (1, 2, 2)
    assert (recursive.model.kv_mode, mor.model.kv_mode) == ("shared", "shared_update")
    assert {cfg.model.hidden_size for cfg in (plain, recursive, mor)} == {960}
    assert {(cfg.model.remat, cfg.mesh.fsdp) for cfg in (plain, recursive, mor)} == {("full", 4)}
    with pytest.raises(ValueError, match=r"vanilla.py, recursive.py and mor.py"):
        sibling_variants("", ROOT / "docs", {})


# --- The command and the real compiler.

TINY = [
    *(
        "--config.model.hidden_size=64",
        "--config.model.num_layers=4",
        "--config.model.intermediate_size=128",
    ),
    *(
        "--config.model.num_heads=2",
        "--config.model.num_kv_heads=1",
        "--config.model.dtype=bfloat16",
    ),
    *("--config.batch_size=8", "--config.seq_len=128", "--config.mesh.data=1"),
    "--config.mesh.fsdp=4",
]


def command(*arguments: str) -> subprocess.CompletedProcess:
    line = [sys.executable, str(ROOT / "launch" / "plan.py"), *arguments]
    return subprocess.run(line, capture_output=True, text=True, timeout=PATIENCE, cwd=ROOT)


def test_the_step_compiled_for_a_tpu():
    config = f"--config={ROOT}/configs/recursive.py:recursions=2"
    done = command(config, "--topology=v5e:2x2", "--json", "--tokens=1e9", *TINY)
    assert done.returncode == 0, done.stderr[-3000:]
    plan = json.loads(done.stdout)
    assert plan["variant"] == "recursive" and plan["fits"] and plan["chips"] == 4
    assert plan["memory"]["temporaries"] > plan["memory"]["largest"][0][0] > 0
    # Tiles of 8 x 128 make the arguments larger than their values.
    by_shapes = sum(plan["memory"][name] for name in ("parameters", "optimizer", "batch"))
    assert by_shapes < plan["memory"]["arguments"] < 20 * by_shapes
    gathered = {row["what"]: row for row in plan["gathered"]}["shared block"]
    assert 0.9 < gathered["forward"] <= 1.05 and gathered["backward"] <= 1.05
    assert plan["network_between"] == 0 < plan["network_inside"]
    assert plan["memory_traffic"] > plan["memory"]["arguments"]
    assert plan["days"] == pytest.approx(1e9 / plan["tokens_per_second"] / 86400)
    assert plan["command_seconds"] > 0 and plan["host_peak"] > 1e8


def test_three_variants_side_by_side():
    config = f"--config={ROOT}/configs/mor.py:recursions=2"
    done = command(config, "--topology=h100:4", "--compare", *TINY)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["plain", "recursive", "mor"] in lines
    (stored,) = [line for line in lines if line[:2] == ["parameters", "stored"]]
    ratios = [float(word.strip("()")) for word in stored if word.startswith("(")]
    # Two unshared layers and one shared of plain's four; the tables weigh something too.
    assert all(0.7 < ratio < 0.9 for ratio in ratios) and len(ratios) == 2
    assert done.stdout.rstrip().splitlines()[-1].startswith("this command: ")


def test_a_step_too_large_for_a_tpu():
    """The compiler's own message, whatever form it has in this version, is understood."""
    cfg = dataclasses.replace(on("plain", 2**16, fsdp=4), seq_len=64, loss_chunk_size=None)
    cfg = alternatives.with_changes(cfg, {"model.vocab_size": 2**15})
    answer = make_plan(cfg, parse_topology("v5e:2x2"))
    assert isinstance(answer, TooLarge)
    assert answer.needed > answer.available > 15 * 2**30
    assert answer.parts[0][0].startswith("logits of one chunk")


@pytest.mark.parametrize("budget", [0, -5.0, math.nan, math.inf])
def test_a_budget_is_a_number_of_tokens(budget):
    with pytest.raises(ValueError, match=r"^tokens=.*: must be a positive number of tokens"):
        make_plan(TrainConfig(), parse_topology("v5e:2x2"), budget)


def test_a_wrong_topology_is_one_line():
    done = command("--config=configs/mor.py", "--topology=v5e:16x15")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --topology='v5e:16x15'") and done.stderr.count("\n") == 1
