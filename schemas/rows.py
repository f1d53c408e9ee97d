"""Which columns the Parquet files of every stage have."""

from typing import NamedTuple

import pyarrow as pa


class Column(NamedTuple):
    name: str
    type: pa.DataType
    doc: str
    """One sentence, with the unit."""
    nullable: bool = True


class RowSchema(NamedTuple):
    """The columns of one kind of file; its version goes up when they change."""

    name: str
    version: int
    columns: tuple[Column, ...]

    @property
    def arrow(self) -> pa.Schema:
        return pa.schema([pa.field(c.name, c.type, nullable=c.nullable) for c in self.columns])

    @property
    def label(self) -> str:
        """What the footer says under `dpo.schema`, such as pairs/1."""
        return f"{self.name}/{self.version}"


def _required(name: str, type_: pa.DataType, doc: str) -> Column:
    return Column(name, type_, doc, nullable=False)


def _list_of(type_: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("element", type_, nullable=False))


MESSAGE = pa.struct(
    [
        pa.field("role", pa.string(), nullable=False),
        pa.field("content", pa.string()),
        pa.field("reasoning", pa.string()),
        pa.field("tool_calls", pa.string()),
        pa.field("tool_call_id", pa.string()),
        pa.field("name", pa.string()),
    ]
)
"""Role, content, reasoning text, tool_calls as JSON text, tool_call_id, name of speaker or tool."""

MESSAGES = _list_of(MESSAGE)
TOKEN_IDS = _list_of(pa.int32())
TOKEN_LOGPS = _list_of(pa.float32())
LOSS_MASK = _list_of(pa.bool_())

_PAIR_ID = _required("pair_id", pa.string(), "Identity of the pair: 32 hex digits of a sha256.")
_PROMPT_ID = _required("prompt_id", pa.string(), "Identity of prompt and tools: 32 hex digits.")
_SOURCE = _required("source", pa.string(), "Name of the data set that the pair came from.")
_SPLIT = _required("split", pa.string(), "train, or eval for held-out pairs.")
_WEIGHT = _required("weight", pa.float32(), "Weight of the pair in the loss; 1 unless given.")
_MARGIN = Column("margin", pa.float64(), "score_chosen - score_rejected, in the data's own unit.")
_NUM_CHOSEN = _required("num_chosen_tokens", pa.int32(), "Tokens of the chosen completion.")
_NUM_REJECTED = _required("num_rejected_tokens", pa.int32(), "Tokens of the rejected completion.")
_CHOSEN_SEQUENCE = _required(
    "chosen_sequence_id", pa.string(), "Identity of prompt ids + chosen ids: 32 hex digits."
)
_REJECTED_SEQUENCE = _required(
    "rejected_sequence_id", pa.string(), "Identity of prompt ids + rejected ids: 32 hex digits."
)

PAIR = RowSchema(
    "pairs",
    1,
    (
        _PAIR_ID,
        _PROMPT_ID,
        _required("prompt", MESSAGES, "Messages before the answer; the last is user or tool."),
        _required("chosen", MESSAGES, "Messages of the preferred answer."),
        _required("rejected", MESSAGES, "Messages of the other answer."),
        Column("tools", pa.string(), "Tool definitions offered to the model, as JSON text."),
        Column("score_chosen", pa.float64(), "The data's own score of the chosen answer."),
        Column("score_rejected", pa.float64(), "The data's own score of the rejected answer."),
        _MARGIN,
        _WEIGHT,
        _SOURCE,
        _required("source_file", pa.string(), "Input file, as the recipe's pattern matched it."),
        _required("source_row", pa.int64(), "Row in that file, from 0; blank lines count."),
        Column("source_id", pa.string(), "The row's own id in its data set."),
        _SPLIT,
        _required("warnings", _list_of(pa.string()), "Codes of doubts that did not reject it."),
        Column("extra", pa.string(), "Columns of the input that have no place here, as JSON text."),
    ),
)

