"""What the study trains, the family whose learning rates each method takes, and what the search for these found."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

from torch import nn

from ..demo.run import BUDGETS
from .projectors import (
    AveragePoolingProjector,
    GatedProjector,
    GateOneProjector,
    MlpProjector,
    ResamplerProjector,
    TokenPackerProjector,
)


DEMO = Path(__file__).parents[1] / "demo"
BACKBONES = {part: DEMO / "backbones" / part for part in ("vision_tower", "language_model")}
TOWER, LANGUAGE_MODEL = (json.loads((folder / "config.json").read_text("utf-8")) for folder in BACKBONES.values())
NUM_LAYERS = LANGUAGE_MODEL["num_hidden_layers"]
ALL_PATCHES = max(BUDGETS)
COMPRESSED = BUDGETS[1:]
FASTV_LAYERS = (1, 2)
CASCADES = ((4, 36), (16, 144))
CASCADE_METHODS = ("residual", "average-pooling")
RATES = (1 / 9, 1 / 3, 1, 3)
SEARCH_SEED = 100
# Linear layers start with a standard deviation of 0.02, by which one scales by 0.64 at CLIP-L's 1024 channels, but by
# less at the demo's width. With these it scales by 0.64 here, too, so that deep projectors start no fainter than there.
WIDE_INIT = 0.02 * (1024 / TOWER["hidden_size"]) ** 0.5
NO_DROP_PATH = {"attention_drop_path": 0.0, "convolution_drop_path": 0.0, "mlp_drop_path": 0.0}
RESIDUAL = {"projector_variant": "residual"}


@dataclass(frozen=True)
class Method:
    """
    What is trained.

    Args:
        title (`str`): In the report.
        family (`str`): The method of `METHODS` whose learning rates it takes: itself, or its parent.
        fields (`dict`): Of `DeltaLlavaConfig`, which describe a projector of ours; without them the released one.
        projector (`type`, *optional*): Takes the place of ours.
        meteor (`dict`, *optional*): Fields of `MeteorConfig`, for the model of `meteor.py`.
        budgets (`tuple[int, ...]`): The budgets that it learns and is asked at.
    """

    title: str
    family: str
    fields: dict = field(default_factory=dict)
    projector: type[nn.Module] | None = None
    meteor: dict | None = None
    budgets: tuple[int, ...] = BUDGETS


METHODS = {
    "delta": Method("Delta-LLaVA, as released", "delta"),
    "delta-paper": Method("Delta-LLaVA, the paper's equations", "delta-paper", {"projector_variant": "paper"}),
    "delta-area": Method("Delta-LLaVA, queries by area", "delta", {"query_pooling": "area"}),
    "no-delta-projection": Method("No DeltaProjection", "delta", {"use_delta_projection": False}),
    "no-self-attention": Method("No self-attention", "delta", {"use_self_attention": False}),
    "no-refinement-block": Method("No refinement block", "delta", {"use_refinement_block": False}),
    "residual": Method("Average pooling + MLP, Delta added (ours)", "residual", RESIDUAL),
    "residual-no-delta-projection": Method(
        "Ours, no DeltaProjection", "residual", {**RESIDUAL, "use_delta_projection": False}
    ),
    "residual-no-self-attention": Method(
        "Ours, no self-attention", "residual", {**RESIDUAL, "use_self_attention": False}
    ),
    "residual-no-refinement-block": Method(
        "Ours, no refinement block", "residual", {**RESIDUAL, "use_refinement_block": False}
    ),
    "residual-gated": Method("Ours, added before the MLP (learnt gate)", "residual", RESIDUAL, GatedProjector),
    "residual-gate-one": Method("Ours, added before the MLP (gate of one)", "residual", RESIDUAL, GateOneProjector),
    "average-pooling": Method("Average pooling + MLP (M3)", "average-pooling", projector=AveragePoolingProjector),
    "tokenpacker": Method("TokenPacker", "tokenpacker", projector=TokenPackerProjector),
    "resampler": Method("Learnt queries (MQT)", "resampler", projector=ResamplerProjector),
    "mlp": Method("MLP on all patches (LLaVA-1.5)", "mlp", projector=MlpProjector, budgets=(ALL_PATCHES,)),
    "meteor": Method("After LLaVA-Meteor's abstract", "meteor", meteor={}),
    "meteor-no-instruction": Method(
        "After LLaVA-Meteor's abstract, no instruction", "meteor", meteor={"use_instruction": False}
    ),
    "meteor-no-local-summaries": Method(
        "After LLaVA-Meteor's abstract, no local summaries", "meteor", meteor={"scan": "window"}
    ),
    "meteor-visual-expert": Method(
        "After LLaVA-Meteor's abstract, visual expert only", "meteor", meteor={"experts": "visual"}
    ),
    "meteor-native-expert": Method(
        "After LLaVA-Meteor's abstract, native expert only", "meteor", meteor={"experts": "native"}
    ),
    "delta-wide-init": Method("Delta-LLaVA, wider first weights", "delta", {"initializer_range": WIDE_INIT}),
    "delta-wide-init-no-drop-path": Method(
        "Delta-LLaVA, wider first weights, no drop path", "delta", {"initializer_range": WIDE_INIT, **NO_DROP_PATH}
    ),
    "average-pooling-wide-init": Method(
        "Average pooling + MLP, wider first weights",
        "average-pooling",
        {"initializer_range": WIDE_INIT},
        AveragePoolingProjector,
    ),
    **{
        f"only-{budget}": Method(f"Delta-LLaVA for {budget} tokens only", "delta", budgets=(budget,))
        for budget in BUDGETS
    },
}
# FastV needs no training: it is measured on the runs of "mlp"
LINES = {name: method.title for name, method in METHODS.items() if not name.startswith("only")}
LINES |= {f"fastv-{layer}": f"MLP and FastV after layer {layer} of {NUM_LAYERS}" for layer in FASTV_LAYERS}
LINES["specialists"] = "Delta-LLaVA, a checkpoint for each budget"


def line_of(method: str) -> str:
    """The line of the report that a method's own figures fill."""
    return "specialists" if method.startswith("only") else method


def search_scores(search: Iterable[dict]) -> dict[str, dict[float, float]]:
    """`{family: {rate: accuracy}}`, from 0 to 1: the mean over budgets on the validation split."""
    found = {}
    for row in search:
        if row["times_steps"] == 1:
            found.setdefault(row["method"], {})[row["rate"]] = mean(row["validation"].values())
    return found


def choose_rates(search: Iterable[dict]) -> dict[str, float]:
    """The best rate of each family for which all have been tried; of equal ones, the lowest."""
    scores = search_scores(search)
    return {family: max(RATES, key=by_rate.get) for family, by_rate in scores.items() if len(by_rate) == len(RATES)}
