"""The files that a batch passes on its way from the loader to the gradient.

    python tests/support/batch_path.py [ROOT]

trains the quickstart's model for one step in a checkout (default: this one) and prints every file
of `mor_jax` with code that runs while a batch is read, placed on the devices, or goes through the
train step when that is traced. Works for version 0.1.0's first layout too.
"""

import importlib
import sys
import tempfile
import threading
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).parents[2]

# Functions below which a batch is at work: the iterator's next, the placement, the compilation.
STARTS = {"next", "place", "_compile"}


def main(root: Path) -> None:
    """Prints the files and their number."""
    sys.path.insert(0, str(root))
    files: set[str] = set()
    package = str(root / "mor_jax")
    inside = threading.local()

    def profile(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if not code.co_filename.startswith(package):
            return
        if event == "call":
            depth = getattr(inside, "depth", 0)
            if depth or code.co_name in STARTS:
                files.add(code.co_filename)
                inside.depth = depth + 1
        elif event == "return" and getattr(inside, "depth", 0):
            inside.depth -= 1

    with tempfile.TemporaryDirectory() as directory:
        train = _training(root, Path(directory))
        threading.setprofile(profile)
        sys.setprofile(profile)
        try:
            train()
        finally:
            sys.setprofile(None)
    for file in sorted(files):
        print(Path(file).relative_to(root))
    print(f"{len(files)} files")


def _training(root: Path, directory: Path):
    config = importlib.import_module("configs.quickstart").get_config()
    for number in range(40):
        (directory / f"{number}.txt").write_text(f"{number} squared is {number**2}\n" * 100)
    with config.unlocked():
        config.steps, config.optim.warmup_steps, config.optim.decay_steps = 1, 0, 1
        config.data.sources = (f"text:{directory}/*.txt",)
        config.eval.batches, config.eval.completion_tokens = 1, 0
    try:
        from mor_jax.training.trainer import fit
    except ModuleNotFoundError:
        from mor_jax.train import fit
    from mor_jax.config import TrainConfig

    cfg = TrainConfig.from_dict(config.to_dict())
    return lambda: fit(cfg, directory / "run")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT)
