"""Attention and layers that replace torch's own on a CPU."""
