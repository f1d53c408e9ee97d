"""The commands of run.py beside plan and run."""
