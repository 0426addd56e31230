"""Data sets: where images come from, what a version is, how it is split, what leaks, and decoded pixels."""
