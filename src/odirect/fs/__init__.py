"""File systems on devices that the kernel has not mounted."""
