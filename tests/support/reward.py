"""A reward for random models: something that their answers differ in, and that training can raise."""


def share_of_letters(response: str, ground_truth: str, data_source: str) -> float:
    return sum(character.isalpha() for character in response) / max(len(response), 1)
