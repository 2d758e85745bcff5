"""The command `odirect`, one module a verb."""
