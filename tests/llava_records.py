"""Training data in LLaVA's format, for tests to vary."""


def turns(*values):
    """Turns of questions and answers in alternation."""
    return [{"from": ("human", "gpt")[index % 2], "value": value} for index, value in enumerate(values)]


def record(*values, **changes):
    """A good record about `a.png`, with other turns and whatever else a test wants different."""
    return {
        "id": "0",
        "image": "a.png",
        "conversations": turns(*(values or ("<image>\nWhat?", "A square."))),
        **changes,
    }
