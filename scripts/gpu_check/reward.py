"""The reward of the fixture's runs."""


def vowels(prompts: list[str], responses: list[str]) -> list[float]:
    """The share of vowels, which depends on every character."""
    return [sum(letter in "aeiou" for letter in text) / max(1, len(text)) for text in responses]
