"""The report says of a study's figures what they allow it to say, however many there are yet."""

import re

import pytest
from PIL import Image
from transformers import AutoConfig

from delta_llava.demo.run import BUDGETS
from delta_llava.demo.scenes import QUESTION_TYPES
from delta_llava.study import report
from delta_llava.study.methods import BACKBONES, LINES, METHODS, RATES
from delta_llava.study.report import CLAIMS, mean_tokens, write_report


# 24 questions, of each type two whose answer is the most frequent one
QUESTIONS = [
    {"type": question_type, "size": size, "answer": answer}
    for question_type in QUESTION_TYPES
    for size, answer in (("small", "cat"), ("small", "cat"), ("big", "bus"), (None, "pear"))
]


def row_of(name, seed, share):
    """Of a run that answers a share of all questions at every budget, less of small things and of the new design."""
    cells = {
        str(budget): {
            "accuracy": share,
            "by_size": {"small": share / 2, "big": share},
            "design": share / 3,
            "flops": 10**6 * budget,
        }
        for budget in BUDGETS
    }
    cascades = {
        "4-36": {"accuracy": share, "visual_tokens": 10 + seed, "threshold": -1},
        "16-144": {"accuracy": share, "visual_tokens": 60, "threshold": -1},
    }
    return {"method": name, "seed": seed, "seconds": 60, "lines": {name: cells}, "cascades": cascades}


def search_row(family, rate, share, times_steps=1):
    validation = {str(budget): share for budget in METHODS[family].budgets}
    return {"method": family, "rate": rate, "times_steps": times_steps, "validation": validation}


@pytest.fixture
def report_of(tmp_path):
    def write(search=(), **shares):
        rows = [
            row_of(name.replace("_", "-"), seed, share)
            for name, of_seeds in shares.items()
            for seed, share in enumerate(of_seeds)
        ]
        write_report(list(search), rows, 12, QUESTIONS, {"train_scenes": 5}, tmp_path)
        return (tmp_path / "RESULTS.md").read_text()

    return write


def section(text, title):
    return text.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]


def test_the_report_has_means_and_spreads(report_of, tmp_path):
    text = report_of(delta=(0.80, 0.81, 0.82), mlp=(0.9,))
    delta = "| Delta-LLaVA, as released |" + " {} |" * 6
    for title, cell in (
        ("All questions", "81.0 ± 1.0"),
        ("Small things", "40.5 ± 0.5"),
        ("Big things", "81.0 ± 1.0"),
        ("The held-out design", "27.0 ± 0.3"),
    ):
        assert delta.format(*[cell] * 6) in section(text, title)
    assert "| MLP on all patches (LLaVA-1.5) | 90.0 |" in text  # of one seed there is no spread
    assert delta.format(*BUDGETS) in section(text, "FLOPs of an answer")
    assert "percent of 24 held-out questions" in text and "answer of each type would give 50.0" in text
    assert "12 questions about" in section(text, "Small things") and "6 questions" in section(text, "Big things")
    assert "4 of 12 runs are finished (seeds 0, 1, 2), 1.0 minutes each" in text
    assert "LLaVA-Meteor's abstract is our reading of that abstract, not a reproduction" in text
    picture = Image.open(tmp_path / "RESULTS.png")
    assert picture.width > 1000 and len(picture.convert("L").getcolors()) > 10


def test_a_report_can_be_written_before_the_first_run(report_of):
    text = report_of(search=[search_row("delta", 1, 0.5)])
    assert "0 of 12 runs are finished (seeds none yet)" in text
    assert "| Delta-LLaVA, as released |  |  | 50.0 |  |" in text
    assert "Ahead in the paper, not measured here (10)" in text


def test_a_claim_holds_only_where_its_interval_excludes_zero(report_of):
    # Delta-LLaVA less the other, seed by seed: 10, 11 and 12 points; -5, -4 and -3; -3, 0 and 3
    text = report_of(
        delta=(0.80, 0.81, 0.82),
        tokenpacker=(0.70, 0.70, 0.70),
        average_pooling=(0.85, 0.85, 0.85),
        resampler=(0.83, 0.81, 0.79),
        no_self_attention=(0.75, 0.76, 0.77),
        delta_paper=(0.5,),
    )
    # t(0.975, 2) = 4.3027 standard errors, of 1/√3 and 3/√3 points
    few = "36, 16, 9, 4, 1"
    for row in (
        f"| Delta-LLaVA against TokenPacker | {few} | ahead (table 1) | ahead | **+11.0 ± 2.5** |",
        f"| Delta-LLaVA against average pooling | {few} | ahead (of M3, table 1) | behind | **-4.0 ± 2.5** |",
        f"| Delta-LLaVA against learnt queries | {few} | ahead (of MQT, table 1) | not distinguishable | +0.0 ± 7.5 |",
        "| TokenPacker | **-11.0 ± 2.5** |",
        # Where all seeds differ by the same, or there is but one, nothing can be said of chance
        f"| With self-attention against without | {few} | ahead (table 3) | not distinguishable | +5.0 |",
        f"| The released projector against the paper's equations | {few} | not asked | not distinguishable | +30.0 |",
        f"| With DeltaProjection against without | {few} | ahead (table 3) | not measured |  |",
        "- Ahead in the paper and here (1): Delta-LLaVA against TokenPacker.",
        "- Ahead in the paper, behind here (1): Delta-LLaVA against average pooling.",
        "- Ahead in the paper, not distinguishable here (2): Delta-LLaVA against learnt queries; With self-attention",
    ):
        assert row in text


