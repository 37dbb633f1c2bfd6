"""The export's PyTorch model computes what ours does, and is a good citizen of transformers."""

import ast
import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from support import oracle
from support.hf_model import MODELING, hf_config, params_of, torch_model, torch_state
from support.hf_prompts import PROMPT, forced, prompts
from support.tiny import EXPERT, TINY, TOKEN, train_config
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from mor_jax.config import RopeScaling, RouterConfig
from mor_jax.convert.export_config import llama_config
from mor_jax.models.params import forward, unembed
from mor_jax.models.routing.router import Route, capacity_tokens
from mor_jax.training.losses import batch_counts
from mor_jax.training.train_step import loss_fn
from mor_jax.types import IGNORE, Batch

NEW = 64
STRETCHED = RopeScaling(rope_type="llama3", factor=8.0, original_max_position_embeddings=32)
# Settings that no variant of TINY has, several at a time.
MORE = {
    "plain_linear": dataclasses.replace(
        TINY["plain"], rope_scaling=RopeScaling(rope_type="linear", factor=4.0)
    ),
    "expert_tight": dataclasses.replace(
        TINY["expert_mlp"],
        kv_mode="shared",
        share_norms=False,
        rope_scaling=STRETCHED,
        router=RouterConfig(
            kind="expert",
            activation="none",
            temperature=2.0,
            capacity=(0.75, 0.5),
            causal_routing="none",
        ),
    ),
    "expert_narrow": dataclasses.replace(
        TINY["expert"],
        router=RouterConfig(kind="expert", capacity=(0.75, 0.5, 0.25), capacity_multiple=4),
    ),
    "token_tight": dataclasses.replace(
        TINY["token_mlp"],
        kv_mode="shared_update",
        share_norms=False,
        router=dataclasses.replace(
            TINY["token_mlp"].router,
            capacity_factor=0.8,
            capacity_multiple=3,
            gating="additive",
            temperature=0.5,
        ),
    ),
}
# Room for the prompts and what is generated after them.
ALL = {n: dataclasses.replace(c, max_seq_len=2 * NEW) for n, c in (TINY | MORE).items()}
ROUTED = (*EXPERT, *TOKEN, "expert_tight", "expert_narrow", "token_tight")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.cache
def generated(name):
    """Unequal prompts continued by `NEW` tokens: the output of `generate`, and the mask."""
    ids, mask = prompts(ALL[name].vocab_size)
    # Drawn, because what such models think likeliest is the same token over and over.
    torch.manual_seed(0)
    out = torch_model(ALL[name]).generate(
        ids,
        attention_mask=mask,
        max_new_tokens=NEW,
        do_sample=True,
        return_dict_in_generate=True,
        output_logits=True,
    )
    mask = torch.cat([mask, torch.ones(len(mask), NEW, dtype=mask.dtype)], dim=1)
    return out, mask


def padded(tokens, mask, targets=None):
    """A batch of ours: padding, and positions that do not count it."""
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    targets = np.zeros_like(tokens) if targets is None else targets
    return Batch(*(jnp.asarray(a, jnp.int32) for a in (tokens, targets, mask, positions)))


def wanted(name, rows, mode):
    """Our logits of whole rows, and the depths.

    From the oracle where it can, which tests/models hold our model to: that saves a compilation
    each.
    """
    cfg, params = ALL[name], params_of(ALL[name])
    if cfg.rope_scaling.rope_type == "none":
        out = oracle.run(cfg, params, rows, mode)
        table = params["embed" if cfg.tie_embeddings else "head"]["weight"]
        return out.hidden @ np.asarray(table, np.float64).T, out.depth

    @jax.jit
    def run(params, batch):
        out = forward(cfg, params, batch, Route(mode=mode))
        return unembed(cfg, params, out.hidden), out.routing and out.routing.depth

    return jax.tree.map(np.asarray, run(params, rows))


def error(got, want):
    """Largest difference relative to the largest magnitude."""
    want = np.asarray(want)
    return np.abs(np.asarray(got.detach().float()) - want).max() / np.abs(want).max()


@pytest.mark.parametrize("name", ALL)
def test_causal_routing_and_cached_decoding_equal_ours(name):
    out, mask = generated(name)
    want, depths = wanted(name, padded(out.sequences.numpy(), mask.numpy()), "causal")
    decoded = torch.stack(out.logits, dim=1)
    assert error(decoded, want[:, PROMPT - 1 : -1]) < 1e-5
    model, real = torch_model(ALL[name]), mask.bool()
    whole = model(out.sequences, attention_mask=mask)
    assert error(whole.logits[real], want[real.numpy()]) < 1e-5
    if name not in ROUTED:
        assert whole.depths is None
        return
    assert np.array_equal(whole.depths[real], depths[real.numpy()])
    assert len(whole.depths[real].unique()) > 1 and not whole.depths[~real].any()


