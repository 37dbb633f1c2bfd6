"""`mor analyze` on small runs: its records match the model; invalid requests are refused."""

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
from mor_jax.analysis.output_directory import ANALYSIS_FILE, AnalysisOutput
from mor_jax.analysis.routing_record import observe, routed_model
from mor_jax.analysis.text_input import TextRequest, read_sequences
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
    """One run directory per model, with imported weights and no checkpoint."""
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
    return observe(
        model, read_sequences(model.cfg, model.tokenizer, TextRequest(tokens=128), lambda: b"")
    )


def run(capsys, *args):
    code = command.main([str(each) for each in args])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_is_observed_is_what_the_model_does(observed):
    model, cfg = observed.model, observed.model.model
    row = np.asarray(observed.sequences.batches[0].tokens[0])
    expected = token_depths(cfg, model.params, row)
    np.testing.assert_array_equal(observed.passes["causal"].depth[:16], expected)
    topk = observed.passes["topk"]
    for r, count in enumerate(capacity_tokens(cfg, 16)):
        assert ((topk.depth > r).reshape(-1, 16).sum(axis=1) == count).all()
    for routing_pass in observed.passes.values():
        for r, logits in enumerate(routing_pass.logits):
            np.testing.assert_array_equal(np.isfinite(logits), routing_pass.depth >= r)
        # The token before predicts a token's loss; sequences of a source are not connected.
        assert np.isnan(routing_pass.loss[::16]).all() and np.isfinite(routing_pass.ahead).all()
        np.testing.assert_array_equal(routing_pass.loss[1:16], routing_pass.ahead[:15])
    causal = observed.passes["causal"]
    for r in (1, 2):
        valid = np.isfinite(causal.logits[r])
        np.testing.assert_array_equal(causal.logits[r][valid] >= 0, causal.depth[valid] > r)


def test_groups_hold_every_token_once(observed):
    measured = statistics.measure(observed, 3, False)
    overall = {record["routing"]: record for record in measured.of("routing")}
    for routing, routing_pass in observed.passes.items():
        assert overall[routing]["depth"] == pytest.approx(routing_pass.depth.mean(), rel=1e-5)
        assert overall[routing]["ahead"] == pytest.approx(routing_pass.ahead.mean(), rel=1e-5)
        for statistic in ("position", "token", "frequency", "loss_ahead"):
            records = measured.of(statistic, routing)
            assert sum(record["tokens"] for record in records) == 128, statistic
            depth = sum(record["tokens"] * record["depth"] for record in records) / 128
            assert depth == pytest.approx(routing_pass.depth.mean(), rel=1e-4), statistic
    space = next(r for r in measured.of("token", "causal") if r["group"] == "' '")
    mask = observed.token == ord(" ")
    assert space["tokens"] == mask.sum() and space["token"] == ord(" ")
    assert space["depth"] == pytest.approx(observed.first.depth[mask].mean(), rel=1e-4)
    deciles = measured.of("loss_ahead", "causal")
    assert len(deciles) == 10
    assert all(a["ahead"] <= b["ahead"] for a, b in itertools.pairwise(deciles))


def test_agreement_takes_top_k_as_the_truth(observed):
    measured, topk = statistics.measure(observed, 3, False), observed.passes["topk"]
    for record in measured.of("scores"):
        r = record["recursion"]
        assert record["candidates"] == (topk.depth >= r).sum()
        assert record["chosen"] == (topk.depth > r).sum() == sum(record["bins_chosen"])
    same = {r["recursion"]: r for r in measured.of("agreement") if r["states"] == "topk"}
    assert same[0]["accuracy"] == 1 and same[0]["takes_all"]
    valid = np.isfinite(topk.logits[1])
    correct = (topk.logits[1][valid] >= 0) == (topk.depth[valid] > 1)
    assert same[1]["accuracy"] == pytest.approx(correct.mean(), rel=1e-5)
    own = {r["recursion"]: r for r in measured.of("agreement") if r["states"] == "own"}
    both = [observed.passes[name].depth > 2 for name in ("causal", "topk")]
    expected = (both[0] & both[1]).sum() / (both[0] | both[1]).sum()
    assert own[2]["jaccard"] == pytest.approx(expected, rel=1e-5)


def test_savings_count_entries_that_are_not_stored(observed):
    saved = {
        record["routing"]: record for record in statistics.measure(observed, 3, False).of("savings")
    }
    # One layer, three recursions, separate keys and values: one entry per recursion of a token.
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
    # As many windows as sequences in other tests: the compiled function is reused.
    text, directory = "héllo <b> wörld\n" + "x = 12 * 7\n" * 4, tmp_path / "map"
    assert len(text.encode()) == 62
    args = ["map", f"--workdir={runs / 'expert'}", f"--prompt={text}", f"--output={directory}"]
    code, out, _ = run(capsys, *args, "--window")
    assert code == 0 and out.splitlines()[1] == "the prompt: 62 tokens in sequences of 16"
    records = lines_of(directory / "map.jsonl")
    assert "".join(record["text"] for record in records) == text
    assert bytes.fromhex("".join(record["bytes"] for record in records)).decode() == text
    assert records[0]["loss"] == {"causal": None, "topk": None}
    assert all(record["loss"]["causal"] > 0 for record in records[1:])
    for record in records:
        scored = [score is not None for score in record["scores"]["causal"]]
        assert sum(scored) == min(record["depth"]["causal"] + 1, 3)
    page = (directory / "map.html").read_text()
    assert "&lt;" in page and "<b>" not in page and page.count('<span class="causal-') >= 62
    assert image.imread(directory / "map.png").shape[2] == 4
    code, _, error = run(capsys, *args[:2], "--prompt=other", args[3])
    assert code == 2 and "holds another analysis (digest, prompt, window differ)" in error


