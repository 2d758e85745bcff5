"""Rings: many operations on descriptors handed to the kernel in one call."""
