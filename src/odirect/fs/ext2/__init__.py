"""ext2, read and write."""
