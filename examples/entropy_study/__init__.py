"""Compares the entropy dynamics of GRPO, DAPO and CE-GPPO on the quick start's model. Start with run.py."""
