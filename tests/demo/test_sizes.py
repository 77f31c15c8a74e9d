"""Small pictures at the budget of their size: what the comparison prints is what was asked."""

import re

import pytest

from delta_llava.demo import evaluate, scenes, sizes


def test_each_size_is_asked_about_at_both_budgets(checkpoint, tmp_path, monkeypatch, capsys):
    scenes.write_scenes(tmp_path / "scenes", train_scenes=0, held_out_scenes=3)
    asked = []

    def answer(model, processor, images, questions, budget, **options):
        asked.append((images[0].size, budget))
        return ["nothing" if budget else "one"] * len(questions)

    monkeypatch.setattr(evaluate, "answer", answer)
    sizes.main(["--checkpoint", str(checkpoint), "--scenes", str(tmp_path / "scenes"), "--sizes", "96", "9"])
    assert asked == [((96, 96), None), ((96, 96), "auto"), ((9, 9), None), ((9, 9), "auto")]
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if re.match(r"\| \d", line)]
    assert [row[:3] for row in rows] == [["96", "36", "36"], ["9", "36", "9"]]
    for *_, default, auto, difference in rows:
        assert default != auto
        assert float(difference) == pytest.approx(float(auto.rstrip("%")) - float(default.rstrip("%")), abs=0.11)
