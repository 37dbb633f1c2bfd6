"""What a recording of the authors' code may hold besides the model: faults, ties, its counters."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from support.seeded import random_params
from support.state_dict_oracle import Oracle
from support.tiny import TINY

from mor_jax.convert.parity.compacted_rows import first_compacted, forward
from mor_jax.convert.parity.compare import Report, by_magnitude
from mor_jax.convert.parity.run import main, run_file
from mor_jax.convert.parity.ties import find_ties
from mor_jax.convert.parity.training_run import balancing_sign
from mor_jax.convert.reference_config import merge_options, model_config
from mor_jax.convert.state_dict import from_params
from mor_jax.models.params import unembed
from mor_jax.models.routing.outputs import RecursionTrace, Routing, TokenSums
from mor_jax.models.routing.router import Route
from mor_jax.types import Batch

CASES = Path(__file__).parents[2] / "goldens" / "parity"
HF = {
    "vocab_size": 23,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 18,
    "num_hidden_layers": 5,
    "rms_norm_eps": 1e-6,
    "rope_theta": 500.0,
}
RECURSION = {"enable": True, "sharing": "middle_cycle", "num_recursion": 3}


class Compacting(Oracle):
    """The authors' token-choice, row by row as they loop: a place among the rows that are left
    is taken for a row of the batch."""

    def token(self, x):
        part, stage = self.mor["token"], "model.layers.1"
        w = self.score(self.router(f"{stage}.mor_router", x), part)
        e = np.argmax(w, axis=-1)
        state, result, cache = x.copy(), x.copy(), {}
        for r in range(self.nr):
            names = [f"{stage}.block_list.{r}.{j}" for j in range(self.depth)]
            y = self.block(names, state, e >= r, cache, r)
            left = [row for row in range(len(x)) if np.any(e[row] >= r)]
            for place, row in enumerate(left):
                for t in np.flatnonzero(e[row] >= r):
                    if e[place, t] == r:
                        gate = w[place, t, r] if part["gating"] == "weighted" else 1.0
                        result[row, t] += gate * y[row, t]
                    elif e[place, t] > r:
                        state[row, t] = y[row, t]
        return result, e + 1


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("gating", ["weighted", "additive"])
def test_the_emulated_fault_is_the_one_of_the_authors(gating, shared):
    token = {"router_func": "softmax", "alpha": 1.0, "gating": gating}
    blocks = {"recursive": RECURSION, "mor": {"enable": True, "type": "token", "token": token}}
    options = merge_options(blocks | ({"kv_sharing": {"enable": True}} if shared else {}))
    cfg = model_config(HF, options, tied=False)
    params = random_params(cfg)
    # A strong router and rows that repeat one token: rows 0 and 2 leave early as a whole.
    weight = params["router"]["main"]["weight"]
    params = params | {"router": {"main": {"weight": 40 * weight}}}
    ids = np.random.default_rng(3).integers(0, 23, (5, 9)).astype(np.int32)
    ids[0], ids[2] = 22, 13
    want, depth = Compacting(HF, options, from_params(cfg, params)).run(ids)
    places = first_compacted(depth)
    assert {r for r, _ in places} == {1, 2}, depth
    rows = Batch(jnp.asarray(ids), jnp.asarray(ids))
    out = jax.jit(lambda p: forward(cfg, p, rows, Route()))(params)
    np.testing.assert_array_equal(out.routing.depth, depth)
    assert by_magnitude(unembed(cfg, params, out.hidden), want) < 1e-5
    right, _ = Oracle(HF, options, from_params(cfg, params)).run(ids)
    assert by_magnitude(right, want) > 1e-3


def test_rows_behind_a_dropped_one_are_named():
    depth = np.asarray([[1, 1], [2, 3], [1, 2], [1, 1]])
    assert first_compacted(depth) == [(1, 1), (1, 2), (2, 1)]
    assert first_compacted(np.asarray([[3, 3], [2, 1], [1, 1]])) == []


def test_the_sign_of_balancing_is_that_of_the_authors_division():
    rng, ties = np.random.default_rng(0), 0
    for _ in range(300):
        total, recursions = int(rng.integers(2, 40)) * 6, int(rng.integers(2, 5))
        even = rng.integers(-2, 3, recursions) * (rng.random() < 0.5)
        counts = [total // recursions + even, total // recursions - even]
        counts[1][-1] += rng.integers(0, 2)
        theirs = sum(torch.from_numpy(c) / int(c.sum()) for c in counts) / 2
        want = torch.sign(theirs.mean() - theirs).numpy()
        ours = balancing_sign([np.asarray(c, np.float32) for c in counts])
        np.testing.assert_array_equal(ours, want)
        ties += int(np.sum(np.asarray(counts), axis=0).std() == 0)
    assert ties > 30


def test_a_recording_that_begins_in_the_middle_counts_on(tmp_path):
    # The balancing warm-up of six passes was over before the first one of this recording.
    name = "trainer_mot_lossfree"
    spec = json.loads((CASES / f"{name}.json").read_text())
    spec["cfg"]["mor"]["token"]["bal_warmup_step"] = 6
    shutil.copy(CASES / f"{name}.npz", tmp_path)
    file = tmp_path / f"{name}.json"
    file.write_text(json.dumps(spec | {"training_step": 6}))
    report = run_file(file)
    assert report.passed, report.line()
    file.write_text(json.dumps(spec))
    assert not run_file(file).passed


def visit(scores, index):
    logits = jnp.asarray(scores, jnp.float32)
    return RecursionTrace(logits, logits, None if index is None else jnp.asarray(index), None)


def test_ties_of_expert_choice_are_named_with_step_place_and_gap():
    cfg = TINY["expert"]
    first = visit([[0.1, 0.5, 0.3, 0.2, 0.4, 0.0]], None)
    second = visit([[0.1, 0.5, 0.3, 0.2, 0.4, 0.0]], [[1, 2, 3, 4]])
    third = visit([[0.2, 0.3, 0.3 + 1e-7, 0.1]], [[2, 3]])
    routing = Routing(jnp.zeros((1, 6), int), None, None, (first, second, third))
    assert find_ties(cfg, routing, 4) == []
    fourth = visit([[0.2, 0.3, 0.3 + 1e-7, 0.1]], [[2]])
    routing = Routing(jnp.zeros((1, 6), int), None, None, (first, second, fourth))
    (tie,) = find_ties(cfg, routing, 4)
    assert (tie.recursion, tie.row, set(tie.places)) == (2, 0, {2, 3})
    assert 0 <= tie.gap < 1e-7
    assert str(tie).startswith("tie at forward 4, row 0, recursion 3, tokens ")
    assert "gap " in str(tie) and "evaluation" in str(find_ties(cfg, routing, None)[0])
    report = Report("case", {"trajectory": (0.5, "micro_loss")}, ties=[tie] * 5)
    assert "FAIL" in report.line() and "tie at forward 4" in report.line()
    assert report.line().endswith("and 2 more ties")


def test_ties_of_token_choice_are_between_depths():
    cfg = TINY["token"]
    scores = [[[0.0, 1.0, 1.0], [1.0, 0.0, 0.5]]]
    sums = TokenSums(*(jnp.zeros(3) for _ in range(5)))
    routing = Routing(jnp.ones((1, 2), int), None, sums, (visit(scores, None),))
    (tie,) = find_ties(cfg, routing, 1)
    assert tie.places == (0, 1, 2) and "token 0, depths 2 and 3" in str(tie)
    assert find_ties(cfg, routing, 1, np.asarray([0.0, 0.0, 0.1])) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "vanila_untied"], "--only='vanila_untied': none of the 11 cases in "),
        (["--only", ""], "--only='': none of the 11 cases"),
        (["--cases", "nowhere"], "--cases='nowhere': contains no cases"),
        (["--cases", str(CASES / "vanilla_untied.npz")], "contains no cases"),
    ],
)
def test_names_that_are_not_there_are_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--cases", str(CASES), *arguments])
    said = capsys.readouterr()
    assert ended.value.code == 2 and not said.out
    assert said.err.count("\n") == 1 and message in said.err


@pytest.mark.parametrize("only", ["init_strategies", "init_strategies.json", "init_strat*"])
def test_a_case_is_chosen_by_its_name_or_its_file(only, capsys):
    assert main(["--cases", str(CASES), "--only", only]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "1 passed, 0 failed"


def test_a_platform_that_is_not_there_is_one_line():
    command = [sys.executable, "-m", "mor_jax.convert.parity", "--cases", str(CASES)]
    ran = subprocess.run([*command, "--platform", "moon"], capture_output=True, text=True)
    assert ran.returncode == 2 and ran.stderr.count("\n") == 1
    assert ran.stderr.startswith("--platform='moon': JAX cannot use it (")
