"""Writes `RESULTS.md` and `RESULTS.png` of a study from its rows, as far as they have come."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from matplotlib.figure import Figure
from scipy.stats import ttest_rel

from ..demo.run import BUDGETS, majority_answers, score
from .methods import (
    ALL_PATCHES,
    CASCADE_METHODS,
    CASCADES,
    COMPRESSED,
    FASTV_LAYERS,
    LINES,
    METHODS,
    NUM_LAYERS,
    RATES,
    choose_rates,
    search_scores,
)


Shares = dict[str, dict[int, dict[int, float]]]  # {line: {budget: {seed: percent}}}


def write_report(
    search: list[dict], rows: list[dict], planned: int, questions: list[dict], settings: dict, output_dir: Path
):
    """
    Write the report of the rows there are.

    Args:
        search, rows (`list[dict]`): Of `rates.jsonl` and `rows.jsonl`, as [`~delta_llava.study.run.execute`] returns
            them.
        planned (`int`): How many rows the study will have.
        questions (`list[dict]`): The held-out ones.
        settings (`dict`): Of all runs.
        output_dir (`Path`): Folder of `RESULTS.md` and `RESULTS.png`.
    """
    majority = score(questions, majority_answers(questions))["accuracy"]
    sizes = Counter(row["size"] for row in questions)
    everything = _collect(rows, lambda cell: 100 * cell["accuracy"])
    small, big = (_collect(rows, lambda cell, size=size: 100 * cell["by_size"][size]) for size in ("small", "big"))
    design = _collect(rows, lambda cell: 100 * cell["design"])
    flops = {
        line: {budget: mean(by_seed.values()) for budget, by_seed in budgets.items()}
        for line, budgets in _collect(rows, lambda cell: cell["flops"] / 1e6).items()
    }
    kept = ", ".join(
        f"{mean_tokens(layer, max(COMPRESSED)):.1f} to {mean_tokens(layer, 1):.1f} after layer {layer}"
        for layer in FASTV_LAYERS
    )
    seeds = ", ".join(str(seed) for seed in sorted({row["seed"] for row in rows})) or "none yet"
    minutes = f", {mean(row['seconds'] for row in rows) / 60:.1f} minutes each on average" if rows else ""

    def spreads(shares):
        return _table(shares, lambda line, budget: _spread(shares[line].get(budget, {})))

    def differences(base):
        others = [line for line in everything if line != base and base in everything]
        return _table(
            others,
            lambda line, budget: str(compare(everything[line].get(budget, {}), everything[base].get(budget, {})) or ""),
        )

    text = [
        "# Study",
        f"Written by `python -m delta_llava.study.run`: {len(rows)} of {planned} runs are finished (seeds {seeds})"
        f"{minutes}. Settings: " + ", ".join(f"{key} {value}" for key, value in settings.items()) + ". Figures are "
        f"percent of {len(questions)} held-out questions answered exactly, mean over seeds ± standard deviation; the "
        f"most frequent answer of each type would give {100 * majority:.1f}. A budget is a number of visual tokens.",
        "![Accuracy against visual tokens and FLOPs](RESULTS.png)",
        "## What is ahead of average pooling",
        "Average pooling is the simplest projector with budgets. A method is ahead or behind where the 95 % interval "
        "of its difference, seed by seed and in points, excludes zero, which one in twenty does by chance. The "
        "interval (Student's t) covers chance in training only: the questions are the same for all.",
        "\n".join(_against_pooling(everything)),
        "Each difference is a mean and half the width of its interval. Bold: it excludes zero.",
        differences("average-pooling"),
        "## What holds of the paper's claims here",
        _in_words(everything),
        "Each row compares each seed's mean over the budgets named.",
        "| | visual tokens | the paper | here | points |\n|---|---|---|---|---|\n"
        + "\n".join(claim.row(everything) for claim in CLAIMS),
        "## All questions",
        spreads(everything),
        "## Small things",
        f"{sizes['small']} questions about a thing that fills one of the 4 x 4 places.",
        spreads(small),
        "## Big things",
        f"{sizes['big']} questions about a thing that fills a quadrant.",
        spreads(big),
        "## The held-out design",
        "All questions about scenes in a design that no training has seen.",
        spreads(design),
        "## FLOPs of an answer",
        "In millions, of one question: tower, projector, prefill and an answer as long as the right one. What torch's "
        "`FlopCounterMode` counts as it runs: matrix products and convolutions.",
        _table(flops, lambda line, budget: f"{flops[line][budget]:.0f}" if budget in flops[line] else ""),
        "## Cascades",
        "The smaller budget's answer where the model is sure of it, else the larger one's. The threshold is chosen on "
        "the validation split: the most accurate one that costs at most half of the larger budget. Visual tokens are "
        "those of both passes.",
        _cascade_table(rows, everything),
        "## Difference to Delta-LLaVA, as released",
        "As above, in points on all questions.",
        differences("delta"),
        "## Learning rates",
        "Percent of the validation split, mean over budgets, with one seed, at so many times the rates of the demo's "
        "recipes. Every method takes the best rate of its family (bold), so an ablation takes its parent's.",
        _search_table(search),
        _at_the_edge(search),
        _convergence(search),
        "## Notes",
        "\n".join(
            f"- {note}"
            for note in (
                "In the released projector the shared weight can express what the low-rank update does: without "
                "DeltaProjection it learns the same functions, in another way.",
                "A method with one budget spends all its steps there, an elastic one a part of them at each budget: "
                f"checkpoints for one budget train {len(BUDGETS)} times as long in all.",
                f"At {ALL_PATCHES} visual tokens each query of the released projector sees one patch. What makes the "
                "queries, self-attention and refinement block included, changes no token there, so the claims leave "
                "that budget out.",
                "FastV computes all tokens in its first layers: with "
                f"{max(COMPRESSED)} to 1 kept, a layer has {kept} visual tokens on average. Published models have 32 "
                "layers and drop tokens after the second.",
                "What is named after LLaVA-Meteor's abstract is our reading of that abstract, not a reproduction: its "
                "figures say nothing about the original.",
                "Ours adds Delta to the MLP's tokens, by a linear map that starts at zero. Added before the MLP it has "
                "no such map, but a gate: learnt from zero, or of one, which adds it whole from the first step.",
                "With wider first weights a linear layer scales its input as it does at CLIP-L's width, not more "
                "faintly.",
            )
        ),
    ]
    (output_dir / "RESULTS.md").write_text("\n\n".join(filter(None, text)) + "\n", encoding="utf-8")
    draw(everything, small, big, flops, majority, output_dir / "RESULTS.png")


def mean_tokens(layer: int, num_visual_tokens: int, num_layers: int = NUM_LAYERS) -> float:
    """Visual tokens in a layer on average, if FastV keeps this many after layer `layer`; by default of the demo's."""
    return (layer * ALL_PATCHES + (num_layers - layer) * num_visual_tokens) / num_layers


