"""Models by name: pinning to content, fetching onto a worker, merging an adapter."""
