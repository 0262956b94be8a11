"""Benchmarks of a model's answers."""
