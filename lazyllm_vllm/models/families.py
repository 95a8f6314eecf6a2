"""The models that work: one row each."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """Attributes:
    architecture: vLLM's class, as a checkpoint's config.json names it.
    staged: where ours is, ``module:class``.
    after_attention: the module that a decoder layer calls next, with ``(hidden, residual)``.
    """

    architecture: str
    staged: str
    after_attention: str = "post_attention_layernorm"

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
