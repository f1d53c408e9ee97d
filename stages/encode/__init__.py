"""Stage encode: turn pairs into token ids, the one place where text becomes tokens.

The prompt is rendered with the generation prompt, the sides without; the rendered prompt must be a
*text* prefix of both. Ids are tokens(prompt) + tokens(rest), as a model sees them that is given the
prompt and then generates. All later stages read these ids, so they cannot disagree on tokens.
"""

import functools
import logging
from collections import Counter
from dataclasses import replace

from schemas.manifest import Counts
from stages.cost import measure_lengths
from stages.encode.config import (
    ADVICE,
    REASONS,
    WARNINGS,
    EncodeConfig,
    TemplatePin,
    pin_template,
)
from stages.encode.worker import DATED, EncodeShards
from stages.faults import refuse_faulty_rows
from stages.models.fetch import read_vocab_size
from stages.models.resolve import AdapterPin, ModelPin, TokenizerPin, pin_tokenizer
from stages.stage import (
    Cost,
    Execution,
    RecipeView,
    Stage,
    StageContext,
    StageResult,
    align_shards,
    count_aligned_shards,
)
from stages.store.shards import StageDir

logger = logging.getLogger(__name__)


def run(config: EncodeConfig, ctx: StageContext) -> StageResult:
    """Render, tokenise and truncate every pair; 1:1 with dedupe's shards.

    Raises:
        DataError: too many rows are rejected.
    """
    tokenizer, template = ctx.pins["tokenizer"], ctx.pins["template"]
    assert isinstance(tokenizer, TokenizerPin)
    assert isinstance(template, TemplatePin)
    encode = EncodeShards(
        source=ctx.inputs["dedupe"].folder,
        out=ctx.out,
        tokenizer=tokenizer,
        template=template.text,
        config=config,
    )
    shards = ctx.map_shards(encode, align_shards(ctx.inputs, ["dedupe"]))
    refuse_faulty_rows(
        shards,
        ctx.out,
        max_reject_fraction=config.max_reject_fraction,
        describe_code=REASONS.__getitem__,
        advise=functools.partial(_advise, out=ctx.out),
    )
    counts = Counts.total(shard.counts for shard in shards)
    if counts.more.get(DATED):
        logger.info(
            "encode: the chat template prints today's date; it is %s for every pair "
            "(stages.encode.template_date)",
            config.template_date,
        )
    return StageResult(shards=shards)


def _advise(faults: Counter[str], fraction: float, *, out: StageDir) -> str:
    """Name the fixes for faulty rows, their folder, and the key that lets the run continue."""
    advice = [f"  {code}: {ADVICE[code]}\n" for code, _ in faults.most_common() if code in ADVICE]
    return (
        f"{''.join(advice)}All of them are in {out.folder.uri}/rejected/. "
        "To go on without these rows:\n"
        f"stages: {{encode: {{max_reject_fraction: {fraction}}}}}"
    )


def complete(config: EncodeConfig, recipe: RecipeView) -> EncodeConfig:
    """Set tokenizer and vocabulary, unless they are named.

    The tokenizer is the reference's; an adapter's own comes first. With a model's own tokenizer,
    the vocabulary is that of the policy's start. Any other tokenizer is left unchecked here: score
    compares its vocabulary with the model's in the plan.
    """
    tokenizer = config.tokenizer
    if tokenizer is None:
        reference, adapter = recipe.config("score"), recipe.pin("score", "adapter")
        has_own = isinstance(adapter, AdapterPin) and adapter.tokenizer is not None
        tokenizer = reference.adapter if has_own else reference.model
    vocab_size = config.vocab_size
    if vocab_size is None:
        # Read directly: what train inherits depends on this config.
        is_named = recipe.config("train").model is not None
        start = recipe.pin("train" if is_named else "score", "model")
        assert isinstance(start, ModelPin)
        is_own = config.tokenizer is None or pin_tokenizer(tokenizer).tokenizer == start.tokenizer
        vocab_size = read_vocab_size(start) if is_own else None
    return replace(config, tokenizer=tokenizer, vocab_size=vocab_size)


STAGE = Stage(
    name="encode",
    version=2,
    needs=lambda config: ("dedupe",),
    config=EncodeConfig,
    execution=Execution,
    run=run,
    complete=complete,
    pins={"tokenizer": pin_tokenizer, "template": pin_template},
    codes={**REASONS, **WARNINGS},
    row_name="pairs",
    reads_every_row=True,
    numeric_packages=("transformers", "tokenizers"),
    cost=Cost(
        rate_per_core=500.0,  # Measured: docs/explanation/measurements.md.
        start_seconds=10.0,
        # Bytes a token, measured: docs/explanation/scale.md.
        count_bytes=lambda stage, load: 1.7 * load.num_tokens,
        max_workers=count_aligned_shards,
        measure_lengths=measure_lengths,
    ),
)
