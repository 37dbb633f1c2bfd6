"""Pictures: what is drawn where, in which colour, and from which numbers."""

import importlib.util
import json
import sys

import numpy as np
import pytest
from matplotlib import colors, image

from mor_jax.analysis import figures
from mor_jax.evaluation import plot
from mor_jax.plotting import plots

DPI, MARGIN, HEAD, WIDTH, HEIGHT = 160, 0.3, 0.85, 0.082, 0.17


def pixels(path):
    return np.round(image.imread(path)[..., :3] * 255).astype(int)


def rgb(colour):
    return tuple(round(255 * part) for part in colors.to_rgb(colour))


def depth_at(page, row, column):
    """Depth whose colour fills the corner of a cell; None where the page is white."""
    y = int((HEAD + (row + 0.06) * HEIGHT) * DPI)
    x = int((MARGIN + (column + 0.2) * WIDTH) * DPI)
    known = {rgb(plots.colour(depth)): depth for depth in range(5)}
    return known.get(tuple(page[y, x]))


def ink(page, row, column):
    """How dark the darkest pixel of a cell is, 0 black to 255 white."""
    y, x = (HEAD + row * HEIGHT) * DPI, (MARGIN + column * WIDTH) * DPI
    return page[int(y) : int(y + HEIGHT * DPI), int(x) : int(x + WIDTH * DPI)].max(axis=-1).min()


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def count(page, colour, tolerance=3):
    return int((np.abs(page - rgb(colour)).max(axis=-1) <= tolerance).sum())


def test_every_token_stands_on_the_colour_of_its_depth(tmp_path):
    pieces, depths = ["ab", " ", "c\n", "\t", "dé", "你"], [1, 2, 3, 1, 0, 2]
    plots.depth_map(pieces, depths, tmp_path / "map.png")
    page = pixels(tmp_path / "map.png")
    # The newline keeps the colour of its token, the tab fills up to the next stop.
    assert [depth_at(page, 0, c) for c in range(6)] == [1, 1, 2, 3, 3, None]
    assert [depth_at(page, 1, c) for c in range(8)] == [1, 1, 1, 1, 0, 0, 2, None]
    letters = [ink(page, *cell) for cell in [(0, 0), (0, 1), (0, 3), (1, 4), (1, 5)]]
    signs = [ink(page, *cell) for cell in [(0, 2), (0, 4), (1, 0), (1, 6)]]
    assert max(letters) < 90 < min(signs) and max(signs) < 200
    assert ink(page, 1, 7) == 255


def test_long_lines_wrap_and_the_page_grows(tmp_path):
    text = "x" * 250
    plots.depth_map([text], [2], tmp_path / "map.png", columns=100)
    page = pixels(tmp_path / "map.png")
    assert page.shape[0] == int((HEAD + 3 * HEIGHT + MARGIN) * DPI)
    assert [depth_at(page, 2, c) for c in (0, 49, 50)] == [2, 2, None]
    assert ink(page, 2, 49) < 90


def test_a_very_long_text_is_cut(tmp_path):
    plots.depth_map(["\n"] * 1000, [1] * 1000, tmp_path / "map.png")
    assert pixels(tmp_path / "map.png").shape[0] < (401 * HEIGHT + HEAD + MARGIN) * DPI


def test_the_legend_shows_depths_that_no_token_reached(tmp_path):
    plots.depth_map(["a"], [1], tmp_path / "map.png", recursions=3)
    head = pixels(tmp_path / "map.png")[: int(HEAD * DPI)]
    patch = 0.2 * 0.15 * DPI**2
    for depth, shown in ((0, False), (1, True), (2, True), (3, True), (4, False)):
        assert (count(head, plots.colour(depth)) > 0.8 * patch) == shown


