"""Rollouts: SGLang servers, generation over HTTP, rewards, and the recording of what they gave."""