@pytest.mark.parametrize("name", ROUTED)
def test_topk_routing_equals_ours(name):
    out, mask = generated(name)
    want, depths = wanted(name, padded(out.sequences.numpy(), mask.numpy()), "topk")
    got, real = torch_model(ALL[name])(out.sequences, attention_mask=mask, routing="topk"), mask > 0
    assert error(got.logits[real], want[real.numpy()]) < 1e-5
    assert np.array_equal(got.depths[real], depths[real.numpy()])


def test_a_cache_keeps_only_the_tokens_that_entered_a_recursion():
    out, mask = generated("expert")
    model, cache = torch_model(ALL["expert"]), out.past_key_values
    seen = slice(0, cache.get_seq_length())
    depths = model(out.sequences[:, seen], attention_mask=mask[:, seen]).depths
    for r in (1, 2):
        entered = (depths > r).sum(1)
        keys, values = cache.entries[f"{r}.0"]
        assert keys.shape[2] == values.shape[2] == entered.max() < seen.stop
        assert torch.equal(cache.entered[r].sum(1), entered)
    shared = generated("expert_kv")[0].past_key_values.entries
    assert set(shared) == {"first.0", "0.0", "0.1", "last"}


CACHES = ["plain", "middle_cycle_kv", "expert_narrow", "expert_kv_update", "token"]


