"""What the server's workers have beside vLLM's own methods."""


class RandomWeights:
    """``--worker-extension-cls`` of a server with dummy weights."""

    def soak_randomize(self) -> None:
        """Give the model weights whose attention tells tokens apart, so that some are revived."""
        from benchmarks.weights import randomize

        randomize(self.model_runner.model_state.model)
