"""Weights that a run starts from: exact, placed, streamed, and refused where they are damaged."""

import dataclasses
import weakref

import jax
import numpy as np
import pytest
from support.seeded import random_params
from support.tiny import TINY

from mor_jax.checkpoint import pretrained
from mor_jax.checkpoint.lazy_arrays import LazyArrays, flatten, from_arrays
from mor_jax.config import MeshConfig
from mor_jax.distributed import mesh as sharding
from mor_jax.models.params import abstract_params, logical_axes

CFG = dataclasses.replace(TINY["expert"], num_heads=8, num_kv_heads=4)
SOURCE = {"format": "safetensors", "from": "a/model"}


def arrays(cfg=CFG):
    return from_arrays(dict(flatten(random_params(cfg))))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    pretrained.write(workdir, CFG, arrays(), SOURCE)
    return workdir


@pytest.fixture
def workdir(tmp_path):
    """One that a test may damage."""
    pretrained.write(tmp_path, CFG, arrays(), SOURCE)
    return tmp_path


def placed(mesh):
    shapes = abstract_params(CFG)
    where = sharding.param_shardings(mesh, logical_axes(CFG), shapes)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, where
    )


@pytest.mark.parametrize(
    "mesh", [MeshConfig(data=8), MeshConfig(data=2, fsdp=4), MeshConfig(data=1, fsdp=2, tensor=4)]
)
def test_every_placement_gets_the_same_bits(written, mesh):
    abstract = placed(sharding.make_mesh(mesh))
    made = pretrained.load(written, abstract)
    jax.tree.map(np.testing.assert_array_equal, made, random_params(CFG))
    assert jax.tree.map(lambda x: x.sharding, made) == jax.tree.map(lambda x: x.sharding, abstract)


def test_one_device_gets_all_of_it(written):
    made = pretrained.load(written, abstract_params(CFG))
    jax.tree.map(np.testing.assert_array_equal, made, random_params(CFG))
    assert all(len(leaf.devices()) == 1 for leaf in jax.tree.leaves(made))


def test_one_array_is_read_alone(written):
    params = random_params(CFG)
    for name, wanted in (
        ("shared.mlp.up", params["shared"]["mlp"]["up"]),
        ("norm.scale", params["norm"]["scale"]),
    ):
        np.testing.assert_array_equal(pretrained.array(written, name), wanted)
    with pytest.raises(ValueError, match=r"arrays/head\.weight\.safetensors': cannot be read"):
        pretrained.array(written, "head.weight")


def test_says_what_it_is_and_whence(written):
    assert pretrained.present(written) and not pretrained.present(written / "elsewhere")
    found = pretrained.verify(written, CFG)
    assert found["source"] == SOURCE and found["model"]["hidden_size"] == CFG.hidden_size
    assert found["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(random_params(CFG)))
    assert found["arrays"]["norm.scale"] == "float32[32]"


def test_one_array_is_held_at_a_time(tmp_path):
    plain = dict(flatten(random_params(CFG)))
    alive: list[weakref.ref] = []

    def read(name):
        assert not any(ref() is not None for ref in alive), "an earlier array is still held"
        value = np.array(plain[name])
        alive.append(weakref.ref(value))
        return value

    pretrained.write(tmp_path, CFG, LazyArrays("here", from_arrays(plain).specs, read), SOURCE)
    assert len(alive) == len(plain)


def test_stores_that_are_no_file_system_are_read_and_written_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "_remote", lambda path: True)
    pretrained.write(tmp_path, CFG, arrays(), SOURCE)
    made = pretrained.load(tmp_path, placed(sharding.make_mesh(MeshConfig(data=2, fsdp=4))))
    jax.tree.map(np.testing.assert_array_equal, made, random_params(CFG))
    cut_short(tmp_path / "initial" / "arrays" / "norm.scale.safetensors")
    with pytest.raises(ValueError, match=r"norm\.scale\.safetensors': cannot be read"):
        pretrained.load(tmp_path, abstract_params(CFG))


def test_weights_of_another_model_are_listed_and_nothing_is_written(tmp_path):
    given = dict(flatten(random_params(CFG)))
    given["extra"] = np.zeros(3)
    del given["norm.scale"]
    given["embed.weight"] = given["embed.weight"][:5]
    with pytest.raises(ValueError) as error:
        pretrained.write(tmp_path, CFG, from_arrays(given, "model.gguf"), SOURCE)
    for line in (
        "model.gguf: holds another model's weights",
        "embed.weight: float32[5, 32] in the weights, float32[64, 32] in the model",
        "extra: float32[3] in the weights, absent in the model",
        "norm.scale: absent in the weights, float32[32] in the model",
    ):
        assert line in str(error.value)
    assert not list(tmp_path.iterdir())


def test_weights_are_not_written_over_others(workdir):
    with pytest.raises(ValueError, match="already exists"):
        pretrained.write(workdir, CFG, arrays(), SOURCE)


def test_reading_with_another_model_is_refused(written):
    other = dataclasses.replace(CFG, intermediate_size=64)
    wanted = r"mlp\.down: float32\[2, 48, 32\] in the weights, float32\[2, 64, 32\] in the model"
    for read in (
        lambda: pretrained.verify(written, other),
        lambda: pretrained.load(written, abstract_params(other)),
    ):
        with pytest.raises(ValueError, match=wanted):
            read()


def cut_short(file):
    file.write_bytes(file.read_bytes()[:-4])


def flipped(file):
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("arrays/shared.mlp.up.safetensors", cut_short, r"shared\.mlp\.up.* bytes, expected"),
        ("arrays/norm.scale.safetensors", flipped, r"norm\.scale.*does not match its CRC-32"),
        ("arrays/norm.scale.safetensors", lambda f: f.unlink(), r"norm\.scale.* is missing"),
        (
            "manifest.json",
            lambda f: f.unlink(),
            r"incomplete or damaged.*manifest\.json is miss",
        ),
        ("manifest.json", cut_short, r"manifest\.json cannot be read"),
    ],
)
def test_damage_is_found_and_named(workdir, name, damage, message):
    damage(workdir / "initial" / name)
    with pytest.raises(ValueError, match=message):
        pretrained.verify(workdir, CFG)


def test_a_file_that_breaks_after_it_was_checked_is_named(workdir):
    cut_short(workdir / "initial" / "arrays" / "norm.scale.safetensors")
    with pytest.raises(ValueError, match=r"norm\.scale\.safetensors': cannot be read .*Import the"):
        pretrained.load(workdir, abstract_params(CFG))
