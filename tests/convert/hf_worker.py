"""Runs saved models under the transformers that PYTHONPATH names; knows nothing of mor_jax.

    python hf_worker.py FOLDER ...

Each folder holds a saved model and expected.npz (see test_modeling_mor.py). Prints the largest
relative error of the logits of each, generated text included, as one line of JSON.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from hf_prompts import prompts


def error(folder: Path) -> float:
    """Generates again what was generated; saves and loads the model on the way."""
    options = {"trust_remote_code": True}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    model.save_pretrained(folder / "again")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "again", **options)
    expected = np.load(folder / "expected.npz")
    ids, mask = prompts(model.config.vocab_size)
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=expected["logits"].shape[1],
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    assert np.array_equal(out.sequences, expected["sequences"]), folder
    got, want = torch.stack(out.logits, dim=1).numpy(), expected["logits"]
    return float(np.abs(got - want).max() / np.abs(want).max())


if __name__ == "__main__":
    torch.set_num_threads(1)
    told = {Path(folder).name: error(Path(folder)) for folder in sys.argv[1:]}
    print(json.dumps({"version": transformers.__version__, **told}))