REJECTED = RowSchema(
    "rejected",
    1,
    (
        _required("code", pa.string(), "Why the row was rejected: the first reason found."),
        _required("codes", _list_of(pa.string()), "All reasons found."),
        Column("field", pa.string(), "Where in the row, as a dotted path."),
        Column("detail", pa.string(), "What was found there; at most 500 characters."),
        Column("source_file", pa.string(), "Input file."),
        Column("source_row", pa.int64(), "Row in that file, from 0."),
        Column("pair_id", pa.string(), "Identity of the pair, where the row had become one."),
        Column("kept_pair_id", pa.string(), "dedupe: the pair that stays instead, if one does."),
        Column("similarity", pa.float32(), "dedupe: Jaccard similarity to it, 0 to 1."),
        Column("raw", pa.binary(), "validate: the row as read, first 64 KiB."),
        Column("raw_sha256", pa.string(), "validate: sha256 of the whole row as read."),
    ),
)

ENCODED = RowSchema(
    "encoded",
    1,
    (
        _PAIR_ID,
        _PROMPT_ID,
        _required("prompt_ids", TOKEN_IDS, "Tokens of the rendered prompt, after truncation."),
        _required("chosen_ids", TOKEN_IDS, "Tokens of the chosen completion, after truncation."),
        _required("rejected_ids", TOKEN_IDS, "Tokens of the rejected one, after truncation."),
        Column("chosen_loss_mask", LOSS_MASK, "Which chosen tokens are scored; null = all."),
        Column("rejected_loss_mask", LOSS_MASK, "Which rejected tokens are scored; null = all."),
        _required("num_prompt_tokens", pa.int32(), "Tokens of the prompt."),
        _NUM_CHOSEN,
        _NUM_REJECTED,
        _CHOSEN_SEQUENCE,
        _REJECTED_SEQUENCE,
        _required("truncated", pa.int8(), "Bits: 1 prompt, 2 chosen, 4 rejected was cut."),
        _WEIGHT,
        _MARGIN,
        _SOURCE,
        _SPLIT,
    ),
)

SCORE = RowSchema(
    "scores",
    2,
    (
        _PAIR_ID,
        _PROMPT_ID,
        _CHOSEN_SEQUENCE,
        _REJECTED_SEQUENCE,
        _required("ref_chosen_token_logps", TOKEN_LOGPS, "Nats, one a chosen token."),
        _required("ref_rejected_token_logps", TOKEN_LOGPS, "Nats, one a rejected token."),
        _required("ref_chosen_logp", pa.float64(), "Nats: their sum under the loss mask."),
        _required("ref_rejected_logp", pa.float64(), "Nats: their sum under the loss mask."),
        _NUM_CHOSEN,
        _NUM_REJECTED,
    ),
)

EXPORTED = RowSchema(
    "exported",
    2,
    (
        _PAIR_ID,
        _PROMPT_ID,
        _required("prompt", MESSAGES, "Messages before the answer."),
        _required("chosen", MESSAGES, "Messages of the preferred answer."),
        _required("rejected", MESSAGES, "Messages of the other answer."),
        _required("prompt_ids", TOKEN_IDS, "Tokens of the rendered prompt."),
        _required("chosen_ids", TOKEN_IDS, "Tokens of the chosen completion."),
        _required("rejected_ids", TOKEN_IDS, "Tokens of the rejected completion."),
        _CHOSEN_SEQUENCE,
        _REJECTED_SEQUENCE,
        _required("ref_chosen_logps", pa.float64(), "Nats: log-prob of all chosen tokens."),
        _required("ref_rejected_logps", pa.float64(), "Nats: log-prob of all rejected tokens."),
        _required("ref_chosen_token_logps", TOKEN_LOGPS, "Nats, one a chosen token."),
        _required("ref_rejected_token_logps", TOKEN_LOGPS, "Nats, one a rejected token."),
    ),
)

EVALUATION = RowSchema(
    "evaluation",
    2,
    (
        _PAIR_ID,
        _SOURCE,
        _required("policy_chosen_logp", pa.float64(), "Nats, by the trained policy."),
        _required("policy_rejected_logp", pa.float64(), "Nats, by the trained policy."),
        Column("ref_chosen_logp", pa.float64(), "Nats, by the reference; null if none was needed."),
        Column("ref_rejected_logp", pa.float64(), "Nats, by the reference."),
        _required("reward_chosen", pa.float64(), "The loss's implicit reward, chosen."),
        _required("reward_rejected", pa.float64(), "The loss's implicit reward, rejected."),
        _required("margin", pa.float64(), "reward_chosen - reward_rejected."),
        _required("correct", pa.bool_(), "Whether the margin is above 0."),
        Column("displaced", pa.bool_(), "Whether both log-probs fell below the reference's."),
        _NUM_CHOSEN,
        _NUM_REJECTED,
    ),
)

