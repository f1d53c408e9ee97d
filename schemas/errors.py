"""Which errors are the user's, and which mean that a shard or a stage failed.

They cross process borders under Ray, so they must pickle: plain subclasses, one message, no
`__init__` of their own. The message says what was found, what was wanted, and how to go on.
"""


class PipelineError(Exception):
    """Anything that ends a run with one clear message."""


class ConfigError(PipelineError):
    """The recipe, the command line, or something they name is wrong."""


class DataError(PipelineError):
    """Input data or a stored file cannot be used as it is."""


class ShardError(PipelineError):
    """A shard could not be produced; the message names the shard and the cause."""


class StageFailed(PipelineError):
    """A stage ended without all of its shards."""
