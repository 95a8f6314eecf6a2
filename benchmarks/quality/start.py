"""An engine on SmolLM2, or on any model in a folder."""

from benchmarks.quality.compression import CompressingLLM, Compression


def start(model: str, config: dict | None, scorer: str | Compression | None, options: dict):
    """A ``vllm.LLM``, or one that compresses prompts.

    Args:
        config: LazyLLM's; None: stock vLLM.
        scorer: see ``methods.Method``.
    """
    from vllm import LLM

    if config is not None:
        from benchmarks.quality import scorers

        scorers.use(scorer)
    llm = LLM(
        model,
        seed=0,
        skip_tokenizer_init=True,
        additional_config={"lazyllm": config} if config is not None else {},
        **{"enable_prefix_caching": False, **options},
    )
    return CompressingLLM(llm, scorer) if isinstance(scorer, Compression) else llm
