"""Small tasks for lm-evaluation-harness from the topics of `pydoc`: no download, always the same.

A choice of endings (`mor_cloze`), whole pages (`mor_pages`) and answers that are written
(`mor_next`), as task files beside their data, for `--include_path`.
"""

import json
import random
import re
from collections.abc import Iterable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

NAMES = ("mor_cloze", "mor_pages", "mor_next")

_TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
"""
_CLOZE = """\
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: "{{endings}}"
doc_to_target: "{{label}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
"""
_PAGES = """\
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{page}}"
metric_list:
  - metric: bits_per_byte
    aggregation: bits_per_byte
    higher_is_better: false
"""
_NEXT = """\
output_type: generate_until
doc_to_text: "{{context}}"
doc_to_target: "{{target}}"
generation_kwargs:
  until: ["\\n", "."]
  max_gen_toks: 16
  do_sample: false
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""


def write(
    folder: Path, questions: int = 12, pages: int = 3, answers: int = 4, page: int = 700
) -> None:
    """Writes task files and data of so many documents each into `folder`. page: characters."""
    rng = random.Random(0)
    parts = [part for name in sorted(topics) for part in topics[name].split("\n\n")]
    plain = [re.sub(r"\s+", " ", part).strip() for part in parts if "::" not in part]
    texts = [text for text in plain if 150 < len(text) < 400]
    rng.shuffle(texts)
    cloze = [_question(texts[4 * i : 4 * i + 4], rng) for i in range(questions)]
    whole = [{"page": topics[name][:page]} for name in sorted(topics)[:pages]]
    halves = [text.split(" ") for text in texts[-answers:]]
    begun = [{"context": " ".join(w[:12]), "target": " ".join(w[12:20])} for w in halves]
    _write(folder, "mor_cloze", _CLOZE, cloze)
    _write(folder, "mor_pages", _PAGES, whole)
    _write(folder, "mor_next", _NEXT, begun)


def _question(texts: list[str], rng: random.Random) -> dict[str, Any]:
    """The end of the first text among pieces of the others."""
    words = texts[0].split(" ")
    cut = len(words) * 2 // 3
    endings = [
        " ".join(words[cut:]),
        *(" ".join(t.split(" ")[: len(words) - cut]) for t in texts[1:]),
    ]
    order = rng.sample(range(4), 4)
    context = " ".join(words[:cut])
    return {"context": context, "endings": [endings[i] for i in order], "label": order.index(0)}


def _write(folder: Path, name: str, task: str, rows: Iterable[dict[str, Any]]) -> None:
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    head = _TASK.format(name=name, data=data.resolve())
    (folder / f"{name}.yaml").write_text(head + task, encoding="utf-8")
