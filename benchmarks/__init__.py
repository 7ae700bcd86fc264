"""The performance matrix, its timing protocol and its report (`python -m benchmarks.performance_matrix`)."""
