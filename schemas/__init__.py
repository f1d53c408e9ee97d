"""Columns, ids, fingerprints, manifests, config classes and errors. No I/O, no torch, no ray."""