def _collect(rows: list[dict], value: Callable[[dict], float]) -> Shares:
    """What a function makes of each cell of the rows, in the order of `LINES`."""
    found = {}
    for row in rows:
        for line, budgets in row["lines"].items():
            for budget, cell in budgets.items():
                found.setdefault(line, {}).setdefault(int(budget), {})[row["seed"]] = value(cell)
    return {line: found[line] for line in LINES if line in found}


def _table(lines: Iterable[str], cell) -> str:
    """A Markdown table with a column for each budget."""
    head = ["| visual tokens | " + " | ".join(map(str, BUDGETS)) + " |", "|---" * (len(BUDGETS) + 1) + "|"]
    return "\n".join(
        head + [f"| {LINES[line]} | " + " | ".join(cell(line, budget) for budget in BUDGETS) + " |" for line in lines]
    )


def _spread(by_seed: dict[int, float]) -> str:
    if len(by_seed) < 2:
        return "".join(f"{value:.1f}" for value in by_seed.values())
    return f"{mean(by_seed.values()):.1f} ± {stdev(by_seed.values()):.1f}"


def _search_table(search: list[dict]) -> str:
    scores, chosen = search_scores(search), choose_rates(search)
    head = ["| family | " + " | ".join(f"{rate:.2g}" for rate in RATES) + " |", "|---" * (len(RATES) + 1) + "|"]
    for family, by_rate in scores.items():
        cells = [f"{100 * by_rate[rate]:.1f}" if rate in by_rate else "" for rate in RATES]
        bold = [f"**{cell}**" if rate == chosen.get(family) else cell for rate, cell in zip(RATES, cells, strict=True)]
        head.append(f"| {METHODS[family].title} | " + " | ".join(bold) + " |")
    return "\n".join(head)


def _at_the_edge(search: list[dict]) -> str:
    """The families for which a rate beyond those that were tried might be better."""
    edges = [METHODS[name].title for name, rate in choose_rates(search).items() if rate in (RATES[0], RATES[-1])]
    return f"The best rate is the lowest or the highest one tried of: {_joined(edges)}."


