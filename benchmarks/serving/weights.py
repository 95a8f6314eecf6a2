"""What the workers of a server without weights have beside vLLM's own methods."""


class RandomWeights:
    """For ``--worker-extension-cls``."""

    def randomize_weights(self) -> None:
        """Give the model weights whose attention tells tokens apart, so that some are revived."""
        from benchmarks.weights import randomize

        randomize(self.model_runner.model_state.model)
