"""What things look like: columns, identities, fingerprints, manifests, config, errors. No I/O, no torch, no ray."""
