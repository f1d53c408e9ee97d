"""Columns of every Parquet table that the stages write."""

from typing import NamedTuple

import pyarrow as pa


class Column(NamedTuple):
    """One column of a table."""

    name: str
    type: pa.DataType
    doc: str
    """One sentence, with the unit."""
    nullable: bool = True


class RowSchema(NamedTuple):
    """The columns of one kind of file; the version goes up when they change."""

    name: str
    version: int
    columns: tuple[Column, ...]

    @property
    def arrow(self) -> pa.Schema:
        """The Arrow schema, without metadata."""
        return pa.schema([pa.field(c.name, c.type, nullable=c.nullable) for c in self.columns])

    @property
    def label(self) -> str:
        """Value of `dpo.schema` in the footer, such as pairs/1."""
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
"""Role, content, reasoning text, tool calls as JSON text, tool call id, name of speaker or tool."""

MESSAGES = _list_of(MESSAGE)
TOKEN_IDS = _list_of(pa.int32())
TOKEN_LOGPS = _list_of(pa.float32())
LOSS_MASK = _list_of(pa.bool_())

_PAIR_ID = _required("pair_id", pa.string(), "Id of the pair: 32 hex digits of a sha256.")
_PROMPT_ID = _required("prompt_id", pa.string(), "Id of prompt and tools: 32 hex digits.")
_SOURCE = _required("source", pa.string(), "Name of the pair's data set.")
_SPLIT = _required("split", pa.string(), "train, or eval for held-out pairs.")
_WEIGHT = _required("weight", pa.float32(), "Weight of the pair in the loss; 1 by default.")
_MARGIN = Column("margin", pa.float64(), "score_chosen - score_rejected, in the data's unit.")
_NUM_CHOSEN = _required("num_chosen_tokens", pa.int32(), "Tokens in the chosen completion.")
_NUM_REJECTED = _required("num_rejected_tokens", pa.int32(), "Tokens in the rejected completion.")
_CHOSEN_SEQUENCE = _required(
    "chosen_sequence_id", pa.string(), "Id of prompt_ids + chosen_ids: 32 hex digits."
)
_REJECTED_SEQUENCE = _required(
    "rejected_sequence_id", pa.string(), "Id of prompt_ids + rejected_ids: 32 hex digits."
)
_REF_CHOSEN_TOKENS = _required(
    "ref_chosen_token_logps", TOKEN_LOGPS, "Reference log-prob of each chosen token, nats."
)
_REF_REJECTED_TOKENS = _required(
    "ref_rejected_token_logps", TOKEN_LOGPS, "Reference log-prob of each rejected token, nats."
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
        Column("score_chosen", pa.float64(), "Score of the chosen answer, in the data's unit."),
        Column("score_rejected", pa.float64(), "Score of the rejected answer, in the data's unit."),
        _MARGIN,
        _WEIGHT,
        _SOURCE,
        _required("source_file", pa.string(), "Input file, as matched by the recipe's pattern."),
        _required("source_row", pa.int64(), "Row in that file, from 0, counting blank lines."),
        Column("source_id", pa.string(), "Id of the row in its data set."),
        _SPLIT,
        _required("warnings", _list_of(pa.string()), "Codes of the warnings about the pair."),
        Column("extra", pa.string(), "Input columns without a column here, as JSON text."),
    ),
)

REJECTED = RowSchema(
    "rejected",
    1,
    (
        _required("code", pa.string(), "First reason for rejecting the row."),
        _required("codes", _list_of(pa.string()), "All reasons for rejecting the row."),
        Column("field", pa.string(), "Place of the fault in the row, as a dotted path."),
        Column("detail", pa.string(), "What was found there, in at most 500 characters."),
        Column("source_file", pa.string(), "Input file."),
        Column("source_row", pa.int64(), "Row in that file, from 0."),
        Column("pair_id", pa.string(), "Id of the pair, if the row had become one."),
        Column("kept_pair_id", pa.string(), "dedupe: id of the pair that is kept instead, if any."),
        Column("similarity", pa.float32(), "dedupe: Jaccard similarity to that pair, 0 to 1."),
        Column("raw", pa.binary(), "validate: first 64 KiB of the row as read."),
        Column("raw_sha256", pa.string(), "validate: sha256 of the whole row as read."),
    ),
)

