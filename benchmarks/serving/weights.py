"""What the workers of a server without weights have beside vLLM's own methods."""

from benchmarks.speed.start import randomize


class RandomWeights:
    """For ``--worker-extension-cls``."""

    randomize_weights = randomize
