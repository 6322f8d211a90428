"""CE-GPPO (arXiv 2509.20712) on Megatron-Core models with SGLang rollouts."""

__version__ = "0.1.0"
