"""The models that work: one row each."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """Attributes:
    architecture: vLLM's class, as a checkpoint's config.json names it.
    staged: where ours is, ``module:class``.
    last_module: what a decoder layer ends with, given rows one by one.
    """

    architecture: str
    staged: str
    last_module: str = "mlp"

    @property
    def staged_architecture(self) -> str:
        """The name that ours is registered under."""
        return self.staged.rpartition(":")[2]


FAMILIES = (Family("LlamaForCausalLM", "lazyllm_vllm.models.llama:LazyLlamaForCausalLM"),)


def family_of(architectures: list[str]) -> Family | None:
    """The first that a list of architectures names, vLLM's or ours."""
    for name in architectures:
        for family in FAMILIES:
            if name in (family.architecture, family.staged_architecture):
                return family
    return None
