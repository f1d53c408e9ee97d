"""What things look like: columns, identities, manifests, config, errors. No I/O, no torch."""
