"""A training in miniature for tests of what surrounds trainings: leaves what a run leaves.

Reads the plan as launch/train.py does, needs the state that it is to go on from, and does what the
file `orders` in the study says for the run: `fail` once, `fail always`, or `sleep`.
"""

import json
import signal
import sys
import time
from pathlib import Path

flags = dict(word.removeprefix("--").split("=", 1) for word in sys.argv[1:])
study, name = flags["config"].removeprefix("configs/from_study.py:").rsplit("/", 1)
manifest = json.loads((Path(study) / "manifest.json").read_text())
run = next(run for run in manifest["runs"] if run["name"] == name)
orders = Path(study) / "orders" / name
order = orders.read_text() if orders.exists() else ""

signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
if order == "sleep":
    # Until it is ended.
    print("asleep", flush=True)
    time.sleep(86400)
if order == "fail":
    orders.unlink()
if order.startswith("fail"):
    print("error: the disk is full")
    sys.exit(1)
if "branch" in flags:
    source, _, step = flags["branch"].rpartition("@")
    assert (Path(source) / "checkpoints" / f"{int(step):08d}").is_dir(), source

workdir = Path(flags["workdir"])
config = json.loads(json.dumps(manifest["base"]))
for setting, value in run["settings"].items():
    *groups, leaf = setting.split(".")
    group = config
    for key in groups:
        group = group[key]
    group[leaf] = value
for step in (run["steps"], *config["checkpoint"]["keep_steps"]):
    (workdir / "checkpoints" / f"{step:08d}").mkdir(parents=True, exist_ok=True)
    (workdir / "checkpoints" / f"{step:08d}" / "manifest.json").write_text("{}")
loss = float("nan") if order == "nan" else 1.0 + run["effective"] / 1e6
record = {"step": run["steps"], "time": 0.0, "eval/loss_causal": loss}
(workdir / "metrics.jsonl").write_text(json.dumps(record) + "\n")
(workdir / "config.json").write_text(json.dumps(config))
