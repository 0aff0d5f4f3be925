"""Runs of several processes: what watches them (`watchdog.py`; `watched.py` for trainers)."""
