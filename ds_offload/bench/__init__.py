"""Benchmarks: each measured time next to the time that the link or the memory allows."""
