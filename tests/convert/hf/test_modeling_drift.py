"""Releases of transformers differ in names: the export's model takes both, and loses nothing.

A cache, a mask or a position that a call gives and the model does not use would change the text
without a word, so each is used or refused.
"""

import dataclasses

import pytest
import torch
from support.hf_model import modeling, torch_model
from support.hf_prompts import PROMPT, prompts
from support.tiny import TINY
from transformers import DynamicCache, StaticCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

NAMES = ("past_key_values", "cache")
CFG = {name: dataclasses.replace(TINY[name], max_seq_len=64) for name in ("plain", "expert")}


@pytest.fixture(scope="module")
def model():
    return torch_model(CFG["expert"])


@pytest.fixture(scope="module")
def whole(model):
    """Logits of whole rows, padded on the left, at once."""
    ids, mask = prompts(64)
    with torch.no_grad():
        return model(ids, attention_mask=mask, use_cache=False).logits


def begun(model, tokens=12, **options):
    """A cache that has seen the first tokens of the prompts, and these prompts."""
    ids, mask = prompts(64)
    with torch.no_grad():
        out = model(ids[:, :tokens], attention_mask=mask[:, :tokens], use_cache=True, **options)
    return getattr(out, modeling().CACHE), ids[:, tokens:], mask


@pytest.mark.parametrize("name", NAMES)
def test_a_cache_is_taken_under_either_name(name, model, whole):
    for part in (model, model.model):
        cache, rest, mask = begun(part)
        out = part(rest, attention_mask=mask, **{name: cache})
        assert getattr(out, modeling().CACHE) is cache and cache.get_seq_length() == PROMPT
        if part is model:
            real = mask[:, 12:].bool()
            torch.testing.assert_close(out.logits[real], whole[:, 12:][real], atol=1e-5, rtol=1e-5)


def test_one_cache_under_both_names_is_one_and_two_are_refused(model):
    cache, rest, mask = begun(model)
    other, _, _ = begun(model)
    with pytest.raises(ValueError, match="past_key_values and cache: two names of one thing"):
        model(rest, attention_mask=mask, cache=cache, past_key_values=other)
    model(rest, attention_mask=mask, cache=cache, past_key_values=cache)
    assert cache.get_seq_length() == PROMPT


@pytest.mark.parametrize("name", ["cache_params", "past_key_value", "layer_past", "kv"])
def test_a_cache_under_an_unknown_name_is_refused(name, model):
    cache, rest, mask = begun(model)
    for part in (model, model.model):
        with pytest.raises(ValueError, match=rf"{name}=MoRCache: .*would be lost.*'cache'"):
            part(rest, attention_mask=mask, **{name: cache})
    assert cache.get_seq_length() == 12


def test_outputs_have_the_fields_of_this_release_and_ours():
    file = modeling()
    for ours, theirs in (
        (file.MoRModelOutput, BaseModelOutputWithPast),
        (file.MoROutput, CausalLMOutputWithPast),
    ):
        assert issubclass(ours, theirs)
        names = [field.name for field in dataclasses.fields(ours)]
        assert names == [f.name for f in dataclasses.fields(theirs)] + ["depths", "router_loss"]
        assert names.count(file.CACHE) == 1 and file.CACHE in NAMES
        # Trainer would try to put it into an array.
        assert file.CACHE in file.MoRConfig.keys_to_ignore_at_inference


@pytest.mark.parametrize("fields", [[], ["memory"], ["cache", "past_key_values"]])
def test_a_release_with_another_field_is_told_and_refused(fields):
    output = dataclasses.make_dataclass("Output", [(name, int, 0) for name in fields])
    with pytest.raises(ImportError, match=r"transformers \d.*Output has the fields.*refresh"):
        modeling().cache_field(output)


def test_outputs_as_tuples_have_the_cache_in_its_place(model):
    ids, _ = prompts(64)
    out = model(ids, labels=ids, return_dict=False, use_cache=True, output_hidden_states=True)
    kinds = [type(part).__name__ for part in out]
    assert kinds == ["Tensor", "Tensor", "MoRCache", "tuple", "Tensor"]
    assert out[4].shape == ids.shape and not out[4].is_floating_point()


def test_the_cache_is_neither_linear_nor_sliding():
    """transformers asks `all(cache.is_linear)`, which no layers at all would answer with yes."""
    cache = modeling().MoRCache()
    for told in (cache.is_linear, cache.is_sliding, cache.is_dummy):
        assert told and not any(told)
    assert cache.is_croppable and not cache.is_compileable


def test_no_token_of_a_cache_is_lost(model):
    cache, rest, mask = begun(model)
    with pytest.raises(ValueError, match=r"holds 12 tokens.*lost \(use_cache=False\)"):
        model(rest, attention_mask=mask, cache=cache, use_cache=False)
    with pytest.raises(ValueError, match=r"holds 12 tokens.*lost \(use_cache=False\)"):
        model(rest, attention_mask=mask, cache=cache, use_cache=False, routing="topk")
    with pytest.raises(ValueError, match="cache=list: must be a MoRCache"):
        model(rest, attention_mask=mask, cache=[])
    trained = torch_model(CFG["expert"]).train()
    trained.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient checkpointing keeps no cache"):
        trained(rest, attention_mask=mask, cache=cache)


