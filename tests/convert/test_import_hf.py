"""Models of Hugging Face: transformers' logits are ours, and what is not Llama is named."""

import copy
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from support.rope_settings import LLAMA3
from support.seeded import random_params
from support.tiny import TINY
from transformers import LlamaConfig, LlamaForCausalLM

from mor_jax.checkpoint.lazy_arrays import flatten, from_arrays, nested
from mor_jax.config import RopeScaling
from mor_jax.convert.export_config import llama_config as exported_llama
from mor_jax.convert.export_config import mor_config as exported_mor
from mor_jax.convert.hf_config import llama_config, mor_config
from mor_jax.convert.import_hf import import_hf
from mor_jax.convert.names import EMBEDDING, HEAD, llama_entries, mor_entries
from mor_jax.convert.torch_writer import write_torch
from mor_jax.convert.views import as_tensors
from mor_jax.models.params import forward, unembed
from mor_jax.types import Batch

PLAIN = TINY["plain"]
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
}


def write(folder, cfg=PLAIN, hf=None, table=None, **changes):
    """The plain model `cfg` in `folder`, as safetensors; `changes` are tensors or None."""
    view = as_tensors(
        cfg, (table or llama_entries)(cfg), from_arrays(dict(flatten(random_params(cfg))))
    )
    tensors = {name: torch.from_numpy(np.array(view.read(name))) for name in view.specs}
    tensors = {name: t for name, t in (tensors | changes).items() if t is not None}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(hf or exported_llama(cfg)))
    return str(folder)


def settings(folder, **changes):
    """Changes config.json in `folder`; None takes a key away."""
    path = folder / "config.json"
    told = json.loads(path.read_text()) | changes
    told = {key: value for key, value in told.items() if value is not None}
    path.write_text(json.dumps(told))


def assert_equal(params, expected):
    for path, value in flatten(expected):
        np.testing.assert_array_equal(params.read(path), value, err_msg=path)


@pytest.mark.parametrize(
    "options",
    [
        {"tie_word_embeddings": True, "head_dim": 12},
        {"rope_theta": 500.0, "rope_scaling": LLAMA3},
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}, "rms_norm_eps": 1e-3},
    ],
    ids=["tied, wide heads", "llama3 scaling", "linear scaling"],
)
def test_logits_are_those_of_transformers(options, tmp_path):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, **copy.deepcopy(options))).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path)
    imported = import_hf(str(tmp_path))
    assert imported.cfg.rope_scaling.rope_type == options.get("rope_scaling", {}).get(
        "rope_type", "none"
    )
    assert imported.cfg.tie_embeddings == options.get("tie_word_embeddings", False)
    ids = np.random.default_rng(0).integers(0, 64, (2, 100))
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)).logits.numpy()
    tokens = jnp.asarray(ids, jnp.int32)

    @jax.jit
    def logits(params):
        hidden = forward(imported.cfg, params, Batch(tokens, tokens)).hidden
        return unembed(imported.cfg, params, hidden)

    got = logits(jax.tree.map(jnp.asarray, nested(imported.params)))
    assert np.max(np.abs(got - expected)) < 1e-5 * np.max(np.abs(expected))


def test_rounded_capacities_come_back(tmp_path):
    router = dataclasses.replace(TINY["expert"].router, capacity_multiple=128)
    cfg = dataclasses.replace(TINY["expert"], router=router)
    write(tmp_path, cfg, exported_mor(cfg), mor_entries)
    assert import_hf(str(tmp_path)).cfg.router == router


@pytest.mark.parametrize("name", TINY)
def test_our_own_export_comes_back(name, tmp_path):
    cfg = TINY[name]
    write(tmp_path, cfg, exported_mor(cfg), mor_entries)
    imported = import_hf(str(tmp_path))
    exact = dataclasses.replace(cfg.router, capacity_multiple=1)
    router = cfg.router if cfg.router.kind == "none" else exact
    assert imported.cfg == dataclasses.replace(cfg, attention="auto", router=router)
    assert_equal(imported.params, random_params(cfg))
    assert imported.facts["architecture"] == "mor" and not imported.facts["notes"]


def test_settings_of_generation_are_told(tmp_path):
    cfg = TINY["expert"]
    write(tmp_path, cfg, exported_mor(cfg) | {"thresholds": [0.0, 0.1, 0.2]}, mor_entries)
    assert "thresholds" in import_hf(str(tmp_path)).facts["notes"][0]


