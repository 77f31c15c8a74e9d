"""The demo's figures are what was answered, and its picture shows them."""

import numpy as np
from PIL import Image

from delta_llava.demo import run, scenes


def questions():
    """A question of each type about each of two scenes, half of them about small things."""
    return [
        {"image": f"{scene}.png", "type": name, "question": f"{name}?", "answer": "yes", "size": size}
        for scene, size in enumerate(("small", "big"))
        for name in scenes.QUESTION_TYPES
    ]


def test_scores_are_shares_of_exact_answers():
    answers = ["yes"] * 6 + ["yes", "no", "yes.", "Yes", "yes", "yes"]
    scores = run.score(questions(), answers)
    assert scores["accuracy"] == 9 / 12
    assert scores["by_size"] == {"small": 1.0, "big": 0.5}
    assert scores["by_type"]["thing"] == 1.0 and scores["by_type"]["place"] == 0.5
    assert run.majority_answers(questions()) == ["yes"] * 12


def test_the_report_has_all_figures_and_a_picture(tmp_path):
    rows = questions()
    (tmp_path / "scenes" / "images").mkdir(parents=True)
    for row in rows:
        Image.new("RGB", (96, 96), "green").save(tmp_path / "scenes" / "images" / row["image"])
    answers = {str(budget): ["yes" if budget > 1 else "no"] * 12 for budget in run.BUDGETS}
    scored = {budget: run.score(rows, given) for budget, given in answers.items()}
    report = {
        "budgets": {b: {"held_out": s, "held_out_design": s, "flops": 1e6 * int(b)} for b, s in scored.items()},
        "majority_baseline": scored["1"],
        "untrained_projector": scored["1"],
    }
    lines = run.table(report).splitlines()
    assert lines[1].split()[:2] == ["144", "100.0%"] and lines[1].split()[-1] == "144"
    assert lines[6].split() == ["1", *["0.0%"] * 10, "1"]
    assert [rows[index]["size"] for index in run.shown_questions(rows, answers)] == ["small", "big"]
    run.draw(report, rows, answers, tmp_path)
    picture = np.asarray(Image.open(tmp_path / "report.png").convert("L"))
    thirds = np.array_split(picture, 3, axis=1)
    assert all(third.std() > 10 for third in thirds)  # no blank third