def _convergence(search: list[dict]) -> str:
    """Whether average pooling gains by more training; empty before that is known."""
    rate = choose_rates(search).get("average-pooling")
    found = {row["times_steps"]: row for row in search if (row["method"], row["rate"]) == ("average-pooling", rate)}
    if 2 not in found:
        return ""
    once, twice = (100 * found[times]["validation"][str(ALL_PATCHES)] for times in (1, 2))
    return (
        f"Average pooling with twice the steps of both stages answers {twice:.1f} % of the validation split at "
        f"{ALL_PATCHES} visual tokens, {twice - once:+.1f} points against {once:.1f} % (one seed)."
    )


def _cascade_table(rows: list[dict], everything: Shares) -> str:
    """Accuracy and mean visual tokens of each cascade between those of its two budgets."""
    lines = ["| | asked at | percent | mean visual tokens |", "|---|---|---|---|"]
    for method in CASCADE_METHODS:
        for small, large in CASCADES:
            found = {row["seed"]: row["cascades"][f"{small}-{large}"] for row in rows if row["method"] == method}
            if not found:
                continue
            for budget in (small, large):
                lines.append(f"| {LINES[method]} | {budget} | {_spread(everything[method][budget])} | {budget} |")
            accuracy = {seed: 100 * of_seed["accuracy"] for seed, of_seed in found.items()}
            tokens = {seed: of_seed["visual_tokens"] for seed, of_seed in found.items()}
            asked = f"{small}, then {large} where unsure"
            lines.insert(-1, f"| {LINES[method]} | {asked} | {_spread(accuracy)} | {_spread(tokens)} |")
    return "\n".join(lines)


@dataclass(frozen=True)
class Difference:
    """
    Mean over seeds of what one has more than another, in points, and half the width of its 95 % interval; `None` where
    there is none: with one seed, or with seeds that all differ by the same.
    """

    points: float
    half_width: float | None

    @property
    def sign(self) -> int:
        """1 or -1 if the interval excludes zero, else 0."""
        if self.half_width is None or abs(self.points) <= self.half_width:
            return 0
        return 1 if self.points > 0 else -1

    def __str__(self) -> str:
        text = f"{self.points:+.1f}" + ("" if self.half_width is None else f" ± {self.half_width:.1f}")
        return f"**{text}**" if self.sign else text


def compare(ours: dict[int, float], theirs: dict[int, float]) -> Difference | None:
    """Percent by seed, of the seeds that both have; `None` where there is none."""
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    a, b = ([line[seed] for seed in seeds] for line in (ours, theirs))
    points = [x - y for x, y in zip(a, b, strict=True)]
    if max(points) - min(points) < 1e-9:
        return Difference(mean(points), None)
    low, high = ttest_rel(a, b).confidence_interval(0.95)
    return Difference(mean(points), (high - low) / 2)


@dataclass(frozen=True)
class Claim:
    """
    A comparison of means over cells of the table, (line, budget): `ours` against `theirs`.

    The paper's word on it is "ahead (…)" where it claims that `ours` is.
    """

    text: str
    paper: str
    ours: tuple[tuple[str, int], ...]
    theirs: tuple[tuple[str, int], ...]

    def compare(self, shares: dict) -> Difference | None:
        """Of `{line: {budget: {seed: percent}}}`; `None` where no seed has all the cells."""
        return compare(*(_mean_over(cells, shares) for cells in (self.ours, self.theirs)))

    def row(self, shares: dict) -> str:
        """Of the table, with no more said than the seeds allow."""
        difference = self.compare(shares)
        here = "not measured" if difference is None else ("not distinguishable", "ahead", "behind")[difference.sign]
        budgets = (dict.fromkeys(str(budget) for _, budget in cells) for cells in (self.ours, self.theirs))
        places = " against ".join(dict.fromkeys(", ".join(names) for names in budgets))
        return f"| {self.text} | {places} | {self.paper} | {here} | {difference or ''} |"


def _joined(names: list[str]) -> str:
    return "; ".join(names) or "none"


def _against_pooling(everything: Shares) -> Iterable[str]:
    """A line for each budget: what is ahead of average pooling, what may be, and how much is behind."""
    for budget in BUDGETS:
        pooling = everything.get("average-pooling", {}).get(budget, {})
        found = {1: [], -1: [], 0: []}
        for line, budgets in everything.items():
            difference = compare(budgets.get(budget, {}), pooling)
            if difference is not None and line != "average-pooling":
                found[difference.sign].append(LINES[line])
        yield (
            f"- **At {budget}**, ahead: {_joined(found[1])}. Not distinguishable: {_joined(found[0])}. Behind: "
            f"{len(found[-1])}."
        )


