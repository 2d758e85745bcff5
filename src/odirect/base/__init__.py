"""Errors, units, and the layout of on-disk records."""
