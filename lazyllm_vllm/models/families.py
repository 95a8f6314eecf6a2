"""The models that work: one row each. How to add one is in docs/CONTRIBUTING.md.

What a row says is what cannot be seen in a decoder layer; that the layer has the form which the
staged forward needs is checked in ``models.decoder_layer`` when the model is built.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """One of vLLM's model classes, with every checkpoint that vLLM runs as it.

    Attributes:
        module, name: where the class is: ``vllm.model_executor.models.<module>.<name>``.
        after_attention: the module of a decoder layer that is called right after the attention's
            output, with it and the residual; of the last layer's, all that follows runs on the
            sampled rows alone. None: no module is given both, and rows are cut behind the layer.
        rotary: the module of a decoder layer that rotates queries and keys, as the last thing
            before they reach attention, which then may do it. None: it stays where it is.
    """

    module: str
    name: str
    after_attention: str | None = "post_attention_layernorm"
    rotary: str | None = "self_attn.rotary_emb"


FAMILIES = (
    Family("llama", "LlamaForCausalLM"),
    Family("mistral", "MistralForCausalLM"),
    Family("qwen2", "Qwen2ForCausalLM"),
    Family("qwen3", "Qwen3ForCausalLM"),
    Family("phi3", "Phi3ForCausalLM"),
    Family("granite", "GraniteForCausalLM", after_attention=None),
    Family("glm4", "Glm4ForCausalLM"),
    Family("qwen3_moe", "Qwen3MoeForCausalLM"),
    Family("mixtral", "MixtralForCausalLM"),
    Family("glm4_moe", "Glm4MoeForCausalLM"),
    Family("gemma3", "Gemma3ForCausalLM", after_attention="pre_feedforward_layernorm"),
    Family("gpt_oss", "GptOssForCausalLM", rotary="attn.rotary_emb"),
)
# A class that has no row, for users who try one all the same.
UNTESTED = Family("", "", after_attention=None, rotary=None)


def family_of(module: str, name: str) -> Family | None:
    """The row of a class of vLLM's; None: it has none.

    Args:
        module: whole, ``vllm.model_executor.models.llama``.
    """
    for family in FAMILIES:
        if (f"vllm.model_executor.models.{family.module}", family.name) == (module, name):
            return family
    return None
