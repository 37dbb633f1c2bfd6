"""Analysis without a model: text input, frequencies, score separation, pages, directories."""

import dataclasses
import html.parser
import json
import sys

import numpy as np
import pytest
from support.tiny import TINY, train_config

from mor_jax import data
from mor_jax.analysis import figures, parts_of_speech, separation
from mor_jax.analysis.frequency import token_shares
from mor_jax.analysis.output_directory import ANALYSIS_FILE, AnalysisOutput, json_lines
from mor_jax.analysis.page import Page, Token
from mor_jax.analysis.text_input import TextRequest, read_sequences
from mor_jax.config import DataConfig
from mor_jax.types import IGNORE

MODEL = dataclasses.replace(TINY["expert_cycle"], vocab_size=256)
BYTES = data.load_tokenizer("bytes")


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for i in range(8):
        (folder / f"{i}.txt").write_text("ab" * (40 + i))
    return train_config(
        model=MODEL, data=DataConfig(sources=(f"text:{folder}/*.txt",), validation_fraction=0.3)
    )


def sequences_of(cfg, stdin=b"", **options):
    return read_sequences(cfg, BYTES, TextRequest(**options), lambda: stdin)


def test_a_text_is_one_sequence(cfg):
    sequences = sequences_of(cfg, prompt="héllo")
    (batch,), (counted,) = sequences.batches, sequences.counted
    assert bytes(batch.tokens[0].tolist()).decode() == "héllo" and counted.all()
    assert batch.targets[0, :-1].tolist() == batch.tokens[0, 1:].tolist()
    assert batch.targets[0, -1] == IGNORE and sequences.tokens == 6 and sequences.contiguous
    assert sequences_of(cfg, b"abc", text="-").name == "the standard input"


def test_a_long_text_is_cut_into_full_windows(cfg):
    text = "".join(chr(97 + i % 26) for i in range(70))
    sequences = sequences_of(cfg, prompt=text, window=True, batch_size=2)
    assert [batch.tokens.shape for batch in sequences.batches] == [(2, 16)] * 3
    pairs = list(zip(sequences.batches, sequences.counted, strict=True))
    read_once = np.concatenate([batch.tokens[counted] for batch, counted in pairs])
    assert bytes(read_once.tolist()).decode() == text
    targets = np.concatenate([batch.targets[counted] for batch, counted in pairs])
    assert targets.tolist() == [*read_once[1:].tolist(), IGNORE]
    # The last window reaches back: 70 = 4 * 16 + 6.
    assert (
        sequences.counted[2][0].tolist() == [False] * 10 + [True] * 6
        and not sequences.counted[2][1].any()
    )
    assert sequences.notes == ("windows of 16 tokens, each read without the ones before it",)
    few = sequences_of(cfg, prompt=text, window=True, tokens=20)
    assert few.tokens == 20 and few.notes[0] == "the first 20 of 70 tokens (--tokens)"


def test_a_source_gives_the_requested_number_of_tokens(cfg):
    assert sequences_of(cfg, tokens=40).tokens == 32
    # Never more than requested, even below one sequence; no sequence repeats to fill a batch.
    for tokens, length in ((10, None), (1, None), (15, 16), (3, 9)):
        few = sequences_of(cfg, tokens=tokens, length=length)
        assert few.tokens == few.length == tokens
        assert few.notes == (f"one sequence, shorter than the run's (--tokens={tokens})",)
    [batch] = sequences_of(cfg, sources=cfg.data.sources, batch_size=10**15).batches
    assert batch.tokens.shape == (43, 16)
    everything = sequences_of(cfg, sources=cfg.data.sources)
    # 8 texts of 2 * (40 .. 47) letters, each with an end token: 704 tokens.
    # The last one has no target, so 43 of 44 sequences are complete.
    assert everything.tokens == 43 * 16 and not everything.notes
    assert everything.tokens < sum(counted.size for counted in everything.counted)


