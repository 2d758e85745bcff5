"""The direct-I/O paths over block devices, and how each request went."""
