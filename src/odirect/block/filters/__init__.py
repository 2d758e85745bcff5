"""Filters: devices over a device, with the same verbs."""
