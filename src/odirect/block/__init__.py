"""Bios, devices, and filters over devices."""
