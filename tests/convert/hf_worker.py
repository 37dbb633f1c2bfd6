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
from hf_prompts import forced, prompts


def error(folder: Path) -> float:
    """Generates again what was generated."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    expected = np.load(folder / "expected.npz")
    ids, mask = prompts(model.config.vocab_size)
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=expected["logits"].shape[1],
        do_sample=False,
        prefix_allowed_tokens_fn=forced(expected["sequences"]),
        return_dict_in_generate=True,
        output_logits=True,
    )
    got, want = torch.stack(out.logits, dim=1).numpy(), expected["logits"]
    return float(np.abs(got - want).max() / np.abs(want).max())


if __name__ == "__main__":
    torch.set_num_threads(1)
    told = {Path(folder).name: error(Path(folder)) for folder in sys.argv[1:]}
    print(json.dumps({"version": transformers.__version__, **told}))
