"""What is kept in memory of a volume: metadata blocks, and pages of files."""