ENCODED = RowSchema(
    "encoded",
    1,
    (
        _PAIR_ID,
        _PROMPT_ID,
        _required("prompt_ids", TOKEN_IDS, "Token ids of the rendered prompt, after truncation."),
        _required("chosen_ids", TOKEN_IDS, "Token ids of the chosen completion, after truncation."),
        _required(
            "rejected_ids", TOKEN_IDS, "Token ids of the rejected completion, after truncation."
        ),
        Column("chosen_loss_mask", LOSS_MASK, "True for each scored chosen token; null = all."),
        Column("rejected_loss_mask", LOSS_MASK, "True for each scored rejected token; null = all."),
        _required("num_prompt_tokens", pa.int32(), "Tokens in the prompt."),
        _NUM_CHOSEN,
        _NUM_REJECTED,
        _CHOSEN_SEQUENCE,
        _REJECTED_SEQUENCE,
        _required("truncated", pa.int8(), "Truncated parts: 1 prompt + 2 chosen + 4 rejected."),
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
        _REF_CHOSEN_TOKENS,
        _REF_REJECTED_TOKENS,
        _required(
            "ref_chosen_logp", pa.float64(), "Reference log-prob of the scored chosen tokens, nats."
        ),
        _required(
            "ref_rejected_logp",
            pa.float64(),
            "Reference log-prob of the scored rejected tokens, nats.",
        ),
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
        _required("prompt_ids", TOKEN_IDS, "Token ids of the rendered prompt."),
        _required("chosen_ids", TOKEN_IDS, "Token ids of the chosen completion."),
        _required("rejected_ids", TOKEN_IDS, "Token ids of the rejected completion."),
        _CHOSEN_SEQUENCE,
        _REJECTED_SEQUENCE,
        _required(
            "ref_chosen_logps", pa.float64(), "Reference log-prob of all chosen tokens, nats."
        ),
        _required(
            "ref_rejected_logps", pa.float64(), "Reference log-prob of all rejected tokens, nats."
        ),
        _REF_CHOSEN_TOKENS,
        _REF_REJECTED_TOKENS,
    ),
)

EVALUATION = RowSchema(
    "evaluation",
    2,
    (
        _PAIR_ID,
        _SOURCE,
        _required("policy_chosen_logp", pa.float64(), "Trained policy's log-prob of chosen, nats."),
        _required(
            "policy_rejected_logp", pa.float64(), "Trained policy's log-prob of rejected, nats."
        ),
        Column(
            "ref_chosen_logp",
            pa.float64(),
            "Reference log-prob of chosen, nats; null without a reference.",
        ),
        Column(
            "ref_rejected_logp",
            pa.float64(),
            "Reference log-prob of rejected, nats; null without a reference.",
        ),
        _required(
            "reward_chosen", pa.float64(), "Implicit reward of chosen, as the loss defines it."
        ),
        _required(
            "reward_rejected", pa.float64(), "Implicit reward of rejected, by the same definition."
        ),
        _required("margin", pa.float64(), "reward_chosen - reward_rejected."),
        _required("correct", pa.bool_(), "Whether the margin is above 0."),
        Column("displaced", pa.bool_(), "Whether both log-probs fell; null without a reference."),
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
        _required("before", pa.string(), "Greedy answer of the model that training started from."),
        _required("after", pa.string(), "Greedy answer of the trained policy."),
        _required("chosen", pa.string(), "The data's chosen answer."),
        _required("rejected", pa.string(), "The data's rejected answer."),
    ),
)