def test_half_precision_torch_files_and_other_places_of_weights(tmp_path):
    folder, other = tmp_path / "hf", tmp_path / "state.pt"
    folder.mkdir()
    write(folder)
    view = as_tensors(PLAIN, llama_entries(PLAIN), from_arrays(dict(flatten(random_params(PLAIN)))))
    write_torch(folder / "pytorch_model.bin", view, {HEAD: EMBEDDING}, "bfloat16")
    (folder / "model.safetensors").rename(tmp_path / "weights.safetensors")
    rounded = jax.tree.map(
        lambda x: np.asarray(x.astype(jnp.bfloat16), np.float32), random_params(PLAIN)
    )
    imported = import_hf(str(folder))
    assert_equal(imported.params, rounded)
    assert imported.facts["tensors"] == {"bfloat16": len(view.specs) + 1}
    assert_equal(import_hf(str(folder / "pytorch_model.bin")).params, rounded)
    write_torch(other, view)
    whole = import_hf(str(folder), weights=str(other))
    assert_equal(whole.params, random_params(PLAIN))


def test_both_generations_of_config_say_the_same():
    base = exported_llama(PLAIN)
    del base["rope_theta"], base["rope_scaling"]
    linear = {"rope_type": "linear", "factor": 2}
    pairs = [
        ({"rope_theta": 7.0}, {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}),
        (
            {"rope_theta": 7.0, "rope_scaling": LLAMA3},
            {"rope_parameters": LLAMA3 | {"rope_theta": 7.0}},
        ),
        (
            {"rope_theta": 7.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_theta": 7.0, "rope_parameters": linear | {"rope_theta": 7.0}},
        ),
    ]
    kinds = []
    for old, new in pairs:
        one, other = (llama_config(base | form, tied=True) for form in (old, new))
        assert one == other
        assert one.rope_theta == 7.0
        kinds.append(one.rope_scaling)
    assert kinds == [
        RopeScaling(),
        RopeScaling(rope_type="llama3", factor=8.0, original_max_position_embeddings=32),
        RopeScaling(rope_type="linear", factor=2.0),
    ]
    silent = {key: value for key, value in base.items() if not key.startswith("rope")}
    assert llama_config(silent, tied=True).rope_theta == 10000.0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "mistral"}, ["model_type='mistral'", "only the Llama architecture"]),
        ({"architectures": ["LlamaForSequenceClassification"]}, ["architectures"]),
        ({"attention_bias": True}, ["attention_bias=True"]),
        ({"mlp_bias": True}, ["mlp_bias=True"]),
        ({"hidden_act": "gelu"}, ["hidden_act='gelu'", "'silu'"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["quantization_config", "gptq"]),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, ["rope_scaling", "'yarn'"]),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["'dynamic'", "llama3"]),
        ({"rope_parameters": {"rope_type": "longrope"}}, ["rope_parameters", "'longrope'"]),
        ({"rope_parameters": {"rope_theta": 5.0}}, ["rope_theta", "given twice"]),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, ["partial_rotary_factor=0.5"]),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ["low_freq_factor", "lacks"]),
        ({"hidden_size": None, "num_hidden_layers": None}, ["hidden_size", "num_hidden_layers"]),
        ({"num_key_value_heads": 3}, ["kv_heads=3", "must divide"]),
        ({"hidden_size": "32"}, ["hidden_size='32'", "number"]),
        ({"num_attention_heads": 0}, ["num_attention_heads=0"]),
        ({"rms_norm_eps": "small"}, ["norm_eps='small'"]),
        ({"rope_theta": "many"}, ["rope_theta='many'"]),
        ({"rope_theta": [[]]}, ["rope_theta=[[]]"]),
        ({"architectures": 2}, ["architectures=2"]),
        ({"head_dim": 0}, ["head_dim=0"]),
        ({"num_key_value_heads": 0}, ["num_key_value_heads=0"]),
        ({"max_position_embeddings": 1}, ["max_position_embeddings=1", "at least 2"]),
        ({"num_hidden_layers": 2.0}, ["num_hidden_layers=2.0", "whole number of at least 1"]),
        ({"num_attention_heads": 10**9}, ["num_attention_heads=1000000000", "any model"]),
        ({"tie_word_embeddings": "false"}, ["tie_word_embeddings='false'", "without quotes"]),
        ({"attention_bias": "false"}, ["attention_bias='false'"]),
        ({"is_causal": False}, ["is_causal=False"]),
        ({"per_layer_config": {"0": {"head_dim": 4}}}, ["per_layer_config", "head_dim"]),
        ({"transformers_weights": "b.safetensors"}, ["transformers_weights='b.saf", "--source"]),
        ({"vocab_size": 65}, ["vocab_size=65", "embed_tokens.weight has 64 rows"]),
        ({"hidden_size": 64}, ["hidden_size=64", "has 32 columns"]),
        ({"intermediate_size": 64}, ["intermediate_size=64", "gate_proj.weight has 48 rows"]),
        ({"num_hidden_layers": 5}, ["num_hidden_layers=5", "the tensors make 4"]),
        ({"num_hidden_layers": 3}, ["num_hidden_layers=3", "the tensors make 4"]),
        ({"num_hidden_layers": 100000}, ["num_hidden_layers=100000", "the tensors make 4"]),
        ({"num_hidden_layers": 10**12}, ["num_hidden_layers=1000000000000", "any model"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_our_models_do_not_compute_is_refused_by_name(changes, words, tmp_path):
    path = write(tmp_path)
    settings(tmp_path, **changes)
    with pytest.raises(ValueError) as error:
        import_hf(path)
    assert all(word in str(error.value) for word in [*words, "config.json"]), error.value
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_an_export_with_settings_missing_or_unknown_is_refused():
    hf = exported_mor(TINY["expert"])
    with pytest.raises(ValueError, match=r"\['router'\].*lacks these settings"):
        mor_config({key: value for key, value in hf.items() if key != "router"}, tied=True)
    with pytest.raises(ValueError, match=r"router\.speed=1: unknown"):
        mor_config(hf | {"router": hf["router"] | {"speed": 1}}, tied=True)


def test_every_tensor_that_does_not_fit_is_listed(tmp_path):
    first = "model.layers.0.mlp.gate_proj.weight"
    norm = "model.layers.3.input_layernorm.weight"
    changes = {first: torch.ones(2, 3), norm: None, "model.layers.4.odd": torch.ones(1)}
    path = write(tmp_path, **changes)
    with pytest.raises(ValueError) as error:
        import_hf(path)
    for name in changes:
        assert name in str(error.value)


def test_the_tensors_decide_whether_embeddings_are_tied(tmp_path):
    path = write(tmp_path)
    table = load_file(tmp_path / "model.safetensors")[EMBEDDING]
    write(tmp_path, **{HEAD: table.clone()})
    assert import_hf(path).cfg.tie_embeddings and not import_hf(path).facts["notes"]
    settings(tmp_path, tie_word_embeddings=False)
    imported = import_hf(path)
    assert imported.cfg.tie_embeddings
    assert "are tied, though config.json says untied" in imported.facts["notes"][0]
    write(tmp_path, **{HEAD: table + 1})
    imported = import_hf(path)
    assert not imported.cfg.tie_embeddings
    assert "are untied, though config.json says tied" in imported.facts["notes"][0]
    # Without an unembedding, a model that is said not to be tied is not whole.
    write(tmp_path)
    settings(tmp_path, tie_word_embeddings=False)
    with pytest.raises(ValueError, match=rf"missing +{HEAD}"):
        import_hf(path)


def test_values_that_are_not_finite_are_refused_when_read(tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    broken = torch.zeros(48, 32)
    broken[3, 4] = float("nan")
    imported = import_hf(write(tmp_path, **{name: broken}))
    with pytest.raises(ValueError, match=r"up_proj.*1 values.*NaN"):
        imported.params.read("layers.mlp.up")


def words(count):
    """A tokenizer.json of `count` tokens and one that was added."""
    vocabulary = {f"w{i}": i for i in range(count)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.add_special_tokens(["</s>"])
    return tokenizer.to_str()


def test_tokenizers_come_along_unless_they_have_too_many_tokens(tmp_path):
    path = write(tmp_path)
    assert import_hf(path).tokenizer is None
    (tmp_path / "tokenizer.json").write_text(words(63))
    (tmp_path / "chat_template.jinja").write_text("{{ x }}")
    assert import_hf(path).tokenizer.keys() == {"tokenizer.json", "chat_template.jinja"}
    (tmp_path / "tokenizer.json").write_text(words(64))
    with pytest.raises(ValueError, match=r"tokenizer\.json=65: has a token 64.* embeds 64"):
        import_hf(path)
    assert import_hf(path, tokenizer=False).tokenizer is None
    for text in ("{}", "[" * 10**5, '{"model": {"vocab": {"a": "b", "c": 1}}}'):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(ValueError, match=r"tokenizer\.json.*not a Hugging Face tokenizer"):
            import_hf(path)


def test_what_is_taken_for_granted_is_said(tmp_path):
    path = write(tmp_path)

    def notes():
        return import_hf(path).facts["notes"]

    settings(tmp_path, model_type=None)
    assert notes() == []
    settings(tmp_path, architectures=None)
    assert notes() == ["config.json has neither model_type nor architectures: read as a llama"]
    settings(tmp_path, model_type="llama", auto_map={"AutoModel": "odd.Odd"})
    assert len(notes()) == 1 and "custom code" in notes()[0] and "odd.Odd" in notes()[0]
    settings(tmp_path, auto_map=None)
    stored = load_file(tmp_path / "model.safetensors")
    save_file({name: t.double() for name, t in stored.items()}, tmp_path / "model.safetensors")
    assert notes() == [f"{len(stored)} float64 tensors were rounded to float32"]


def test_layers_of_an_export_are_counted_by_what_is_stored(tmp_path):
    cfg = TINY["middle_cycle"]
    path = write(tmp_path, cfg, exported_mor(cfg), mor_entries)
    layers = cfg.num_layers + cfg.num_recursions
    settings(tmp_path, num_hidden_layers=layers)
    told = rf"num_hidden_layers \(sharing=middle_cycle, .*={layers}: makes"
    with pytest.raises(ValueError, match=told):
        import_hf(path)
    settings(tmp_path, num_recursions=10**9)
    with pytest.raises(ValueError, match="num_recursions=1000000000: is more than any model"):
        import_hf(path)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["adapter_config.json", "adapter_model.safetensors"], "merge_and_unload"),
        (["adapter_config.json", "adapter_model.bin", "tokenizer.json"], "merge_and_unload"),
        (["model.Q4_0.gguf", "README.md"], "--from=gguf"),
        (["consolidated.00.pth", "params.json"], "Meta's own format"),
        (["consolidated.safetensors", "params.json"], "Meta's own format"),
        ([".metadata", "__0_0.distcp"], "merge-weights"),
        (["pytorch_model_fsdp_0/__0_0.distcp"], "merge-weights"),
        (["zero_pp_rank_0_mp_rank_00_model_states.pt"], "zero_to_fp32.py"),
        (["latest", "global_step7/zero_pp_rank_0_mp_rank_00_optim_states.pt"], "zero_to_fp32.py"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_another_program_has_to_turn_first_names_it(files, words, tmp_path):
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("{}")
    # With a path to a file as with its directory.
    named = (
        [tmp_path] if "/" in files[-1] else [tmp_path, tmp_path / files[-1], tmp_path / files[0]]
    )
    said = []
    for path in named:
        with pytest.raises(ValueError) as error:
            import_hf(str(path))
        said.append(words in str(error.value))
        assert "\n" not in str(error.value)
    assert said[0] and any(said[1:] or said)


def test_an_adapter_beside_the_model_is_not_passed_over(tmp_path):
    path = write(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"model\.safetensors.*beside adapter_config\.json.*--sour"
    ):
        import_hf(path)
    assert_equal(import_hf(f"{path}/model.safetensors").params, random_params(PLAIN))


def test_directories_without_a_model_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json=None: is missing"):
        import_hf(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json=None: is damaged"):
        import_hf(str(tmp_path))
    for text in ("[" * 10**5, '{"a": ' + "9" * 5000 + "}", "2", "[]", "\ufeff{}"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(
            ValueError, match=r"config\.json=.*(is damaged|must be a JSON object)"
        ) as error:
            import_hf(str(tmp_path))
        assert "\n" not in str(error.value) and len(str(error.value)) < 500
    with pytest.raises(ValueError, match="neither an existing path nor a hub repository"):
        import_hf(str(tmp_path / "nowhere"))
