"""Rollouts: prompts in, token ids with log-probabilities out, behind one protocol for every engine.

    Record --Encoder--> Prompt --RolloutEngine--> Rollout (ids, log-probabilities, loss mask, branch)

Importing this package imports neither torch nor transformers.
"""