GENERATION = RowSchema(
    "generations",
    1,
    (
        _PAIR_ID,
        _required("prompt", pa.string(), "The rendered prompt, as text."),
        _required("before", pa.string(), "Greedy answer of the policy's start."),
        _required("after", pa.string(), "Greedy answer of the trained policy."),
        _required("chosen", pa.string(), "The chosen answer of the data."),
        _required("rejected", pa.string(), "The rejected answer of the data."),
    ),
)

_REWARDS_AND_LOGPS = (
    _required("loss", pa.float64(), "Mean weighted loss a pair, summed over the losses."),
    _required("rewards/chosen", pa.float64(), "Mean reward of chosen sides, by the first loss."),
    _required("rewards/rejected", pa.float64(), "Mean reward of rejected sides."),
    _required("rewards/margins", pa.float64(), "Mean of chosen minus rejected reward."),
    _required("rewards/accuracies", pa.float64(), "Share of pairs with a margin above 0."),
    _required("logps/chosen", pa.float64(), "Mean policy log-prob of the chosen side, nats."),
    _required("logps/rejected", pa.float64(), "Mean policy log-prob of the rejected side, nats."),
    _required("lengths/chosen", pa.float64(), "Mean tokens of the chosen side that count."),
    _required("lengths/rejected", pa.float64(), "Mean tokens of the rejected side that count."),
    Column(
        "displacement/chosen",
        pa.float64(),
        "Share of pairs whose chosen log-prob is below the reference's; null without a reference.",
    ),
    Column(
        "displacement/both",
        pa.float64(),
        "Share of pairs of which both log-probs are below the reference's.",
    ),
    Column("kl/k1", pa.float64(), "Mean of log(policy / reference), nats a completion token."),
    Column(
        "kl/k3",
        pa.float64(),
        "Mean of reference / policy - 1 + log(policy / reference), nats a completion token.",
    ),
    _required("num_pairs", pa.int64(), "Pairs that the means are over."),
)

METRICS = RowSchema(
    "metrics",
    2,
    (
        _required("step", pa.int64(), "Optimizer step, from 1."),
        _required("epoch", pa.float64(), "Epochs done after this step."),
        *_REWARDS_AND_LOGPS,
        _required("grad_norm", pa.float64(), "Norm of the whole gradient before clipping."),
        Column("grad_norm/chosen", pa.float64(), "Of the gradient through the chosen side alone."),
        Column("grad_norm/rejected", pa.float64(), "Of that through the rejected side alone."),
        _required("learning_rate", pa.float64(), "Learning rate of this step."),
        _required("num_tokens", pa.int64(), "Tokens computed, padding left out."),
        Column("bco_pair/delta", pa.float64(), "Mean reward so far; null with other losses."),
        Column("bco_pair/num_pairs", pa.float64(), "Pairs that this mean is over."),
        Column("beta_dpo/margin_mean", pa.float64(), "Running mean of a - b, nats."),
        Column("beta_dpo/margin_std", pa.float64(), "Running standard deviation of a - b, nats."),
        Column("beta_dpo/beta", pa.float64(), "The beta that this step was trained with."),
    ),
)

EVAL_METRICS = RowSchema(
    "eval_metrics",
    2,
    (
        _required("step", pa.int64(), "Optimizer steps done when it was measured; 0 = before."),
        *_REWARDS_AND_LOGPS,
    ),
)

TIMINGS = RowSchema(
    "timings",
    1,
    (
        _required("step", pa.int64(), "Optimizer step, from 1."),
        _required("seconds", pa.float64(), "Wall time of the step."),
        _required("tokens_per_second", pa.float64(), "Tokens of the step over its wall time."),
        _required("pairs_per_second", pa.float64(), "Pairs of the step over its wall time."),
        _required("memory_bytes", pa.int64(), "Peak resident (CPU) or allocated (GPU) so far."),
    ),
)

STAGE_TABLES: dict[str, RowSchema] = {
    "validate": PAIR,
    "dedupe": PAIR,
    "encode": ENCODED,
    "score": SCORE,
    "train": METRICS,
    "evaluate": EVALUATION,
}
"""The main table of each stage."""
