"""State dicts for torch: what is loaded is what was written, in every way of loading."""

import zipfile

import ml_dtypes
import numpy as np
import pytest
import torch

from mor_jax.checkpoint.lazy_arrays import ArraySpec, LazyArrays, from_arrays
from mor_jax.convert.torch_writer import ALIGNMENT, write_torch

RNG = np.random.default_rng(0)
ARRAYS = {
    "embed.weight": RNG.normal(size=(7, 5)).astype(np.float32),
    "layers.0.weight": RNG.normal(size=(3, 2, 4)).astype(np.float32).transpose(2, 0, 1),
    "scale": RNG.normal(size=11).astype(np.float32),
    "single": np.array([2.5], np.float32),
    "none": np.zeros((0, 4), np.float32),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("mmap", [True, False])
def test_torch_loads_what_was_written(dtype, mmap, tmp_path):
    path = tmp_path / "pytorch_model.bin"
    write_torch(path, from_arrays(ARRAYS), {"head.weight": "embed.weight"}, dtype)
    state = torch.load(path, weights_only=True, mmap=mmap)
    assert list(state) == [*ARRAYS, "head.weight"]
    narrow = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}[dtype]
    for name, array in ARRAYS.items():
        assert state[name].dtype == getattr(torch, dtype)
        assert state[name].shape == array.shape and state[name].is_contiguous()
        np.testing.assert_array_equal(state[name].float(), array.astype(narrow).astype(np.float32))
    assert state["head.weight"].data_ptr() == state["embed.weight"].data_ptr()
    if mmap:
        assert all(tensor.data_ptr() % ALIGNMENT == 0 for tensor in state.values())


def test_the_archive_is_sound_and_a_module_takes_it(tmp_path):
    path = tmp_path / "model.bin"
    linear = torch.nn.Linear(4, 3)
    arrays = {name: tensor.numpy() for name, tensor in linear.state_dict().items()}
    write_torch(path, from_arrays(arrays))
    assert zipfile.ZipFile(path).testzip() is None
    other = torch.nn.Linear(4, 3)
    other.load_state_dict(torch.load(path, weights_only=True))
    assert torch.equal(other.weight, linear.weight)
    # What torch writes of it is the same as of its own.
    torch.save(other.state_dict(), path)
    assert torch.equal(torch.load(path, weights_only=True)["bias"], linear.bias)


def test_one_tensor_is_held_at_a_time(tmp_path):
    asked = []

    def read(name):
        asked.append(name)
        return np.full((2, 3), len(asked), np.float32)

    specs = {name: ArraySpec((2, 3)) for name in "abc"}
    write_torch(tmp_path / "x.bin", LazyArrays("here", specs, read), {"d": "b"})
    state = torch.load(tmp_path / "x.bin", weights_only=True)
    assert asked == ["a", "b", "c"]
    assert [float(state[name][0, 0]) for name in "abcd"] == [1, 2, 3, 2]


def test_an_alias_of_nothing_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"aliases=\['head'\]"):
        write_torch(tmp_path / "x.bin", from_arrays(ARRAYS), {"head": "embedding"})
    assert not list(tmp_path.iterdir())
