"""The store: folders on any filesystem, rows committed in shards, locks, caches, worker logs."""
