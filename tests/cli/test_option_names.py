"""Settings in errors under the names that were typed."""

import argparse

import pytest

from mor_jax.cli.option_names import as_typed, options, words

GIVEN = argparse.Namespace(
    max_tokens=64, batch_size=4, source=["a", "b"], shares="1,0.5", sample=None, workdir="w"
)
PATHS = {
    "sample.max_tokens": "max_tokens",
    "eval.batch_size": "batch_size",
    "data.sources": "source",
    "sample.temperature": "temperature",
}
WORDS = ["--model_args", "max_length=9", "--gen_kwargs=a=1", "--model=hf", "--config.optim.lr=-1"]
TYPED = options(GIVEN, PATHS) | words(WORDS, ("model_args", "gen_kwargs"))


@pytest.mark.parametrize(
    ("told", "wanted"),
    [
        ("sample.max_tokens=-1: must be", "--max_tokens=-1: must be"),
        ("eval.batch_size=4: a=b", "--batch_size=4: a=b"),
        ("data.sources[1]='b': matches", "--source='b': matches"),
        ("shares[0]=0.9: must be 1", "--shares[0]=0.9: must be 1"),
        ("workdir='w': is not", "--workdir='w': is not"),
        ("model_args.max_length=9: must", "--model_args max_length=9: must"),
        ("model='hf': the model", "--model='hf': the model"),
        ("optim.lr=-1: must", "--config.optim.lr=-1: must"),
        ("config.optim.lr=-1: is", "--config.optim.lr=-1: is"),
        # Not given, or of the configuration alone.
        ("sample.temperature=-1: must", "sample.temperature=-1: must"),
        ("sample='x': must", "sample='x': must"),
        ("model.kv_mode='x': must be one of", "model.kv_mode='x': must be one of"),
        # Of another form.
        ("/a/b.json: shares=1: needs", "/a/b.json: shares=1: needs"),
        ("it broke", "it broke"),
        ("", ""),
    ],
)
def test_what_was_typed_is_named_so(told, wanted):
    assert as_typed(ValueError(told), TYPED) == as_typed(told, TYPED) == wanted
