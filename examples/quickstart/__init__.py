"""Teaches a tiny Qwen2 two-digit addition with CE-GPPO on a CPU. Start with run.py."""
