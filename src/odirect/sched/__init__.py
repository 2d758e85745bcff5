"""Coroutines on a tiny scheduler, and the drivers that pump it."""