def _in_words(everything: Shares) -> str:
    """Which of the paper's claims hold."""
    found = {1: [], -1: [], 0: [], None: []}
    for claim in CLAIMS:
        if claim.paper.startswith("ahead"):
            difference = claim.compare(everything)
            found[None if difference is None else difference.sign].append(claim.text)
    return "\n".join(
        f"- {verdict} ({len(found[sign])}): {_joined(found[sign])}."
        for sign, verdict in (
            (1, "Ahead in the paper and here"),
            (-1, "Ahead in the paper, behind here"),
            (0, "Ahead in the paper, not distinguishable here"),
            (None, "Ahead in the paper, not measured here"),
        )
    )


def _mean_over(cells: tuple[tuple[str, int], ...], shares: dict) -> dict[int, float]:
    """By seed, of those that have all the cells."""
    found = [shares.get(line, {}).get(budget, {}) for line, budget in cells]
    seeds = set.intersection(*(set(by_seed) for by_seed in found))
    return {seed: mean(by_seed[seed] for by_seed in found) for seed in seeds}


def _cells(line: str, budgets: Iterable[int] = COMPRESSED) -> tuple[tuple[str, int], ...]:
    return tuple((line, budget) for budget in budgets)


def _lines(text: str, paper: str, ours: str, theirs: str, budgets: Iterable[int] = COMPRESSED) -> Claim:
    return Claim(text, paper, _cells(ours, budgets), _cells(theirs, budgets))


def _affordable(layer: int) -> list[int]:
    """For each number of tokens that FastV keeps, the largest budget with no more tokens in a layer on average."""
    return [max(b for b in BUDGETS if b <= mean_tokens(layer, kept)) for kept in COMPRESSED]


ALL_PATCHES_CELL = (("mlp", ALL_PATCHES),)
CLAIMS = (
    _lines("Delta-LLaVA against TokenPacker", "ahead (table 1)", "delta", "tokenpacker"),
    _lines("Delta-LLaVA against average pooling", "ahead (of M3, table 1)", "delta", "average-pooling"),
    _lines("Delta-LLaVA against learnt queries", "ahead (of MQT, table 1)", "delta", "resampler"),
    *(
        Claim("Delta-LLaVA against all patches (MLP)", "loses little (table 1)", (("delta", b),), ALL_PATCHES_CELL)
        for b in COMPRESSED
    ),
    _lines("With DeltaProjection against without", "ahead (table 3)", "delta", "no-delta-projection"),
    _lines("With self-attention against without", "ahead (table 3)", "delta", "no-self-attention"),
    _lines("With the refinement block against without", "ahead (table 3)", "delta", "no-refinement-block"),
    _lines("No self-attention against no DeltaProjection", "ahead (§6.2)", "no-self-attention", "no-delta-projection"),
    _lines(
        "No refinement block against no DeltaProjection", "ahead (§6.2)", "no-refinement-block", "no-delta-projection"
    ),
    *(
        _lines(
            f"Delta-LLaVA against FastV after layer {k}, as many tokens kept", "ahead (table 6)", "delta", f"fastv-{k}"
        )
        for k in FASTV_LAYERS
    ),
    *(
        Claim(
            f"Delta-LLaVA against FastV after layer {k}, no more tokens in a layer on average",
            "not asked",
            _cells("delta", _affordable(k)),
            _cells(f"fastv-{k}"),
        )
        for k in FASTV_LAYERS
    ),
    *(_lines("Ours against average pooling", "not asked", "residual", "average-pooling", [b]) for b in BUDGETS),
    _lines("Ours against Delta-LLaVA as released", "not asked", "residual", "delta"),
    *(
        _lines(f"Ours with {part}", "not asked", "residual", f"residual-{without}")
        for part, without in (
            ("DeltaProjection against without", "no-delta-projection"),
            ("self-attention against without", "no-self-attention"),
            ("the refinement block against without", "no-refinement-block"),
        )
    ),
    _lines("Ours against Delta added before the MLP, as it is", "not asked", "residual", "residual-gate-one"),
    _lines("Ours against Delta added before the MLP, by a learnt gate", "not asked", "residual", "residual-gated"),
    *(
        _lines(f"After LLaVA-Meteor's abstract against {name}", "not asked", "meteor", other)
        for name, other in (
            ("Delta-LLaVA as released", "delta"),
            ("ours", "residual"),
            ("average pooling", "average-pooling"),
            ("the same without the instruction", "meteor-no-instruction"),
            ("the same without local summaries", "meteor-no-local-summaries"),
            ("the same with the visual expert alone", "meteor-visual-expert"),
            ("the same with the native expert alone", "meteor-native-expert"),
        )
    ),
    _lines("One checkpoint for all budgets against one for each", "not asked", "delta", "specialists", BUDGETS),
    _lines("The released projector against the paper's equations", "not asked", "delta", "delta-paper"),
    _lines("Bilinear queries against queries by area", "not asked", "delta", "delta-area"),
    _lines("Wider first weights against those as released", "not asked", "delta-wide-init", "delta"),
    _lines(
        "No drop path against drop path, both with wider first weights",
        "not asked",
        "delta-wide-init-no-drop-path",
        "delta-wide-init",
    ),
    _lines(
        "Delta-LLaVA against average pooling, both with wider first weights",
        "not asked",
        "delta-wide-init",
        "average-pooling-wide-init",
    ),
)


