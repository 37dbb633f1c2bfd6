"""A study of three sizes and two budgets, small enough to run in tests."""

from pathlib import Path

from mor_jax.scaling.study.plan import Rules, Shapes, StudyRequest

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = StudyRequest(
    study="small",
    architectures=("plain", "mor-2", "token-3"),
    sizes=("w16", "w32", "w64"),
    budgets=(4e12, 1e12),
    shapes=Shapes(head_dim=8, layers=8),
    rules=Rules(lr=4e-3, lr_width=32, lr_power=1.0),
    overrides={"batch_size": 4},
    speed=1e10,
)
