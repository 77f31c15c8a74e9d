"""Training data in LLaVA's format, for tests to vary."""


def turns(*values, speakers=("human", "gpt")):
    """Turns from the speakers in alternation."""
    return [{"from": speakers[index % 2], "value": value} for index, value in enumerate(values)]


def record(*values, **changes):
    """A good record about `a.png`, with other turns and whatever else a test wants different."""
    return {
        "id": "0",
        "image": "a.png",
        "conversations": turns(*(values or ("<image>\nWhat?", "A square."))),
        **changes,
    }