def draw(everything: Shares, small: Shares, big: Shares, flops: dict, majority: float, file: Path):
    """Draw accuracy against visual tokens and against FLOPs, and what variants and ablations change."""
    figure = Figure(figsize=(21, 13), layout="constrained")
    projectors = ("delta", "residual", "tokenpacker", "average-pooling", "resampler", "mlp", "meteor")
    pruned = tuple(f"fastv-{layer}" for layer in FASTV_LAYERS)
    variants = ("delta-paper", "delta-area", "no-delta-projection", "no-self-attention", "no-refinement-block")
    wide = ("delta-wide-init", "delta-wide-init-no-drop-path", "specialists")
    ablations = tuple(name for name in METHODS if name.startswith("residual-"))
    axes = figure.subplots(2, 3).flat
    places = {budget: place for place, budget in enumerate(sorted(BUDGETS))}
    colors = {line: f"C{index % 10}" for index, line in enumerate((*projectors, *pruned))}

    def plot(axis, lines, shares, title, base=None, against_flops=False, suffix="", **style):
        """Means and deviations of lines, or their differences to the line `base` and the intervals of these."""
        for index, line in enumerate(lines):
            points = {}
            aside = 0 if base is None else 0.06 * (index - (len(lines) - 1) / 2)  # so that intervals do not overlap
            for budget, by_seed in sorted(shares.get(line, {}).items()):
                place = flops[line][budget] if against_flops else places[budget] + aside
                if base is None:
                    points[place] = mean(by_seed.values()), stdev(by_seed.values()) if len(by_seed) > 1 else 0
                elif difference := compare(by_seed, shares.get(base, {}).get(budget, {})):
                    points[place] = difference.points, difference.half_width or 0
            if points:
                color = {"color": colors[line]} if line in colors else {}
                axis.errorbar(
                    list(points), *zip(*points.values(), strict=True),
                    marker="o", markersize=4, capsize=2, label=LINES[line] + suffix, **color, **style,
                )  # fmt: skip
        if against_flops:
            axis.set(title=title, xlabel="FLOPs of an answer, millions", xscale="log")
            axis.xaxis.set_major_formatter("{x:.0f}")
            axis.xaxis.set_minor_formatter("{x:.0f}")
        else:
            axis.set(title=title, xlabel="visual tokens", xticks=list(places.values()), xticklabels=list(places))
        if base is None:
            axis.axhline(100 * majority, color="grey", linestyle=":")
            axis.set(ylabel="answered exactly, %\n(bars: standard deviation; dotted: most frequent answer)")
        else:
            axis.axhline(0, color="black")
            axis.set(ylabel="points (bars: 95 % interval)")
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
        else:
            axis.text(0.5, 0.5, "no runs yet", transform=axis.transAxes, ha="center", color="grey")

    plot(axes[0], projectors, everything, "Projectors, one elastic checkpoint each")
    plot(axes[1], (*projectors, *pruned), everything, "Accuracy against FLOPs", against_flops=True)
    for shares, suffix, style in ((small, ", small", "-"), (big, ", big", "--")):
        plot(axes[2], CASCADE_METHODS, shares, "Small and big things", suffix=suffix, linestyle=style)
    plot(axes[3], ("residual", "mlp", *pruned), everything, "Few tokens made by the projector, or dropped by FastV")
    plot(axes[4], (*variants, *wide), everything, "Difference to Delta-LLaVA, as released", base="delta")
    plot(axes[5], ablations, everything, f"Difference to {LINES['residual']}", base="residual")
    figure.savefig(file, dpi=80)
