"""The commands of run.py besides plan and run."""