@pytest.mark.parametrize("name", CACHES)
def test_tokens_in_chunks_and_rows_padded_on_the_right(name):
    model, (ids, _) = torch_model(ALL[name]), prompts(64)
    whole, cache, parts = model(ids, use_cache=False), None, []
    assert whole.past_key_values is None
    for start, stop in ((0, 7), (7, 8), (8, 15), (12, PROMPT)):
        if cache is not None:
            # What is taken back leaves no trace.
            cache.crop(start - cache.get_seq_length())
        out = model(ids[:, start:stop], past_key_values=cache, use_cache=True)
        cache, parts = out.past_key_values, [torch.cat([*parts, out.logits], 1)[:, :12]]
    torch.testing.assert_close(out.logits, whole.logits[:, 12:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(parts[0], whole.logits[:, :12], atol=1e-5, rtol=1e-5)
    mask = torch.ones_like(ids)
    mask[0, 11:] = 0
    short = model(ids, attention_mask=mask).logits[0, :11]
    torch.testing.assert_close(short, whole.logits[0, :11], atol=1e-5, rtol=1e-5)
    last = model(ids, logits_to_keep=2).logits
    torch.testing.assert_close(last, whole.logits[:, -2:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["plain", "expert", "expert_kv_update", "token"])
def test_ways_to_generate_that_move_the_cache_give_the_same_text(name):
    model, (ids, mask) = torch_model(ALL[name]), prompts(64)
    for options in ({"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}):
        options |= {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
        moved = model.generate(ids, **options)
        assert torch.equal(moved, model.generate(ids, use_cache=False, **options))
    options = {"max_new_tokens": 8, "do_sample": False}
    greedy = model.generate(ids[:1], **options)
    # Guesses of another model are mostly wrong: what they left in the cache has to go again.
    guess = torch_model(ALL["plain_untied"])
    assert torch.equal(model.generate(ids[:1], assistant_model=guess, **options), greedy)
    embedded = model.generate(inputs_embeds=model.get_input_embeddings()(ids[:1]), **options)
    assert torch.equal(embedded, greedy[:, PROMPT:])


def test_text_goes_on_from_a_returned_cache():
    model, (ids, mask), (out, full_mask) = (
        torch_model(ALL["expert"]),
        prompts(64),
        generated("expert"),
    )
    options = {"return_dict_in_generate": True, "output_logits": True}
    options |= {"max_new_tokens": 6, "prefix_allowed_tokens_fn": forced(out.sequences)}
    half = model.generate(ids, attention_mask=mask, **options)
    cache, mask = half.past_key_values, full_mask[:, : PROMPT + 6]
    rest = model.generate(half.sequences, attention_mask=mask, past_key_values=cache, **options)
    assert torch.equal(rest.sequences, out.sequences[:, : PROMPT + 12])
    for got, want in zip(rest.logits, out.logits[6:], strict=False):
        torch.testing.assert_close(got, want)


def test_what_cannot_be_done_is_refused():
    model, (ids, mask) = torch_model(ALL["expert"]), prompts(64)
    with pytest.raises(ValueError, match=r"topk.*Generate with routing='causal'"):
        model.generate(ids, max_new_tokens=2, routing="topk")
    # Without a cache every step scores the whole row anew.
    options = {"max_new_tokens": 2, "use_cache": False, "attention_mask": mask}
    assert model.generate(ids, routing="topk", **options).shape[1] == PROMPT + 2
    with pytest.raises(ValueError, match=r"attention_mask has shape \(3, 5\)"):
        model(ids, attention_mask=mask[:, :5])
    foreign = DynamicCache()
    foreign.update(torch.zeros(3, 2, 4, 8), torch.zeros(3, 2, 4, 8), 0)
    with pytest.raises(ValueError, match="DynamicCache"):
        model(ids, past_key_values=foreign)
    with pytest.raises(ValueError, match="routing='greedy': must be one of"):
        model(ids, routing="greedy")
    with pytest.raises(ValueError, match="output_attentions=True"):
        model(ids, output_attentions=True)
    for change, told in (
        ({"num_hidden_layers": 9}, r"num_hidden_layers=9: .*2 \+ a multiple of 3"),
        ({"sharing": "none", "num_recursions": 2}, "num_hidden_layers=8"),
        ({"sharing": "loop"}, "sharing='loop'"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "'yarn'"),
        ({"thresholds": [0.0]}, "one for each of 3"),
    ):
        with pytest.raises(ValueError, match=told):
            hf_config(ALL["expert"], **change)


@pytest.mark.parametrize("kind", ["none", "linear", "llama3"])
def test_a_plain_model_equals_the_llama_of_transformers(kind):
    scaling = dataclasses.replace(STRETCHED, rope_type=kind)
    cfg = dataclasses.replace(ALL["plain_untied"], rope_scaling=scaling)
    (ids, mask), model = prompts(64), torch_model(cfg)
    llama = LlamaForCausalLM(LlamaConfig(**llama_config(cfg))).eval()
    llama.load_state_dict(model.state_dict())
    options = {"attention_mask": mask, "output_hidden_states": True}
    got, want = model(ids, **options), llama(ids, **options)
    assert len(got.hidden_states) == len(want.hidden_states)
    for a, b in zip(got.hidden_states, want.hidden_states, strict=True):
        torch.testing.assert_close(a[mask > 0], b[mask > 0], atol=1e-5, rtol=1e-5)
    assert error(got.logits[mask > 0], want.logits[mask > 0].detach()) < 1e-5


def test_thresholds_move_the_depth():
    (ids, _), depths = prompts(64), []
    for cut in (-100.0, 0.0, 100.0):
        model = torch_model(ALL["expert"], thresholds=[0.0, cut, cut])
        depths.append(model(ids).depths.float().mean())
    assert depths[0] == 3 and depths[0] > depths[1] > depths[2] == 1


@pytest.mark.parametrize("name", ["expert_aux_router", "token_tight"])
def test_training_loss_and_gradients_equal_ours(name):
    cfg = ALL[name]
    router = dataclasses.replace(
        cfg.router, z_loss_coeff=0.01, aux_loss_coeff=0.5, balance_loss_coeff=0.5
    )
    # As small as it gets: most of the time is the compilation.
    small = {"sharing": "cycle", "num_layers": 2, "num_recursions": 2, "kv_mode": "shared_update"}
    cfg = dataclasses.replace(cfg, router=router, **small)
    ids, mask = prompts(64)
    # No target for padding, and none for it to predict.
    targets = np.full(ids.shape, IGNORE)
    targets[:, :-1] = np.where((mask * mask.roll(-1, 1))[:, :-1] > 0, ids[:, 1:], IGNORE)
    rows = padded(ids.numpy(), mask.numpy(), targets)
    counts = batch_counts(cfg, rows, capacity_tokens(cfg, PROMPT))
    run = dataclasses.replace(train_config(), model=cfg)

    @jax.jit
    def step(params):
        return jax.value_and_grad(loss_fn, has_aux=True)(params, run, rows, Route(), counts)

    (want, _), grads = step(params_of(cfg))
    model = torch_model(cfg).train()
    loss = model(ids, attention_mask=mask, labels=ids, routing="topk").loss
    loss.backward()
    assert abs(loss.item() - float(want)) < 1e-5 * float(want)
    expected = torch_state(cfg, grads)
    largest = max(float(g.abs().max()) for g in expected.values())
    for key, parameter in model.named_parameters():
        got = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert (got - expected[key]).abs().max() < 1e-5 * largest, key


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["middle_cycle_kv", "expert_kv_update", "token"])
def test_gradient_checkpointing_changes_nothing(name, reentrant):
    (ids, mask), seen = prompts(64), []
    for checkpointing in (False, True):
        model = torch_model(ALL[name]).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        out = model(ids, attention_mask=mask, labels=ids, use_cache=True)
        assert (out.past_key_values is None) == checkpointing
        out.loss.backward()
        seen.append([out.loss, *(p.grad for p in model.parameters() if p.grad is not None)])
    for got, want in zip(*seen, strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["plain", "middle_cycle_kv"])
def test_models_without_a_router_compile_in_one_piece(name):
    model, (ids, mask) = torch_model(ALL[name]), prompts(64)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        for options in ({"use_cache": False}, {"attention_mask": mask}):
            want = model(ids, **options).logits
            torch.testing.assert_close(compiled(ids, **options).logits, want)


@pytest.mark.parametrize("name", ["plain_untied", "middle_cycle_norms", "token_loss_free"])
def test_saved_models_load_anywhere_and_save_again(name, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "code")
    )
    model, (ids, _) = torch_model(ALL[name]), prompts(64)
    model.save_pretrained(tmp_path / "first")
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "first", trust_remote_code=True, output_loading_info=True
    )
    routed = {"trust_remote_code": True, "routing": "topk"}
    assert AutoConfig.from_pretrained(tmp_path / "first", **routed).routing == "topk"
    assert not any(info.values())
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    stored = {key for key in torch_state(ALL[name], params_of(ALL[name]))}
    assert set(loaded.state_dict()) - {"lm_head.weight"} == stored - {"lm_head.weight"}
    tied = loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert tied == ALL[name].tie_embeddings
    loaded.save_pretrained(tmp_path / "again")
    for file in ("config.json", "model.safetensors", "modeling_mor.py"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "first" / file).read_bytes()


def test_sixteen_bits_route_in_float32(tmp_path):
    model, (ids, _) = torch_model(ALL["expert_mlp"]), prompts(64)
    want = model(ids).logits
    half = torch_model(ALL["expert_mlp"]).to(torch.bfloat16)
    out = half(ids)
    assert out.logits.dtype == torch.bfloat16 and error(out.logits, want.detach()) < 0.05
    x = half.model.embed_tokens(ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert half.model.routers[0](x).dtype == torch.float32


def training(folder, model, **options):
    """Losses of a few steps of transformers' Trainer on rows that are easy to learn."""
    row = torch.arange(24) % 7
    rows = [{"input_ids": row, "labels": row}] * 16
    fixed = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    arguments = TrainingArguments(
        str(folder), max_steps=4, logging_steps=1, learning_rate=1e-2, **fixed, **options
    )
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:4])
    trainer.train()
    assert trainer.predict(rows[:4]).predictions.shape == (4, 24, 64)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    ("name", "changes", "options"),
    [
        ("plain", {}, {"gradient_accumulation_steps": 2}),
        ("expert", {}, {"bf16": True}),
        ("expert_aux_router", {"routing": "topk"}, {"gradient_checkpointing": True}),
    ],
)
def test_trainer_trains(name, changes, options, tmp_path):
    losses = training(tmp_path, torch_model(ALL[name], **changes), **options)
    assert losses[-1] < losses[0] - 1


def test_lora_trains_saves_and_merges(tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(torch_model(ALL["expert"]), lora)
    losses = training(tmp_path, model, gradient_checkpointing=True)
    assert losses[-1] < losses[0] - 0.1
    model.save_pretrained(tmp_path / "lora")
    again = PeftModel.from_pretrained(torch_model(ALL["expert"]), tmp_path / "lora").eval()
    ids, mask = prompts(64)
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    want, text = again(ids).logits, again.generate(ids, **options)
    assert error(torch_model(ALL["expert"])(ids).logits, want.detach()) > 0.01
    merged = again.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, want, atol=1e-5, rtol=1e-5)
    assert torch.equal(merged.generate(ids, **options), text)


def test_the_file_needs_torch_and_transformers_and_nothing_private():
    tree, found = ast.parse(MODELING.read_text()), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
            top = module.split(".")[0]
            found.add(top)
            assert top in {"torch", "transformers"} or top in sys.stdlib_module_names, module
            assert not any(name.name.startswith("_") for name in node.names)
    assert {"torch", "transformers"} <= found
