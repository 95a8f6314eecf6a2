"""What pruning costs in answers: ``python -m benchmarks quality``."""
