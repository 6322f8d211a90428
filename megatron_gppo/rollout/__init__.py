"""Rollouts: SGLang servers, generation over HTTP, rewards, and the recording of what they gave.

Imports nothing: reward workers start through this package and must not load torch.
"""
