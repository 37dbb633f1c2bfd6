"""`mor analyze` on small runs: what it finds is what the model does, and what it refuses."""

import dataclasses
import importlib
import itertools
import json

import numpy as np
import pytest
from matplotlib import image
from support.seeded import random_params
from support.tiny import TINY, train_config

from mor_jax.analysis import recursions, statistics
from mor_jax.analysis.output_directory import FILE, AnalysisOutput
from mor_jax.analysis.routing_record import observe, routed_model
from mor_jax.analysis.text_input import TextRequest, read
from mor_jax.checkpoint import pretrained
from mor_jax.checkpoint.lazy_arrays import flatten, from_arrays
from mor_jax.checkpoint.load_weights import load_run
from mor_jax.checkpoint.run_dir import claim_workdir
from mor_jax.config import DataConfig, EvalConfig
from mor_jax.models.routing.router import capacity_tokens
from mor_jax.training.evaluator import token_depths

ONE_BLOCK = {"vocab_size": 256, "num_layers": 3}
MODELS = {
    "expert": dataclasses.replace(TINY["expert_cycle"], **ONE_BLOCK),
    "token": dataclasses.replace(TINY["token_cycle"], **ONE_BLOCK),
    "recursive": dataclasses.replace(TINY["cycle"], vocab_size=256),
    "plain": dataclasses.replace(TINY["plain"], vocab_size=256),
}
command = importlib.import_module("mor_jax.cli.analyze")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The directory of a run of each model, with weights and no checkpoint."""
    root = tmp_path_factory.mktemp("runs")
    for i in range(20):
        (root / f"{i}.txt").write_text(f"Text {i}: " + " ".join(str(i * k) for k in range(20)))
    for name, model in MODELS.items():
        cfg = train_config(
            model=model,
            data=DataConfig(sources=(f"text:{root}/*.txt",), validation_fraction=0.2),
            eval=EvalConfig(
                interval=None, batches=2, batch_size=4, prompt="ab", completion_tokens=0
            ),
        )
        (root / name).mkdir()
        claim_workdir(root / name, cfg)
        params = random_params(model, 1)
        pretrained.write(
            root / name, model, from_arrays(dict(flatten(params))), {"from": "a/model"}
        )
    return root


@pytest.fixture(scope="module")
def observed(runs):
    model = routed_model(load_run(runs / "expert"))
    return observe(model, read(model.cfg, model.tokenizer, TextRequest(tokens=128), lambda: b""))


def run(capsys, *given):
    code = command.main([str(each) for each in given])
    told = capsys.readouterr()
    return code, told.out, told.err


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_is_observed_is_what_the_model_does(observed):
    model, cfg = observed.model, observed.model.model
    row = np.asarray(observed.rows.batches[0].tokens[0])
    wanted = token_depths(cfg, model.params, row)
    np.testing.assert_array_equal(observed.passes["causal"].depth[:16], wanted)
    topk = observed.passes["topk"]
    for r, count in enumerate(capacity_tokens(cfg, 16)):
        assert ((topk.depth > r).reshape(-1, 16).sum(axis=1) == count).all()
    for one in observed.passes.values():
        for r, logits in enumerate(one.logits):
            np.testing.assert_array_equal(np.isfinite(logits), one.depth >= r)
        # The loss of a token is what the one before it paid; rows of a source are no neighbours.
        assert np.isnan(one.loss[::16]).all() and np.isfinite(one.ahead).all()
        np.testing.assert_array_equal(one.loss[1:16], one.ahead[:15])
    causal = observed.passes["causal"]
    for r in (1, 2):
        there = np.isfinite(causal.logits[r])
        np.testing.assert_array_equal(causal.logits[r][there] >= 0, causal.depth[there] > r)


def test_groups_hold_every_token_once(observed):
    found = statistics.measure(observed, 3, False)
    overall = {record["routing"]: record for record in found.of("routing")}
    for routing, one in observed.passes.items():
        assert overall[routing]["depth"] == pytest.approx(one.depth.mean(), rel=1e-5)
        assert overall[routing]["ahead"] == pytest.approx(one.ahead.mean(), rel=1e-5)
        for statistic in ("position", "token", "frequency", "loss_ahead"):
            records = found.of(statistic, routing)
            assert sum(record["tokens"] for record in records) == 128, statistic
            depth = sum(record["tokens"] * record["depth"] for record in records) / 128
            assert depth == pytest.approx(one.depth.mean(), rel=1e-4), statistic
    space = next(r for r in found.of("token", "causal") if r["group"] == "' '")
    here = observed.token == ord(" ")
    assert space["tokens"] == here.sum() and space["token"] == ord(" ")
    assert space["depth"] == pytest.approx(observed.first.depth[here].mean(), rel=1e-4)
    tenths = found.of("loss_ahead", "causal")
    assert len(tenths) == 10
    assert all(a["ahead"] <= b["ahead"] for a, b in itertools.pairwise(tenths))


def test_routers_are_judged_against_top_k(observed):
    found, topk = statistics.measure(observed, 3, False), observed.passes["topk"]
    for record in found.of("scores"):
        r = record["recursion"]
        assert record["candidates"] == (topk.depth >= r).sum()
        assert record["chosen"] == (topk.depth > r).sum() == sum(record["bins_chosen"])
    same = {r["recursion"]: r for r in found.of("agreement") if r["states"] == "topk"}
    assert same[0]["accuracy"] == 1 and same[0]["takes_all"]
    there = np.isfinite(topk.logits[1])
    right = (topk.logits[1][there] >= 0) == (topk.depth[there] > 1)
    assert same[1]["accuracy"] == pytest.approx(right.mean(), rel=1e-5)
    own = {r["recursion"]: r for r in found.of("agreement") if r["states"] == "own"}
    both = [observed.passes[name].depth > 2 for name in ("causal", "topk")]
    wanted = (both[0] & both[1]).sum() / (both[0] | both[1]).sum()
    assert own[2]["jaccard"] == pytest.approx(wanted, rel=1e-5)


def test_savings_count_what_is_not_kept(observed):
    saved = {
        record["routing"]: record for record in statistics.measure(observed, 3, False).of("savings")
    }
    # One layer, three recursions, keys of its own for each: an entry for every recursion taken.
    depth = observed.passes["topk"].depth.mean()
    assert saved["topk"]["dense_entries"] == 3
    assert saved["topk"]["entries"] == pytest.approx(depth, rel=1e-5)
    assert saved["topk"]["saved"] == pytest.approx(1 - depth / 3, rel=1e-4)
    shared = dataclasses.replace(observed.model.model, kv_mode="shared")
    cfg = dataclasses.replace(observed.model.cfg, model=shared)
    other = dataclasses.replace(observed, model=dataclasses.replace(observed.model, cfg=cfg))
    saved = statistics.saving_records(other)
    assert [record["entries"] for record in saved] == [1, 1]


def test_dead_tokens(observed):
    depth = np.where(observed.token == ord(" "), 1, 3).astype(np.int8)
    depth[observed.position == 5] = 0
    passes = {"causal": dataclasses.replace(observed.first, depth=depth)}
    (record,) = statistics.dead_records(dataclasses.replace(observed, passes=passes), 3)
    assert record["tokens"] == pytest.approx(1 / 16) and record["rows"] == 8
    assert record["positions"] == pytest.approx(1 / 16)
    assert record["dead_kinds"] == [ord(" ")]


def test_map(runs, tmp_path, capsys):
    # As many windows as rows of a pass elsewhere here: the program is found compiled.
    text, where = "héllo <b> wörld\n" + "x = 12 * 7\n" * 4, tmp_path / "map"
    assert len(text.encode()) == 62
    given = ["map", f"--workdir={runs / 'expert'}", f"--prompt={text}", f"--output={where}"]
    code, out, _ = run(capsys, *given, "--window")
    assert code == 0 and out.splitlines()[1] == "the prompt: 62 tokens in sequences of 16"
    records = lines_of(where / "map.jsonl")
    assert "".join(record["text"] for record in records) == text
    assert bytes.fromhex("".join(record["bytes"] for record in records)).decode() == text
    assert records[0]["loss"] == {"causal": None, "topk": None}
    assert all(record["loss"]["causal"] > 0 for record in records[1:])
    for record in records:
        scored = [score is not None for score in record["scores"]["causal"]]
        assert sum(scored) == min(record["depth"]["causal"] + 1, 3)
    page = (where / "map.html").read_text()
    assert "&lt;" in page and "<b>" not in page and page.count('<span class="causal-') >= 62
    assert image.imread(where / "map.png").shape[2] == 4
    code, _, error = run(capsys, *given[:2], "--prompt=other", given[3])
    assert code == 2 and "holds another analysis (digest, prompt, window differ)" in error


def test_only_what_an_analysis_made_is_replaced(tmp_path):
    asked = {"workdir": "runs/a", "tokens": 3}
    place = AnalysisOutput.of(str(tmp_path / "map"), asked, "map", False)
    place.write({}, {"map.html": "page", "map.png": lambda path: path.write_bytes(b"png")})
    AnalysisOutput.of(str(tmp_path / "map"), asked, "map", False).write({}, {"map.html": "again"})
    assert (tmp_path / "map" / "map.html").read_text() == "again"
    for name, what in (("notes.md", "added"), ("map.html", "changed")):
        (tmp_path / "map" / name).write_text("my own")
        for overwrite in (False, True):
            with pytest.raises(ValueError, match=rf"no analysis wrote: .*{name} \({what}\)"):
                AnalysisOutput.of(str(tmp_path / "map"), asked, "map", overwrite)
        with pytest.raises(ValueError, match=name):
            place.write({}, {"map.html": "once more"})
        assert (tmp_path / "map" / name).read_text() == "my own"
    # Earlier releases listed names alone.
    told = json.loads((tmp_path / "map" / FILE).read_text())
    del told["stamps"]
    (tmp_path / "map" / FILE).write_text(json.dumps(told))
    with pytest.raises(ValueError, match=r"no analysis wrote: notes\.md \(added\);"):
        place.check_free()


def test_statistics_of_token_choice(runs, tmp_path, capsys):
    where = tmp_path / "statistics"
    given = ["statistics", f"--workdir={runs / 'token'}", f"--output={where}", "--tokens=128"]
    code, out, _ = run(capsys, *given, "--json")
    told = json.loads(out)
    assert code == 0 and told["tokens"] == 128
    # Both rules are one here, so there is nothing to compare.
    (routing,) = {record["routing"] for record in told["savings"]}
    assert routing == "causal" and "agreement" not in told
    records = lines_of(where / "statistics.jsonl")
    (choice,) = [record for record in records if record["statistic"] == "choice"]
    (overall,) = [record for record in records if record["statistic"] == "routing"]
    assert choice["shares"] == pytest.approx(overall["shares"][1:], abs=1e-3)
    assert choice["max_violation"] == pytest.approx(3 * max(choice["shares"]) - 1, rel=1e-3)
    for name in ("depth.png", "scores.png"):
        assert image.imread(where / name).shape[1] > 1000


def test_depth_at_test_time(runs, observed, tmp_path, capsys):
    where = tmp_path / "depth"
    given = ["depth", f"--workdir={runs / 'expert'}", f"--output={where}", "--tokens=128"]
    code, out, _ = run(capsys, *given, "--recursions=1,3", "--max_tokens=0")
    assert code == 0 and [line.split()[0] for line in out.splitlines()[5:9]] == ["1", "1", "3", "3"]
    records = lines_of(where / "recursions.jsonl")
    trained = {r["routing"]: r for r in records if r["trained"]}
    for routing, one in observed.passes.items():
        assert trained[routing]["loss"] == pytest.approx(one.ahead.mean(), rel=1e-4)
        assert trained[routing]["depth"] == pytest.approx(one.depth.mean(), rel=1e-4)
    assert records[0]["depth"] == 1 and records[0]["work"] < trained["causal"]["work"] < 1
    assert image.imread(where / "recursions.png").shape[1] > 1000


def test_a_sample_comes_from_the_engine(runs):
    model = recursions.truncate_model(load_run(runs / "recursive"), None, (1,))
    rows = read(model.cfg, model.tokenizer, TextRequest(prompt="abcdefgh"), lambda: b"")
    sample = recursions.Sample(text="ab", max_tokens=3)
    records = recursions.measure(model, rows, sample).of("sample")
    assert [len(record["tokens"]) for record in records] == [3]
    assert records[0]["prompt"] == "ab" and records[0]["depth"] is None


def test_what_a_model_cannot_do_is_refused(runs, capsys):
    for given, told in (
        (("map", "plain"), "every token goes through every layer. mor evaluate"),
        (("statistics", "recursive"), "all 2 recursions. mor analyze depth measures loss"),
        (("depth", "plain"), "a vanilla model has no recursions"),
        (("depth", "token", "--recursions=4"), "recursions=4: token-choice scores the 3 depths"),
        (("depth", "expert", "--recursions=1,x"), "recursions='1,x': must be whole numbers"),
        (("map", "expert", "--calibration=fast"), "calibration='fast': there is no"),
        (("statistics", "expert", "--min_count=0"), "error: --min_count=0: must be greater"),
        (("depth", "expert", "--max_tokens=-1"), "error: --max_tokens=-1: must not be negative"),
        (("depth", "expert", "--max_tokens=64"), "error: --max_tokens=64: prompt .* at most 64"),
        (("depth", "expert", "--temperature=-1"), "error: --temperature=-1.0: must not be neg"),
        (("depth", "expert", f"--seed={2**32}"), "error: --seed=4294967296: must be in 0"),
        (("map", "expert", "--source=csv:x"), "error: --source='csv:x': "),
        (("map", "expert", "--batch_size=0"), "error: --batch_size=0: must be greater than 0"),
        (("map", "expert", "--step=3"), "error: --step=3: there is no complete checkpoint"),
    ):
        name, run_name, *more = given
        code, out, error = run(capsys, name, f"--workdir={runs / run_name}", *more)
        assert code == 2 and not out
        with pytest.raises(ValueError, match=told):
            raise ValueError(error)
        assert not (runs / run_name / "analysis").exists()


def test_without_a_causal_router_top_k_remains(runs, tmp_path):
    found = load_run(runs / "expert")
    router = dataclasses.replace(found.cfg.model.router, causal_routing="none")
    model = dataclasses.replace(found.cfg.model, router=router)
    blind = dataclasses.replace(found, cfg=dataclasses.replace(found.cfg, model=model))
    made = routed_model(blind)
    assert made.modes == ("topk",) and "mor calibrate" in made.notes[0]
    assert recursions.truncate_model(blind, None, (1,)).routings == ("topk",)