def test_titles_and_legends_stay_inside(tmp_path):
    name = "run, step 60, 4 recursions instead of 3, " + "w$i$d$e" * 30
    plots.depth_map(list("short"), [1, 2, 3, 4, 60], tmp_path / "map.png", title=f"It is {name}")
    records = [{"group": "'$$'", "shares": [0.0, *[1 / 30] * 30], "depth": 9.0}]
    figures.depth_figure({"token": records}, 30, name * 5, tmp_path / "depth.png")
    points = [("depth 1", 1.0, 2.0, True), ("all", 2.0, 1.0, True)]
    plots.depth_curve(points, tmp_path / "curve.png", title=name * 3)
    values = {"workdir": "a/run", "step": 1, "text": name * 2, "loss_causal": 1.0}
    values["by_position"] = [{"first": 0, "last": 1, "targets_causal": 2, "loss_causal": 1.0}]
    plot.draw(values, tmp_path / "loss.png")
    for file in ("map", "depth", "curve", "loss"):
        page = pixels(tmp_path / f"{file}.png")
        # Nothing reaches the edges.
        assert page[:4].min() == page[:, -4:].min() == page[:, :2].min() == 255, file
    assert page.shape[1] == 900
    # Sixty entries of a legend take rows of seven: the page grows by eight rows of them.
    page = pixels(tmp_path / "map.png")
    assert len(page) > (HEAD + 8 * 0.22 + HEIGHT + MARGIN) * DPI - 1
    assert count(page, plots.colour(60)) > 7 * 0.8 * 0.2 * 0.15 * DPI**2


@pytest.mark.parametrize(("pieces", "depths"), [(["a", "b"], [1]), ([], [])])
def test_pieces_and_depths_must_match(tmp_path, pieces, depths):
    with pytest.raises(ValueError, match=rf"{len(pieces)} pieces, {len(depths)} depths"):
        plots.depth_map(pieces, depths, tmp_path / "map.png")


def decode_bytes(tokens):
    return bytes(int(t) for t in tokens).decode("utf-8", "replace")


def test_pieces_of_bytes_join_to_the_text_and_keep_characters_whole():
    text = "aé 你😀\n"
    tokens = np.frombuffer(text.encode(), np.uint8)
    pieces = plots.text_pieces(tokens, decode_bytes)
    assert "".join(pieces) == text
    assert pieces == ["a", "", "é", " ", "", "", "你", "", "", "", "😀", "\n"]


def test_pieces_of_broken_bytes_do_not_swallow_the_rest():
    tokens = np.frombuffer(b"\xffab\xe4", np.uint8)
    pieces = plots.text_pieces(tokens, decode_bytes)
    assert len(pieces) == 4 and pieces[-1] == "\ufffd"
    assert "".join(pieces).replace("\ufffd", "") == "ab"


def test_pieces_keep_the_space_that_a_tokenizer_drops_at_the_start():
    words = ["▁the", "▁cat", "s"]
    decode = lambda tokens: "".join(words[t] for t in tokens).replace("▁", " ").removeprefix(" ")  # noqa: E731
    assert plots.text_pieces([0, 1, 2, 1], decode) == ["the", " cat", "s", " cat"]


def test_loss_curves_draw_training_validation_and_baseline(tmp_path):
    records = [{"step": s, "time": 1.0, "ce": 5 - s / 50} for s in range(1, 101)]
    records += [{"step": s, "eval/loss_topk": 4.0, "eval/loss_causal": 4.2} for s in (50, 100)]
    write(tmp_path / "m.jsonl", [*records, {"step": 101, "ce": "NaN"}])
    plots.loss_curves(tmp_path / "m.jsonl", tmp_path / "a.png", baseline=2)
    page = pixels(tmp_path / "a.png")
    assert page.shape == (800, 1440, 3)
    drawn = [count(page, colour) for colour in plots._COLOURS[:4]]
    assert min(drawn[:3]) > 300 and drawn[3] == 0
    # Held-out losses are level lines: all their pixels but the legend's lie in a thin band.
    rows = np.nonzero((np.abs(page - rgb(plots._COLOURS[1])).max(axis=-1) <= 3).sum(axis=1) > 200)
    assert 1 <= len(rows[0]) <= 6


def test_loss_curves_without_evaluation_or_routing(tmp_path):
    write(tmp_path / "m.jsonl", [{"step": 1, "ce": 5.0}, {"step": 2, "ce": 4.0}])
    plots.loss_curves(tmp_path / "m.jsonl", tmp_path / "a.png")
    assert count(pixels(tmp_path / "a.png"), plots._COLOURS[0]) > 300
    assert count(pixels(tmp_path / "a.png"), plots._COLOURS[1]) == 0


def test_loss_curves_need_a_curve(tmp_path):
    write(tmp_path / "m.jsonl", [{"step": 1, "ce": "NaN"}, {"step": 2, "accuracy": 0.5}])
    with pytest.raises(ValueError, match=r"m\.jsonl: has no finite value of .*'ce'"):
        plots.loss_curves(tmp_path / "m.jsonl", tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


def test_importing_the_module_does_not_import_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    spec = importlib.util.spec_from_file_location("plots_again", plots.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.text_pieces([97], decode_bytes) == ["a"]
