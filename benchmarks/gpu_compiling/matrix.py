"""Which programs are compiled: models, what is made of them, and for which devices."""

import dataclasses
import importlib
from typing import Any

from mor_jax.config import TrainConfig
from mor_jax.training.resolved_settings import resolve_settings

# Name -> configuration, its choices, settings.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "plain": ("vanilla", "", {}),
    "recursive, 3": ("recursive", "recursions=3", {}),
    "expert, 2": ("mor", "recursions=2", {}),
    "expert, 3": ("mor", "recursions=3", {}),
    "expert, 4": ("mor", "recursions=4", {}),
    "expert, 3, kv=shared": ("mor", "recursions=3,kv=shared", {}),
    "token, 3": ("mor", "recursions=3,routing=token", {}),
    "expert, 3, documents": ("mor", "recursions=3", {"data.document_mask": True}),
    "expert, 3, length 1000": ("mor", "recursions=3", {"seq_len": 1000}),
    "expert, 3, length 2047": ("mor", "recursions=3", {"seq_len": 2047}),
    "plain, length 2047": ("vanilla", "", {"seq_len": 2047}),
}
EVALUATIONS, ENGINE = ("topk", "causal"), ("prefill", "decode")

ROWS, PARTS = 32, 8
"""Rows a device, and the micro-batches that they are trained in."""

MULTIPLES = (1, 8, 64, 128)


@dataclasses.dataclass(frozen=True)
class Case:
    """One program. program: `train`, one of `EVALUATIONS` or of `ENGINE`. target: kind of device.

    rows: a device's; parts: micro-batches of training. multiple: of capacities, as the device
    wants them if None.
    """

    model: str
    size: str
    program: str
    target: str = "h100"
    devices: int = 1
    rows: int = ROWS
    parts: int = PARTS
    multiple: int | None = None

    def __str__(self) -> str:
        where = f"{self.devices} {self.target}"
        multiple = "" if self.multiple is None else f", multiple {self.multiple}"
        return f"{self.size} {self.model}: {self.program} for {where}{multiple}"


def full() -> list[Case]:
    """Everything, what fails most easily first."""
    trained = [Case(model, "360m", "train") for model in MODELS]
    served = [name for name in MODELS if "length" not in name and "documents" not in name]
    engine = [Case(model, "360m", program) for program in ENGINE for model in served]
    evaluated = [
        Case(model, "360m", mode)
        for mode in EVALUATIONS
        for model in MODELS
        if mode == "causal" or _is_routed(model)
    ]
    sizes = [
        Case(model, size, "train")
        for size in ("135m", "730m", "1.7b")
        for model in ("plain", "expert, 3")
    ]
    cut = [Case(model, "360m", "train", devices=8) for model in MODELS]
    return [*trained, *evaluated, *engine, *sizes, *cut]


def quick() -> list[Case]:
    """Each kind of program once, of the smallest model."""
    one = [Case("expert, 3", "135m", program) for program in (*EVALUATIONS, *ENGINE)]
    return [Case("expert, 3, length 2047", "135m", "train"), *one]


def multiples() -> list[Case]:
    """With each multiple a training step for an H100, and an evaluation for it and for a TPU v5e.

    Training for the TPU compiles for a quarter of an hour each.
    """
    return [
        Case("expert, 3", "360m", program, target, 1, 4, 1, multiple)
        for program, target in (("train", "h100"), ("topk", "h100"), ("topk", "v5e:2x2"))
        for multiple in MULTIPLES
    ]


def config(case: Case) -> TrainConfig:
    """The run that a case's programs belong to."""
    name, choices, settings = MODELS[case.model]
    module = importlib.import_module(f"configs.{name}")
    values = module.get_config(f"{choices},size={case.size}".lstrip(","))
    rows = case.rows * case.devices
    settings = settings | {
        "batch_size": rows,
        "eval.batch_size": rows,
        "grad_accum_steps": case.parts,
        "model.remat": "full",
        "mesh.data": 1,
        "mesh.fsdp": case.devices,
    }
    if case.multiple is not None:
        settings["model.router.capacity_multiple"] = case.multiple
    values.update_from_flattened_dict(settings)
    return resolve_settings(TrainConfig.from_dict(values.to_dict()), "gpu")


def _is_routed(model: str) -> bool:
    return MODELS[model][0] == "mor"
