"""What became of each token of one prompt: as data, and as a page to read (docs/explain.md)."""
