"""Models that run in stages."""
