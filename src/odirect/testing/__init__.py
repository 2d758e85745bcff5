"""Simulation, models and conformance suites; only tests import this."""
