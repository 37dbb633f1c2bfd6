"""Exports: what is in them, that PyTorch computes the same from them, that they lead back."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from support.run_directories import STEP, model, trained
from support.tiny import TINY
from transformers import AutoModelForCausalLM, AutoTokenizer

from mor_jax.checkpoint.checkpointer import Checkpointer
from mor_jax.checkpoint.lazy_arrays import flatten, from_arrays
from mor_jax.config import CheckpointConfig, parsing
from mor_jax.convert.exports import ExportOptions, export
from mor_jax.convert.imports import ImportOptions, import_run
from mor_jax.convert.run_source import open_run
from mor_jax.convert.shards import INDEX, write_shards
from mor_jax.models.param_count import unique_parameters
from mor_jax.models.params import forward, unembed
from mor_jax.models.routing.router import Route
from mor_jax.runtime import exit_codes
from mor_jax.types import Batch

COMMAND = [sys.executable, str(Path(__file__).parents[2] / "launch" / "convert.py")]
TOKENS = np.random.default_rng(0).integers(0, 256, (2, 24))


def exported(tmp_path, name, target, **options):
    """A run of `name`, its parameters, and where it was exported to."""
    params = trained(tmp_path / "run", name)
    done = export(
        open_run(tmp_path / "run"), target, ExportOptions(output=tmp_path / "out", **options)
    )
    return params, done


def ours(name, params):
    cfg, ids = model(name), jnp.asarray(TOKENS, jnp.int32)

    @jax.jit
    def logits(params):
        out = forward(cfg, params, Batch(ids, ids), Route(mode="causal"))
        return unembed(cfg, params, out.hidden)

    return np.asarray(logits(params))


def theirs(folder, **options):
    loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)
    with torch.no_grad():
        return loaded, loaded(torch.from_numpy(TOKENS)).logits


def close(got, want, tolerance=1e-5):
    assert np.abs(got.numpy() - want).max() / np.abs(want).max() < tolerance


def test_an_hf_export_is_complete_and_computes_the_same(tmp_path):
    params, done = exported(tmp_path, "expert", "hf")
    assert done.stored == unique_parameters(model("expert"))
    loaded, logits = theirs(done.output)
    close(logits, ours("expert", params))
    assert loaded.num_parameters() == done.stored and loaded.config.eos_token_id == 0
    tokenizer = AutoTokenizer.from_pretrained(done.output)
    assert tokenizer("né", add_special_tokens=False).input_ids == list("né".encode())
    card = (done.output / "README.md").read_text()
    assert f'path = "{done.output.name}"' in card and "Trained with mor_jax" in card
    for told in ("1.2500", "1.1250", f"{done.stored:,}", "expert-choice", f"| steps | {STEP} of 8"):
        assert told in card
    with pytest.raises(ValueError, match=r"not empty.*--overwrite"):
        export(open_run(tmp_path / "run"), "hf", ExportOptions(output=done.output))


@pytest.mark.parametrize("name", ["plain", "plain_untied", "middle_cycle_norms", "sequence"])
def test_a_llama_export_is_a_plain_llama(tmp_path, name):
    params, done = exported(tmp_path, name, "llama", unroll=True)
    loaded, logits = theirs(done.output)
    assert type(loaded).__name__ == "LlamaForCausalLM"
    assert loaded.config.tie_word_embeddings == model(name).tie_embeddings
    close(logits, ours(name, params))


@pytest.mark.parametrize(
    ("name", "target", "why"),
    [
        ("middle_cycle", "llama", "--unroll"),
        ("plain", "hf", "--to=llama only"),
        ("expert", "llama", "different depths"),
        ("middle_cycle_kv", "llama", "keys and values"),
    ],
)
def test_what_a_target_cannot_express_is_refused(tmp_path, name, target, why):
    with pytest.raises(ValueError, match=why):
        exported(tmp_path, name, target, unroll=name != "middle_cycle")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", TINY)
def test_the_references_checkpoint_leads_back_to_the_same_model(tmp_path, name):
    params, done = exported(tmp_path, name, "reference")
    state = torch.load(done.output / "pytorch_model.bin", weights_only=True)
    stored = {tensor.data_ptr(): tensor.numel() for tensor in state.values()}
    assert sum(stored.values()) == done.stored == unique_parameters(model(name))
    made = import_run("reference", str(done.output), ImportOptions(workdir=tmp_path / "back"))
    ours, theirs = model(name), made.cfg.model
    assert theirs.router.capacities(ours.num_recursions) == ours.router.capacities(
        ours.num_recursions
    )
    assert (theirs.kv_mode, theirs.sharing, theirs.num_layers) == (
        ours.kv_mode,
        ours.sharing,
        ours.num_layers,
    )
    back = open_run(made.workdir).params
    for path, value in flatten(params):
        np.testing.assert_array_equal(back.read(path), value)


def test_shards_have_an_index_and_load_as_one(tmp_path):
    arrays = {name: np.full((300, 400), i, np.float32) for i, name in enumerate("abcdefg")}
    files = write_shards(tmp_path, from_arrays(arrays), "float32", 10**6)
    assert len(files) == 4
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 7 * 300 * 400 * 4
    for name, value in arrays.items():
        read = load_file(tmp_path / index["weight_map"][name])[name]
        np.testing.assert_array_equal(read, value)
    with pytest.raises(ValueError, match="max_shard_size"):
        write_shards(tmp_path, from_arrays(arrays), "float32", 10**5)


@pytest.mark.parametrize(("text", "size"), [("2GB", 2 * 10**9), ("1.5 mb", 1500000), ("7", 7)])
def test_sizes_are_read_with_units(text, size):
    assert parsing.parse_bytes("max_shard_size", text) == size
    with pytest.raises(ValueError, match="max_shard_size='2 elephants'"):
        parsing.parse_bytes("max_shard_size", "2 elephants")


def test_narrow_weights_are_rounded_and_too_large_ones_refused(tmp_path):
    params, done = exported(tmp_path, "plain", "llama", dtype="bfloat16")
    loaded, _ = theirs(done.output, torch_dtype="auto")
    assert loaded.dtype == torch.bfloat16
    want = np.asarray(params["embed"]["weight"].astype(jnp.bfloat16), np.float32)
    np.testing.assert_array_equal(loaded.get_input_embeddings().weight.float().detach(), want)

    def large(params):
        return params | {"norm": {"scale": params["norm"]["scale"] * 1e6}}

    trained(tmp_path / "large", "plain", change=large)
    options = ExportOptions(output=tmp_path / "half", dtype="float16")
    with pytest.raises(ValueError, match=r"norm\.weight reaches .*e\+06, more than float16"):
        export(open_run(tmp_path / "large"), "llama", options)
    assert not (tmp_path / "half").exists()


def test_a_checkpoint_of_eight_devices_is_read_without_them(tmp_path):
    params = trained(tmp_path / "run", "expert_cycle", fsdp=8)
    code = (
        "import sys, jax; from mor_jax.convert.run_source import open_run\n"
        "assert len(jax.devices()) == 1\n"
        "import numpy as np; run = open_run(sys.argv[1])\n"
        "np.savez(sys.argv[2], **{n: run.params.read(n) for n in run.params.specs})"
    )
    alone = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[2]), "PATH": ""}
    done = [sys.executable, "-c", code, str(tmp_path / "run"), str(tmp_path / "read.npz")]
    subprocess.run(done, check=True, env=alone)
    read, stored = np.load(tmp_path / "read.npz"), list(flatten(params))
    assert sorted(read.files) == sorted(path for path, _ in stored)
    for path, value in stored:
        np.testing.assert_array_equal(read[path], value)


def test_weights_that_are_not_finite_are_not_exported(tmp_path):
    def broken(params):
        return params | {"norm": {"scale": params["norm"]["scale"].at[3].set(jnp.nan)}}

    trained(tmp_path / "run", "plain", change=broken)
    with pytest.raises(ValueError, match=r"norm\.scale.* 1 values .* NaN"):
        export(open_run(tmp_path / "run"), "hf", ExportOptions(output=tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_damaged_checkpoints_are_passed_over_or_named(tmp_path):
    params = trained(tmp_path / "run", "plain")
    with Checkpointer(tmp_path / "run", CheckpointConfig()) as checkpoints:
        config = json.loads((tmp_path / "run" / "config.json").read_text())
        checkpoints.save(8, {"params": params, "step": jnp.int32(8)}, 0, config)
    assert open_run(tmp_path / "run").step == 8
    folder = tmp_path / "run/checkpoints/00000008"
    sharding = next(folder.rglob("_sharding"))
    sharding.write_text(sharding.read_text().replace("5", "6"))
    options = ExportOptions(output=tmp_path / "out")
    with pytest.raises(
        ValueError, match=r"00000008.*_sharding does not match its CRC-32.*steps: \[7, 8\]"
    ):
        export(open_run(tmp_path / "run"), "hf", options)
    assert not (tmp_path / "out").exists()
    sharding.write_text("{}")
    assert open_run(tmp_path / "run").step == STEP
    with pytest.raises(ValueError, match=r"_sharding has 2 bytes"):
        open_run(tmp_path / "run", 8)
    with pytest.raises(ValueError, match="not the directory of a run"):
        open_run(tmp_path)


def test_the_command_reports_and_refuses(tmp_path):
    trained(tmp_path / "run", "token")
    parts = ["export", "--to=hf", f"--workdir={tmp_path / 'run'}", f"--output={tmp_path / 'out'}"]
    done = subprocess.run([*COMMAND, *parts], capture_output=True, text=True)
    assert done.returncode == exit_codes.OK, done.stderr
    assert f"step {STEP}" in done.stdout and "modeling_mor.py" in done.stdout
    again = subprocess.run([*COMMAND, *parts], capture_output=True, text=True)
    assert again.returncode == exit_codes.REFUSED and again.stderr.startswith("error: output=")
    source, workdir = f"--source={tmp_path / 'out'}", f"--workdir={tmp_path / 'back'}"
    parts = ["import", "--from=hf", source, workdir]
    done = subprocess.run([*COMMAND, *parts], capture_output=True, text=True)
    assert done.returncode == exit_codes.OK, done.stderr
    # The line works from any directory.
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("train from it: ")]
    program, command, config, run = shlex.split(line)[3:]
    name, _, directory = config.removeprefix("--config=").partition(":")
    assert (program, command, name) == ("mor", "train", "from_workdir")
    assert directory == run.removeprefix("--workdir=") == str(tmp_path / "back")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    save_file(dict(list(tensors.items())[1:]), tmp_path / "out" / "model.safetensors")
    done = subprocess.run([*COMMAND, *parts, "--overwrite"], capture_output=True, text=True)
    assert done.returncode == exit_codes.REFUSED and "missing" in done.stderr
    assert (tmp_path / "back" / "config.json").exists()