def test_only_files_of_an_analysis_are_replaced(tmp_path):
    request = {"workdir": "runs/a", "tokens": 3}
    output = AnalysisOutput.of(str(tmp_path / "map"), request, "map", False)
    output.write({}, {"map.html": "page", "map.png": lambda path: path.write_bytes(b"png")})
    AnalysisOutput.of(str(tmp_path / "map"), request, "map", False).write({}, {"map.html": "again"})
    assert (tmp_path / "map" / "map.html").read_text() == "again"
    for name, what in (("notes.md", "added"), ("map.html", "changed")):
        (tmp_path / "map" / name).write_text("my own")
        for overwrite in (False, True):
            with pytest.raises(ValueError, match=rf"no analysis wrote: .*{name} \({what}\)"):
                AnalysisOutput.of(str(tmp_path / "map"), request, "map", overwrite)
        with pytest.raises(ValueError, match=name):
            output.write({}, {"map.html": "once more"})
        assert (tmp_path / "map" / name).read_text() == "my own"
    # Earlier releases recorded names without checksums.
    recorded = json.loads((tmp_path / "map" / ANALYSIS_FILE).read_text())
    del recorded["stamps"]
    (tmp_path / "map" / ANALYSIS_FILE).write_text(json.dumps(recorded))
    with pytest.raises(ValueError, match=r"no analysis wrote: notes\.md \(added\);"):
        output.check_replaceable()


def test_statistics_of_token_choice(runs, tmp_path, capsys):
    directory = tmp_path / "statistics"
    args = ["statistics", f"--workdir={runs / 'token'}", f"--output={directory}", "--tokens=128"]
    code, out, _ = run(capsys, *args, "--json")
    result = json.loads(out)
    assert code == 0 and result["tokens"] == 128
    # Both routings are equal here, so there is nothing to compare.
    (routing,) = {record["routing"] for record in result["savings"]}
    assert routing == "causal" and "agreement" not in result
    records = lines_of(directory / "statistics.jsonl")
    (choice,) = [record for record in records if record["statistic"] == "choice"]
    (overall,) = [record for record in records if record["statistic"] == "routing"]
    assert choice["shares"] == pytest.approx(overall["shares"][1:], abs=1e-3)
    assert choice["max_violation"] == pytest.approx(3 * max(choice["shares"]) - 1, rel=1e-3)
    for name in ("depth.png", "scores.png"):
        assert image.imread(directory / name).shape[1] > 1000


def test_depth_at_test_time(runs, observed, tmp_path, capsys):
    directory = tmp_path / "depth"
    args = ["depth", f"--workdir={runs / 'expert'}", f"--output={directory}", "--tokens=128"]
    code, out, _ = run(capsys, *args, "--recursions=1,3", "--max_tokens=0")
    assert code == 0 and [line.split()[0] for line in out.splitlines()[5:9]] == ["1", "1", "3", "3"]
    records = lines_of(directory / "recursions.jsonl")
    trained = {r["routing"]: r for r in records if r["trained"]}
    for routing, routing_pass in observed.passes.items():
        assert trained[routing]["loss"] == pytest.approx(routing_pass.ahead.mean(), rel=1e-4)
        assert trained[routing]["depth"] == pytest.approx(routing_pass.depth.mean(), rel=1e-4)
    assert records[0]["depth"] == 1 and records[0]["work"] < trained["causal"]["work"] < 1
    assert image.imread(directory / "recursions.png").shape[1] > 1000


def test_a_sample_comes_from_the_engine(runs):
    model = recursions.truncate_model(load_run(runs / "recursive"), None, (1,))
    sequences = read_sequences(
        model.cfg, model.tokenizer, TextRequest(prompt="abcdefgh"), lambda: b""
    )
    sample = recursions.Sample(text="ab", max_tokens=3)
    records = recursions.measure(model, sequences, sample).of("sample")
    assert [len(record["tokens"]) for record in records] == [3]
    assert records[0]["prompt"] == "ab" and records[0]["depth"] is None


def test_what_a_model_cannot_do_is_refused(runs, capsys):
    for args, message in (
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
        name, run_name, *more = args
        code, out, error = run(capsys, name, f"--workdir={runs / run_name}", *more)
        assert code == 2 and not out
        with pytest.raises(ValueError, match=message):
            raise ValueError(error)
        assert not (runs / run_name / "analysis").exists()


def test_without_a_causal_router_top_k_remains(runs, tmp_path):
    weights = load_run(runs / "expert")
    router = dataclasses.replace(weights.cfg.model.router, causal_routing="none")
    model = dataclasses.replace(weights.cfg.model, router=router)
    noncausal = dataclasses.replace(weights, cfg=dataclasses.replace(weights.cfg, model=model))
    routed = routed_model(noncausal)
    assert routed.modes == ("topk",) and "mor calibrate" in routed.notes[0]
    assert recursions.truncate_model(noncausal, None, (1,)).routings == ("topk",)
