"""The quick start's reward, named in config.yaml as reward.function."""


def exact_integer(response: str, ground_truth: str, data_source: str) -> float:
    """1.0 if the whole response is the integer ground_truth in plain digits, otherwise 0.0.

    A model that may pad its answer learns to pad it, so neither spaces nor leading zeros nor further text are let pass.
    """
    return float(response == ground_truth)