def test_a_model_in_training_mode_generates_the_same_text(model):
    ids, mask = prompts(64)
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    want = model.generate(ids, **options)
    trained = torch_model(CFG["expert"]).train()
    assert torch.equal(trained.generate(ids, **options), want)
    trained.gradient_checkpointing_enable()
    assert torch.equal(trained.generate(ids, **options), want)


def test_a_mask_may_not_take_back_what_it_said(model, whole):
    cache, rest, mask = begun(model)
    with pytest.raises(ValueError, match="attention_mask: has other padding"):
        model(rest, attention_mask=torch.ones_like(mask), cache=cache)
    # Of the new tokens alone it says nothing about the others.
    out = model(rest, attention_mask=mask[:, 12:], cache=cache)
    real = mask[:, 12:].bool()
    torch.testing.assert_close(out.logits[real], whole[:, 12:][real], atol=1e-5, rtol=1e-5)
    ids = prompts(64)[0]
    unpadded = model(ids[:, :12], use_cache=True)
    with pytest.raises(ValueError, match="attention_mask: has other padding"):
        model(rest, attention_mask=mask, cache=getattr(unpadded, modeling().CACHE))


def test_positions_are_those_of_one_text(model, whole):
    ids, mask = prompts(64)
    for shape in ((3, 2 * PROMPT), (PROMPT,), (3, 3, PROMPT)):
        with pytest.raises(ValueError, match="position_ids has shape"):
            model(ids, position_ids=torch.zeros(shape, dtype=torch.long))
    packed = torch.arange(PROMPT).repeat(3, 1) % 8
    with pytest.raises(ValueError, match="position_ids: start again within a row"):
        model(ids, position_ids=packed)
    # Padding has any position; releases differ in it.
    for filler in (0, 1):
        given = (mask.cumsum(1) - 1).masked_fill(mask == 0, filler)
        out = model(ids, attention_mask=mask, position_ids=given)
        real = mask.bool()
        torch.testing.assert_close(out.logits[real], whole[real], atol=1e-5, rtol=1e-5)


def test_cache_position_says_what_the_cache_knows_or_is_refused(model):
    cache, rest, mask = begun(model)
    for places in (torch.arange(8), torch.arange(13, 21), torch.arange(12, 19), torch.tensor(12)):
        with pytest.raises(ValueError, match=r"cache_position=.*must be 12, \.\.\., 19"):
            model(rest, attention_mask=mask, cache=cache, cache_position=places)
    model(rest, attention_mask=mask, cache=cache, cache_position=torch.arange(12, 20))


def test_keywords_that_would_have_no_effect_are_refused(model):
    ids, mask = prompts(64)
    with torch.no_grad():
        want = model(ids, attention_mask=mask).logits
        neutral = {"token_type_ids": torch.zeros_like(ids), "is_causal": True, "head_mask": None}
        neutral |= {"output_attentions": False, "output_router_logits": False}
        assert torch.equal(model(ids, attention_mask=mask, **neutral).logits, want)
    for name, value in (
        ("token_type_ids", torch.ones_like(ids)),
        ("is_causal", False),
        ("cu_seq_lens_q", torch.tensor([0, 8, 20], dtype=torch.int32)),
        ("seq_idx", torch.zeros_like(ids)),
        ("shift_labels", ids),
        ("num_logits_to_keep", 1),
        ("attention_masks", mask),
        ("output_router_logits", True),
    ):
        with pytest.raises(ValueError, match=rf"{name}=.*know no such keyword.*Leave it out"):
            model(ids, labels=ids, **{name: value})


def test_a_cache_of_fixed_size_is_refused_not_misread(model):
    ids, mask = prompts(64)
    with pytest.raises(ValueError):
        model.generate(ids, attention_mask=mask, max_new_tokens=2, cache_implementation="static")
    static = StaticCache(config=model.config, max_cache_len=32)
    with torch.no_grad():
        out = model(ids, attention_mask=mask, cache=static)
    # Empty caches of others are what `generate` hands over at first.
    assert isinstance(getattr(out, modeling().CACHE), modeling().MoRCache)


def test_a_cache_that_stays_empty_is_refused_the_second_time(model, whole):
    """Models of transformers fill the cache that they are given; ours return another."""
    ids, mask = prompts(64)
    for cache in (DynamicCache(), modeling().MoRCache()):
        model(ids[:, :12], attention_mask=mask[:, :12], cache=cache)
        if isinstance(cache, DynamicCache):
            with pytest.raises(ValueError, match=r"this DynamicCache was given before.*MoRCache"):
                model(ids[:, 12:], attention_mask=mask, cache=cache)
            continue
        out = model(ids[:, 12:], attention_mask=mask, cache=cache)
        real = mask[:, 12:].bool()
        torch.testing.assert_close(out.logits[real], whole[:, 12:][real], atol=1e-5, rtol=1e-5)


def test_crop_means_what_it_means_to_this_release(model):
    keeps = modeling().CROP_KEEPS
    for left, number in ((12 * (not keeps), 0), (9, -3), (5, 5), (12, 30)):
        cache, _, _ = begun(model)
        cache.crop(number)
        assert cache.get_seq_length() == left


def test_assisted_generation_starts_from_a_single_token(model):
    """Its first guesses are taken back to the very first token."""
    ids = prompts(64)[0][:1, -1:]
    options = {"max_new_tokens": 8, "do_sample": False}
    want = model.generate(ids, **options)
    guess = torch_model(CFG["plain"])
    assert torch.equal(model.generate(ids, assistant_model=guess, **options), want)