def test_texts_that_cannot_be_read_are_refused(cfg, tmp_path):
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    (tmp_path / "binary").write_bytes(b"a\0b")
    (tmp_path / "wide").write_bytes("a text".encode("utf-16"))
    for options, message in (
        (
            {"prompt": "x" * 65},
            "has 65 tokens, the model's context is model.max_seq_len=64.*window",
        ),
        ({"prompt": ""}, "holds no tokens"),
        ({"prompt": "a\udc80"}, "is not UTF-8"),
        ({"text": str(tmp_path / "none")}, r"text='.*none': cannot be read \(No such file"),
        ({"text": str(tmp_path / "latin")}, "not UTF-8: byte 0xe9 at offset 3"),
        ({"text": str(tmp_path / "wide")}, r"text='.*wide': is UTF-16, not UTF-8.*iconv -f UTF-16"),
        ({"text": str(tmp_path / "binary")}, "NUL character at offset 1"),
        (
            {"text": "a", "prompt": "b"},
            "prompt='b': an analysis reads one text, but text and prompt are set",
        ),
        ({"prompt": "a", "tokens": 0}, "tokens=0: must be in 1"),
        ({"prompt": "a", "length": 65}, "length=65: the model's context"),
    ):
        with pytest.raises(ValueError, match=message):
            sequences_of(cfg, **options)


def test_frequencies_are_those_of_the_training_text(cfg):
    share = token_shares(cfg.data, BYTES, 256)
    assert share.sum() == pytest.approx(1) and np.count_nonzero(share) == 3
    assert share[ord("a")] == share[ord("b")] > 20 * share[BYTES.eos_id]


def test_scores_that_separate():
    rng = np.random.default_rng(0)
    yes, no = rng.integers(0, 6, 40), rng.integers(0, 5, 30)
    pairs = (yes[:, None] > no[None]) + 0.5 * (yes[:, None] == no[None])
    assert separation.auroc(yes, no) == pytest.approx(pairs.mean())
    assert separation.auroc(no + 10, yes) == 1


