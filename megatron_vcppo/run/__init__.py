"""A run: its folder, its files, and the life of its processes."""
