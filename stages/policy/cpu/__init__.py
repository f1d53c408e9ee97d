"""What only a CPU wants from the policy."""