def test_agreement_counts_causal_routing_as_the_guess():
    causal, topk = np.array([1, 1, 1, 0, 0], bool), np.array([1, 0, 0, 1, 0], bool)
    measured = separation.agreement(causal, topk)
    assert (measured["tokens"], measured["causal"], measured["topk"]) == (5, 3, 2)
    expected = {"accuracy": 2 / 5, "precision": 1 / 3, "recall": 1 / 2, "jaccard": 1 / 4}
    assert {name: measured[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert separation.agreement(~causal & False, topk)["precision"] is None


def test_tokens_belong_to_the_words_that_they_begin_in():
    pieces = ["The", " ca", "t", " ", "sat", ",", "", "\n", "co", "'t", " 12"]
    # The tagger rewrote one word: it has no tokens, and the next words keep theirs.
    words = [
        ("The", "DT"),
        ("cat", "NN"),
        ("sat", "VBD"),
        (",", ","),
        ("could", "MD"),
        ("12", "CD"),
    ]
    labels = parts_of_speech.token_classes(pieces, words)
    names = [parts_of_speech.CLASSES[label] if label >= 0 else None for label in labels]
    first = ["determiner", "noun", "noun", None, "verb", "punctuation"]
    assert names == [*first, None, None, None, None, "number"]


def test_a_missing_tagger_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "textblob", None)
    with pytest.raises(ValueError, match="pip install textblob"):
        parts_of_speech.check_tagger()


def test_axes_of_the_recursion_figure_are_labelled(monkeypatch, tmp_path):
    written = []
    monkeypatch.setattr(figures.plots, "write_figure", lambda figure, path: written.append(figure))
    records = [{"recursions": r, "loss": 2.0 - r, "work": r / 2} for r in (1, 2)]
    curves = {"causal": records, "top-k": records}
    figures.recursion_figure(curves, 2, "a run", tmp_path / "recursions.png")
    labels = [axes.get_ylabel() for axes in written[0].axes]
    assert labels == [
        "cross-entropy, nats per token",
        "forward FLOPs; 1: all tokens at 2 recursions",
    ]


class Spans(html.parser.HTMLParser):
    """Text and attributes of the tokens of a page."""

    def __init__(self, page):
        super().__init__()
        self.spans, self.faint, self.main = [], False, False
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.main = self.main or tag == "main"
        self.faint = tag == "i"
        if tag == "span" and self.main:
            self.spans.append([dict(attrs), ""])

    def handle_endtag(self, tag):
        self.faint = False

    def handle_data(self, text):
        if self.main and self.spans and not self.faint and text.strip("\n"):
            self.spans[-1][1] += text


def test_a_page_shows_any_text_and_runs_none_of_it():
    texts = ['<script>"&amp;', "", "\x1b[31m", "\u202e", "你\n"]
    title = "'>\"<script>alert(1)</script>"
    rows = [
        [
            Token(text=t, title=title, depths={"causal": i % 3}, loss=9.5)
            for i, t in enumerate(texts)
        ]
    ]
    page = Page(
        title="<b>", about="&", routings={"causal": "causal"}, rows=rows, recursions=2
    ).html()
    spans = Spans(page).spans
    assert [text for _, text in spans] == ['<script>"&amp;', "", "[31m", "", "你"]
    assert {attrs["title"] for attrs, _ in spans} == {title}
    assert [attrs["class"] for attrs, _ in spans][:3] == [f"causal-{d} loss-5" for d in (0, 1, 2)]
    assert "<script" not in page and "http" not in page and "U+202E" in page
    assert "1 recursion (2, 40%)" in page and "<b>" not in page


def request_of(tmp_path, **more):
    return {"workdir": str(tmp_path / "run"), "command": "map", **more}


def test_an_analysis_is_written_as_a_whole(tmp_path):
    output = AnalysisOutput.of(None, request_of(tmp_path), "map-3", False)
    paths = output.write(
        {"tokens": 2}, {"a.jsonl": json_lines([{"é": 1}]), "b": lambda p: p.write_text("x")}
    )
    assert [path.name for path in paths] == ["a.jsonl", "b"]
    assert output.path == tmp_path / "run" / "analysis" / "map-3"
    assert (output.path / "a.jsonl").read_text() == '{"é": 1}\n'
    assert json.loads((output.path / ANALYSIS_FILE).read_text())["files"] == ["a.jsonl", "b"]

    def full(path):
        raise OSError("no space left")

    with pytest.raises(ValueError, match=r"map-3': cannot be written \(no space left\)"):
        output.write({}, {"a.jsonl": "", "b": full})
    assert (output.path / "b").read_text() == "x"
    assert [path.name for path in output.path.parent.iterdir()] == ["map-3"]
    output.write({}, {"c": "again"})
    assert sorted(path.name for path in output.path.iterdir()) == [ANALYSIS_FILE, "c"]


def test_other_directories_are_not_replaced(tmp_path):
    directory = str(tmp_path / "out")
    AnalysisOutput.of(directory, request_of(tmp_path), "", False).write({}, {})
    with pytest.raises(ValueError, match=r"another analysis \(prompt differ\).*--overwrite"):
        AnalysisOutput.of(directory, request_of(tmp_path, prompt="b"), "", False)
    AnalysisOutput.of(directory, request_of(tmp_path, prompt="b"), "", True)
    with pytest.raises(ValueError, match=r"holds an analysis of .*run; it is not replaced"):
        AnalysisOutput.of(directory, {"workdir": "another"}, "", True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").touch()
    with pytest.raises(ValueError, match="exists and is not the output of an analysis"):
        AnalysisOutput.of(str(tmp_path / "mine"), request_of(tmp_path), "", True)
    with pytest.raises(ValueError, match="is a file"):
        AnalysisOutput.of(str(tmp_path / "mine" / "notes"), request_of(tmp_path), "", True)
    with pytest.raises(ValueError, match="must be a local directory"):
        AnalysisOutput.of(None, {"workdir": "gs://bucket/run"}, "map-1", False)
