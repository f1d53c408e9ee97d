"""Exceptions that end a run: the user's mistakes, and failures of a shard or a stage.

They cross process borders under Ray, so they must pickle: plain subclasses with one message and no
`__init__` of their own. The message says what was found, what was expected, and how to go on.
"""


class PipelineError(Exception):
    """Base of all errors that end a run with one clear message."""


class ConfigError(PipelineError):
    """The recipe or the command line, or something named in them, is wrong."""


class DataError(PipelineError):
    """Input data or a stored file is unusable."""


class ShardError(PipelineError):
    """A shard could not be produced; the message names the shard and the cause."""


class StageFailed(PipelineError):
    """A stage ended before all of its shards were produced."""


class StageStopped(PipelineError):
    """A stage stopped where its execution settings say, unfinished; another run goes on."""
