"""The Ray session and the mapper of shards over actors."""
