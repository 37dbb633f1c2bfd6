"""EleutherAI's lm-evaluation-harness on this project's models, in process. docs/evaluation.md.

`launch/evaluate.py --tasks=` runs it. `lm_eval` itself is imported by `model`, `tasks` and
`command` alone.
"""
