"""Runs EleutherAI's lm-evaluation-harness on models of this project; docs/evaluation.md.

`launch/evaluate.py --tasks=` runs it. `lm_eval` itself is imported by `model`, `tasks` and
`command` alone.
"""