def test_each_budget_says_what_is_ahead_of_average_pooling(report_of):
    text = report_of(
        average_pooling=(0.80, 0.80, 0.80),
        residual=(0.85, 0.86, 0.87),
        tokenpacker=(0.70, 0.71, 0.72),
        resampler=(0.78, 0.80, 0.82),
        delta=(0.9,),
    )
    sentences = re.findall(r"^- .*", section(text, "What is ahead of average pooling"), re.MULTILINE)
    assert [int(re.search(r"At (\d+)", sentence)[1]) for sentence in sentences] == list(BUDGETS)
    assert sentences[0] == (
        "- **At 144**, ahead: Average pooling + MLP, Delta added (ours). Not distinguishable: Delta-LLaVA, as "
        "released; Learnt queries (MQT). Behind: 1."
    )
    differences = section(text, "What is ahead of average pooling")
    assert "| Average pooling + MLP, Delta added (ours) | **+6.0 ± 2.5** |" in differences
    assert "| TokenPacker | **-9.0 ± 2.5** |" in differences and "| Average pooling + MLP (M3) |" not in differences


def test_the_search_and_convergence_are_reported(report_of):
    rates = [search_row("delta", rate, share) for rate, share in zip(RATES, (0.4, 0.5, 0.7, 0.7), strict=True)]
    rates += [
        search_row("average-pooling", rate, share) for rate, share in zip(RATES, (0.4, 0.5, 0.6, 0.8), strict=True)
    ]
    text = section(report_of(search=rates), "Learning rates")
    assert "| family | 0.11 | 0.33 | 1 | 3 |" in text
    assert "| Delta-LLaVA, as released | 40.0 | 50.0 | **70.0** | 70.0 |" in text  # of equal ones, the lowest
    assert "twice" not in text
    text = report_of(search=[*rates, search_row("average-pooling", 3, 0.815, times_steps=2)])
    assert "| Average pooling + MLP (M3) | 40.0 | 50.0 | 60.0 | **80.0** |" in text
    assert "lowest or the highest one tried of: Average pooling + MLP (M3)." in text
    assert "answers 81.5 % of the validation split at 144 visual tokens, +1.5 points against 80.0 %" in text


def test_a_cascade_is_between_its_two_budgets(report_of):
    text = section(report_of(residual=(0.8, 0.82)), "Cascades")
    ours = "| Average pooling + MLP, Delta added (ours) |"
    assert text.splitlines()[5:8] == [
        f"{ours} 4 | 81.0 ± 1.4 | 4 |",
        f"{ours} 4, then 36 where unsure | 81.0 ± 1.4 | 10.5 ± 0.7 |",
        f"{ours} 36 | 81.0 ± 1.4 | 36 |",
    ]


def test_the_picture_draws_accuracy_against_flops(report_of, monkeypatch):
    figures = []
    monkeypatch.setattr(report.Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    report_of(delta=(0.8, 0.9), residual=(0.9, 0.9), residual_gate_one=(0.8, 0.9))
    axis = figures[0].axes[1]
    assert "FLOPs" in axis.get_xlabel()
    assert axis.containers[0].lines[0].get_xdata().tolist() == sorted(BUDGETS)
    assert [len(axis.containers) for axis in figures[0].axes] == [2, 2, 2, 1, 0, 1]


def test_fastv_is_compared_at_equal_tokens_in_a_layer_too():
    layers = AutoConfig.from_pretrained(BACKBONES["language_model"]).num_hidden_layers
    assert mean_tokens(1, 36) == (144 + (layers - 1) * 36) / layers
    assert LINES["fastv-1"] == f"MLP and FastV after layer 1 of {layers}"
    claim = next(claim for claim in CLAIMS if "no more tokens in a layer" in claim.text)
    assert claim.theirs[0] == ("fastv-1", 36)
    assert [budget for _, budget in claim.ours] == [
        max(budget for budget in BUDGETS if budget <= mean_tokens(1, kept)) for kept in BUDGETS[1:]
    ]