_REWARDS_AND_LOGPS = (
    _required("loss", pa.float64(), "Mean weighted loss per pair, summed over the losses."),
    _required("rewards/chosen", pa.float64(), "Mean reward of chosen, by the first loss."),
    _required("rewards/rejected", pa.float64(), "Mean reward of rejected, by the first loss."),
    _required("rewards/margins", pa.float64(), "Mean of chosen reward minus rejected reward."),
    _required("rewards/accuracies", pa.float64(), "Share of pairs with a margin above 0."),
    _required("logps/chosen", pa.float64(), "Mean policy log-prob of the chosen side, nats."),
    _required("logps/rejected", pa.float64(), "Mean policy log-prob of the rejected side, nats."),
    _required("lengths/chosen", pa.float64(), "Mean scored tokens per chosen side."),
    _required("lengths/rejected", pa.float64(), "Mean scored tokens per rejected side."),
    Column(
        "displacement/chosen",
        pa.float64(),
        "Share of pairs whose chosen log-prob is below the reference's; null without a reference.",
    ),
    Column(
        "displacement/both",
        pa.float64(),
        "Share of pairs with both log-probs below the reference's; null without a reference.",
    ),
    Column("kl/k1", pa.float64(), "Mean of log(policy / reference), nats per completion token."),
    Column(
        "kl/k3",
        pa.float64(),
        "Mean of reference / policy - 1 + log(policy / reference), nats per completion token.",
    ),
    _required("num_pairs", pa.int64(), "Number of pairs that the means are taken over."),
)

METRICS = RowSchema(
    "metrics",
    2,
    (
        _required("step", pa.int64(), "Optimizer step, from 1."),
        _required("epoch", pa.float64(), "Epochs completed after this step."),
        *_REWARDS_AND_LOGPS,
        _required("grad_norm", pa.float64(), "Norm of the whole gradient before clipping."),
        Column("grad_norm/chosen", pa.float64(), "Gradient norm through chosen alone."),
        Column("grad_norm/rejected", pa.float64(), "Gradient norm through rejected alone."),
        _required("learning_rate", pa.float64(), "Learning rate of this step."),
        _required("num_tokens", pa.int64(), "Number of tokens computed, without padding."),
        Column("bco_pair/delta", pa.float64(), "Running mean reward; null with other losses."),
        Column("bco_pair/num_pairs", pa.float64(), "Pairs in that mean; null with other losses."),
        Column("beta_dpo/margin_mean", pa.float64(), "Running mean of log-ratio margins, nats."),
        Column("beta_dpo/margin_std", pa.float64(), "Their running standard deviation, nats."),
        Column("beta_dpo/beta", pa.float64(), "Beta of this step; null with other losses."),
    ),
)

EVAL_METRICS = RowSchema(
    "eval_metrics",
    2,
    (
        _required("step", pa.int64(), "Optimizer steps before the measurement."),
        *_REWARDS_AND_LOGPS,
    ),
)

TIMINGS = RowSchema(
    "timings",
    1,
    (
        _required("step", pa.int64(), "Optimizer step, from 1."),
        _required("seconds", pa.float64(), "Wall time of the step, seconds."),
        _required(
            "tokens_per_second", pa.float64(), "Tokens of the step divided by its wall time."
        ),
        _required("pairs_per_second", pa.float64(), "Pairs of the step divided by its wall time."),
        _required(
            "memory_bytes", pa.int64(), "Peak memory so far: resident on CPU, allocated on GPU."
        ),
    ),
)

_VALUES_OF_PAIR = (
    _required("policy_chosen_logp", pa.float32(), "Policy's log-prob of chosen then, nats."),
    _required("policy_rejected_logp", pa.float32(), "Policy's log-prob of rejected then, nats."),
    _required("margin", pa.float32(), "Reward of chosen minus rejected, by the first loss."),
    _required("loss", pa.float32(), "Weighted loss of the pair, summed over the losses."),
)

DYNAMICS = RowSchema(
    "dynamics",
    1,
    (
        _PAIR_ID,
        _required("step", pa.int64(), "Optimizer step, from 1; all values are from before it."),
        _required("epoch", pa.int32(), "Pass over the training pairs, from 1."),
        *_VALUES_OF_PAIR,
        _required(
            "gradient_share",
            pa.float32(),
            "Norm of the loss's gradient by the pair's two log-probs, as share of the step's sum.",
        ),
    ),
)

EVAL_DYNAMICS = RowSchema(
    "eval_dynamics",
    1,
    (
        _PAIR_ID,
        _required("step", pa.int64(), "Optimizer steps before the evaluation."),
        *_VALUES_OF_PAIR,
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
