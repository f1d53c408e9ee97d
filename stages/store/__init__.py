"""Filesystems, shards, locks, caches and worker logs: how stages read and write files."""
