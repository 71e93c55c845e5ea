"""Decisions: synchronous, deterministic, without I/O and without a clock."""
