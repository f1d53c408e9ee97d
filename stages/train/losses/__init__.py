"""Losses: one class each, with its parameters, its equation and its paper.

A loss is a pure function of the per-token log-probs of policy and reference (logps.py) and returns
one number per pair. Training can sum several with weights, and averages over the batch.
"""

from typing import Annotated

from pydantic import AfterValidator, Discriminator, Field, Tag

from schemas.config import blocks_in
from stages.train.losses.base import PairLoss
from stages.train.losses.coupled import AotLoss, AotUnpairedLoss, BcoPairLoss, BetaDpoLoss
from stages.train.losses.differences import (
    DiscopopLoss,
    ExoPairLoss,
    HingeLoss,
    IpoLoss,
    OdpoLoss,
    RobustLoss,
    SigmoidLoss,
    SigmoidNormLoss,
)
from stages.train.losses.logps import PairLogps, SideLogps
from stages.train.losses.reference_free import OrpoLoss, SftLoss, SimpoLoss, SlicLoss
from stages.train.losses.sides import (
    ApoDownLoss,
    ApoZeroLoss,
    DpopLoss,
    NcaPairLoss,
    SppoHardLoss,
)

__all__ = [
    "LOSSES",
    "AotLoss",
    "AotUnpairedLoss",
    "ApoDownLoss",
    "ApoZeroLoss",
    "BcoPairLoss",
    "BetaDpoLoss",
    "DiscopopLoss",
    "DpopLoss",
    "ExoPairLoss",
    "HingeLoss",
    "IpoLoss",
    "Loss",
    "LossOrSum",
    "NcaPairLoss",
    "OdpoLoss",
    "OrpoLoss",
    "PairLogps",
    "PairLoss",
    "RobustLoss",
    "SftLoss",
    "SideLogps",
    "SigmoidLoss",
    "SigmoidNormLoss",
    "SimpoLoss",
    "SlicLoss",
    "SppoHardLoss",
]


def _read_kind(loss: object) -> str:
    """Read the kind from a recipe's block or a loss; sigmoid if a block has none."""
    kind = loss.get("kind", "sigmoid") if isinstance(loss, dict) else getattr(loss, "kind", loss)
    return str(kind)


def _check_kinds(losses: tuple[PairLoss, ...]) -> tuple[PairLoss, ...]:
    kinds = [loss.kind for loss in losses]
    if twice := [kind for kind in kinds if kinds.count(kind) > 1]:
        raise ValueError(f"a sum can contain each kind once; {twice[0]} occurs twice")
    return losses


Loss = Annotated[
    Annotated[SigmoidLoss, Tag("sigmoid")]
    | Annotated[SigmoidNormLoss, Tag("sigmoid_norm")]
    | Annotated[RobustLoss, Tag("robust")]
    | Annotated[HingeLoss, Tag("hinge")]
    | Annotated[IpoLoss, Tag("ipo")]
    | Annotated[ExoPairLoss, Tag("exo_pair")]
    | Annotated[DiscopopLoss, Tag("discopop")]
    | Annotated[OdpoLoss, Tag("odpo")]
    | Annotated[NcaPairLoss, Tag("nca_pair")]
    | Annotated[SppoHardLoss, Tag("sppo_hard")]
    | Annotated[ApoZeroLoss, Tag("apo_zero")]
    | Annotated[ApoDownLoss, Tag("apo_down")]
    | Annotated[DpopLoss, Tag("dpop")]
    | Annotated[AotLoss, Tag("aot")]
    | Annotated[AotUnpairedLoss, Tag("aot_unpaired")]
    | Annotated[BcoPairLoss, Tag("bco_pair")]
    | Annotated[BetaDpoLoss, Tag("beta_dpo")]
    | Annotated[SftLoss, Tag("sft")]
    | Annotated[SimpoLoss, Tag("simpo")]
    | Annotated[OrpoLoss, Tag("orpo")]
    | Annotated[SlicLoss, Tag("slic")],
    Discriminator(_read_kind),
]
"""All losses, discriminated by `kind`. A new loss is a class and one line here."""

LossOrSum = Annotated[
    Annotated[Loss, Tag("one")]
    | Annotated[tuple[Loss, ...], Field(min_length=1), AfterValidator(_check_kinds), Tag("sum")],
    Discriminator(lambda loss: "sum" if isinstance(loss, list | tuple) else "one"),
]
"""One loss, or several to sum."""

LOSSES: tuple[type[PairLoss], ...] = tuple(blocks_in(Loss))
