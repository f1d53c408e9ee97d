"""Models by name: resolve, pin, fetch, merge an adapter."""
