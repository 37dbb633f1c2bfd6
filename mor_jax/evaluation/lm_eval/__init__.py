"""Runs EleutherAI's lm-evaluation-harness on models of this project; docs/evaluation.md.

`mor evaluate --tasks=` runs it. `lm_eval` itself is imported by `model`, `tasks` and
`command` alone.
"""
