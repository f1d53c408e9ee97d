"""Stage encode: turn pairs into token ids, the one place where text becomes tokens.

The prompt is rendered with the generation prompt, the sides without; the rendered prompt must be a
*text* prefix of both. Ids are tokens(prompt) + tokens(rest), as a model sees them that is given the
prompt and then generates. All later stages read these ids, so they cannot disagree on tokens.
"""

from dataclasses import replace

from stages.cost import measure_lengths
from stages.encode.config import REASONS, WARNINGS, EncodeConfig, TemplatePin, pin_template
from stages.encode.worker import EncodeShards
from stages.models.resolve import AdapterPin, TokenizerPin, pin_tokenizer
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


def run(config: EncodeConfig, ctx: StageContext) -> StageResult:
    """Render, tokenise and truncate every pair; 1:1 with dedupe's shards."""
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
    return StageResult(shards=ctx.map_shards(encode, align_shards(ctx.inputs, ["dedupe"])))


def complete(config: EncodeConfig, recipe: RecipeView) -> EncodeConfig:
    """Set the reference's tokenizer, unless one is named; an adapter's own comes first."""
    if config.tokenizer is not None:
        return config
    reference, adapter = recipe.config("score"), recipe.pin("score", "adapter")
    has_own = isinstance(adapter, AdapterPin) and adapter.tokenizer is not None
    return replace(config, tokenizer=reference.adapter if has_own else reference.model)


STAGE = Stage(
    name="encode",
    version=1,
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
