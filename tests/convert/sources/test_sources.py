"""Foreign files: every layout gives the same numbers, and what is damaged or unsafe is named."""

import collections
import json
import os
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mor_jax.convert.sources import open_weights

RNG = np.random.default_rng(0)
ARRAYS = {
    "model.embed_tokens.weight": RNG.normal(size=(6, 4)).astype(np.float32),
    "model.layers.0.mlp.gate_proj.weight": RNG.normal(size=(8, 4)).astype(np.float32),
    "model.norm.weight": RNG.normal(size=4).astype(np.float32),
}
TENSORS = {name: torch.from_numpy(array) for name, array in ARRAYS.items()}


def check_all(path, expected=ARRAYS, dtype="float32"):
    """The tensors at `path` are `expected`; returns what was opened."""
    found = open_weights(path)
    assert found.tensors.specs.keys() == expected.keys()
    for name, array in expected.items():
        assert found.tensors.specs[name].shape == array.shape
        assert found.tensors.specs[name].dtype == dtype
        got = found.tensors.read(name)
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, array)
    return found


def write_sharded(folder, suffix):
    """Two shards with their index, safetensors or torch."""
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    write = save_file if suffix == "safetensors" else torch.save
    files = [f"{stem}-{i}-of-00002.{suffix}" for i in ("00001", "00002")]
    parts = {files[0]: list(TENSORS)[:2], files[1]: list(TENSORS)[2:]}
    for file, names in parts.items():
        write({name: TENSORS[name] for name in names}, folder / file)
    places = {name: file for file, names in parts.items() for name in names}
    index = folder / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return index, files


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_floats_of_every_width_are_widened_exactly(dtype, suffix, tmp_path):
    kind = getattr(torch, dtype)
    stored = {name: tensor.to(kind) for name, tensor in TENSORS.items()}
    path = tmp_path / f"x.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(stored, path)
    expected = {name: tensor.to(torch.float32).numpy() for name, tensor in stored.items()}
    check_all(path, expected, dtype)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards_are_read_as_one(suffix, tmp_path):
    index, _ = write_sharded(tmp_path, suffix)
    assert "sharded" in check_all(tmp_path).format
    check_all(index)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_single_file_beside_an_index_of_others_is_refused(suffix, tmp_path):
    index, _ = write_sharded(tmp_path, suffix)
    single = tmp_path / index.name.removesuffix(".index.json")
    (save_file if suffix == "safetensors" else torch.save)(TENSORS, single)
    with pytest.raises(ValueError, match=rf"{single.name}.*{index.name} of 2 .*--source=") as error:
        open_weights(tmp_path)
    assert "\n" not in str(error.value)
    check_all(index)
    check_all(single)
    # An index of the single file itself says nothing new.
    index.write_text(json.dumps({"weight_map": dict.fromkeys(TENSORS, single.name)}))
    assert "sharded" not in check_all(tmp_path).format


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_missing_and_foreign_shards_are_named(suffix, tmp_path):
    index, files = write_sharded(tmp_path, suffix)
    shutil.copy(tmp_path / files[1], tmp_path / "kept")
    shutil.copy(tmp_path / files[0], tmp_path / files[1])
    with pytest.raises(ValueError, match="does not match its shards") as error:
        open_weights(tmp_path)
    assert "model.norm.weight: not in" in str(error.value)
    assert "model.embed_tokens.weight: in" in str(error.value)
    (tmp_path / files[0]).unlink()
    (tmp_path / files[1]).unlink()
    with pytest.raises(ValueError, match="are missing") as error:
        open_weights(tmp_path)
    assert all(file in str(error.value) for file in (index.name, *files))
    index.write_text('{"weight_map": {"a": "../../etc/passwd"}}')
    with pytest.raises(ValueError, match="files in the directory of the index"):
        open_weights(tmp_path)
    for text in ('{"weight_', "[" * 10**5, '{"weight_map": 3}'):
        index.write_text(text)
        with pytest.raises(ValueError, match="is not an index of shards"):
            open_weights(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("damage", ["cut", "head", "empty"])
def test_damaged_files_are_named(name, damage, tmp_path):
    path = tmp_path / name
    (save_file if name.endswith("safetensors") else torch.save)(TENSORS, path)
    raw = path.read_bytes()
    damaged = {"cut": raw[:-20], "head": b"\xff" * 16 + raw[16:], "empty": b""}[damage]
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=rf"{name}.*damaged") as error:
        open_weights(tmp_path)
    assert f"{len(damaged)} bytes" in str(error.value)


class Payload:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_pickle_is_not_run(legacy, tmp_path):
    path, trace = tmp_path / "pytorch_model.bin", tmp_path / "trace"
    state = TENSORS | {"extra": Payload(trace)}
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match="only tensors are loaded") as error:
        open_weights(tmp_path)
    assert "mkdir" in str(error.value) and "model.state_dict()" in str(error.value)
    assert "weights_only=False" not in str(error.value)
    assert not trace.exists()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"module": state, "epoch": 3},
        lambda state: {"state_dict": {"model": state}},
        lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
        lambda state: {"model": {f"module._orig_mod.{n}": t for n, t in state.items()}},
        lambda state: {n.replace("mlp.", "mlp._orig_mod."): t for n, t in state.items()},
        lambda state: {f"_fsdp_wrapped_module.{name}": t for name, t in state.items()},
    ],
    ids=["module", "nested", "parallel", "compiled", "compiled inside", "fsdp"],
)
def test_wrappers_are_undone(wrap, tmp_path):
    path = tmp_path / "checkpoint.pt"
    torch.save(wrap(TENSORS), path)
    check_all(path)


def test_wrappers_are_undone_in_safetensors(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({f"_orig_mod.{name}": tensor for name, tensor in TENSORS.items()}, path)
    check_all(tmp_path)


def test_files_of_old_releases_are_read(tmp_path):
    torch.save(TENSORS, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    check_all(tmp_path / "old.pt")


@pytest.mark.parametrize(
    ("saved", "reason"),
    [
        ([1, 2], "contains no state dict"),
        ({"epoch": 3}, "contains no state dict"),
        (TENSORS | {"steps": 4}, r"\['steps'\].*not tensors"),
        (
            TENSORS | {"q": torch.zeros(3, dtype=torch.int8)},
            r"q \(int8\).*other types than float64",
        ),
        (TENSORS | {"s": torch.zeros(2, 2).to_sparse()}, r"s \(torch.sparse_coo\)"),
        (
            {"module.a": torch.ones(1), "module._orig_mod.a": torch.ones(1)},
            "prefixes of module wrappers",
        ),
    ],
)
def test_other_contents_are_refused(saved, reason, tmp_path):
    torch.save(saved, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=reason):
        open_weights(tmp_path / "x.pt")


def test_quantized_safetensors_are_refused(tmp_path):
    save_file({"w": torch.zeros(3, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"w \(I8\).*other types than F64"):
        open_weights(tmp_path)


def deepspeed(folder, **files):
    """A DeepSpeed checkpoint: 'latest', and in its step the files given (name -> contents)."""
    step = folder / "global_step7"
    step.mkdir(parents=True)
    (folder / "latest").write_text("global_step7\n")
    for name, contents in files.items():
        torch.save(contents, step / f"{name}.pt")
    return step


def engine_state(tensors):
    """What DeepSpeed stores for the model of one process."""
    return {
        "module": collections.OrderedDict(tensors),
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": [collections.OrderedDict((n, t.shape) for n, t in tensors.items())],
        "shared_params": {},
        "lr_scheduler": {"last_epoch": 7},
        "sparse_tensor_module_names": set(),
        "global_steps": 7,
        "dp_world_size": 8,
        "ds_config": {"zero_optimization": {"stage": 2}},
        "ds_version": "0.14.4",
    }


def test_deepspeed_stages_that_keep_weights_whole(tmp_path):
    half = {name: tensor.bfloat16() for name, tensor in TENSORS.items()}
    shards = {f"bf16_zero_pp_rank_{i}_mp_rank_00_optim_states": {"x": i} for i in range(2)}
    step = deepspeed(tmp_path, mp_rank_00_model_states=engine_state(half), **shards)
    expected = {name: tensor.float().numpy() for name, tensor in half.items()}
    found = check_all(tmp_path, expected, "bfloat16")
    assert found.format == "DeepSpeed (global_step7)"
    assert "zero_to_fp32" in found.notes[0]
    check_all(step, expected, "bfloat16")
    (tmp_path / "latest").write_text("global_step8")
    with pytest.raises(ValueError, match="'latest' names global_step8"):
        open_weights(tmp_path)


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        (["zero_pp_rank_0_mp_rank_00_model_states"], "zero_to_fp32.py"),
        (["mp_rank_00_model_states", "mp_rank_01_model_states"], "must contain only mp_rank_00"),
        (["layer_00-model_00-model_states", "mp_rank_00_model_states"], "tensor or pipeline"),
        ([], "must contain only mp_rank_00"),
    ],
    ids=["zero3", "tensor parallel", "pipeline", "nothing"],
)
def test_deepspeed_weights_in_parts_are_refused_with_the_way_out(files, reason, tmp_path):
    deepspeed(tmp_path, **{file: engine_state(TENSORS) for file in files})
    with pytest.raises(ValueError, match=reason):
        open_weights(tmp_path)


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_states_of_accelerate(weights, tmp_path):
    (save_file if weights.endswith("safetensors") else torch.save)(TENSORS, tmp_path / weights)
    torch.save({"state": {}, "param_groups": []}, tmp_path / "optimizer.bin")
    (tmp_path / "random_states_0.pkl").write_bytes(b"\x80\x04N.")
    check_all(tmp_path)


def test_safetensors_go_before_pickles_and_a_lone_file_is_found(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"damaged")
    check_all(tmp_path)
    lone = tmp_path / "lone"
    lone.mkdir()
    save_file(TENSORS, lone / "weights.safetensors")
    check_all(lone)


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("adapter_model.safetensors", "merge_and_unload"),
        ("pytorch_model_fsdp_0/__0_0.distcp", "merge-weights"),
        ("consolidated.00.pth", "Meta's own format"),
        ("model-00001-of-00002.safetensors", "without model.safetensors.index.json"),
        ("model.Q4_0.gguf", "Give the path of one"),
        ("readme.md", "contains no weights, only"),
    ],
)
def test_directories_without_weights_name_the_way_out(file, reason, tmp_path):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_bytes(b"x")
    with pytest.raises(ValueError, match=reason):
        open_weights(tmp_path)


@pytest.mark.parametrize("path", ["nowhere", "weights.npz"])
def test_other_paths_are_refused(path, tmp_path):
    (tmp_path / "weights.npz").write_bytes(b"x")
    with pytest.raises(ValueError, match=path):
        open_weights(tmp_path / path)
