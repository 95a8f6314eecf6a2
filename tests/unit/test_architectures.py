"""Which staged class a checkpoint's config.json leads to, and what is said where there is none."""

import json

import pytest
from harness.tiny import LLAMA

from vllm.engine.arg_utils import EngineArgs

from lazyllm_vllm.hooks.adapt import staged_architecture
from lazyllm_vllm.hooks.engine_config import full_layers
from lazyllm_vllm.models.families import FAMILIES
from lazyllm_vllm.models.registry import vllm_class
from lazyllm_vllm.plan.config import ConfigError, LazyLLMConfig

# What config.json of XGen-7B says, the paper's second model.
XGEN = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "bos_token_id": 50256,
    "eos_token_id": 50256,
    "pad_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 8192,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_cache": True,
    "vocab_size": 51200,
}
GEMMA = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "num_hidden_layers": 18,
    "sliding_window": 512,
    "hidden_size": 64,
    "head_dim": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32768,
}


@pytest.fixture
def args_of(tmp_path):
    def make(config: dict, **lazyllm) -> EngineArgs:
        (tmp_path / "config.json").write_text(json.dumps(config))
        return EngineArgs(
            str(tmp_path),
            skip_tokenizer_init=True,
            load_format="dummy",
            additional_config={"lazyllm": lazyllm},
        )

    return make


@pytest.mark.parametrize(
    "architecture",
    [
        "LlamaForCausalLM",
        "LLaMAForCausalLM",
        "LlamaModel",
        "InternLM3ForCausalLM",
        "IQuestCoderForCausalLM",
        "TeleChat3ForCausalLM",
        "MistralModel",
    ],
)
def test_what_vllm_runs_as_llama_is_llama(args_of, architecture):
    args = args_of(LLAMA | {"architectures": [architecture]})
    assert staged_architecture(args) == "LazyLlamaForCausalLM"


def test_a_config_without_architectures(args_of):
    config = {key: value for key, value in LLAMA.items() if key != "architectures"}
    assert staged_architecture(args_of(config)) == "LazyLlamaForCausalLM"


def test_the_config_of_xgen_7b(args_of):
    args = args_of(XGEN)
    assert staged_architecture(args) == "LazyLlamaForCausalLM"
    assert full_layers(args.create_model_config()) is None


def test_every_family_is_a_class_of_vllm():
    for family in FAMILIES:
        module = f"vllm.model_executor.models.{family.module}"
        assert vllm_class(family.name) == (module, family.name)


def test_an_untested_class_runs_only_if_the_user_says_so(args_of):
    config = LLAMA | {"architectures": ["SolarForCausalLM"]}
    with pytest.raises(ConfigError, match="SolarForCausalLM.*allow_untested_model.*Llama"):
        staged_architecture(args_of(config))
    allowed = args_of(config, allow_untested_model=True)
    assert staged_architecture(allowed) == "LazySolarForCausalLM"


@pytest.mark.parametrize("architecture", ["Olmo2ForCausalLM", "Gemma3ForConditionalGeneration"])
def test_models_of_another_kind_are_refused(args_of, architecture):
    args = args_of(LLAMA | {"architectures": [architecture]}, allow_untested_model=True)
    with pytest.raises(ConfigError, match=f"{architecture} is not a text model .* Llama"):
        staged_architecture(args)


def test_boundaries_follow_layers_that_see_everything(args_of):
    full = full_layers(args_of(GEMMA).create_model_config())
    assert full == (6, 12, 18)
    cuts = LazyLLMConfig(preset="aggressive").boundaries(18, full)  # the first two are one
    assert [(cut.layer, cut.keep) for cut in cuts] == [(6, 0.2), (12, 0.1)]
    wrong = LazyLLMConfig(prune=[{"layer": 5, "keep": 0.5}])
    with pytest.raises(ConfigError, match="prune: layer 5 has a sliding window.*use 6, 12$"):
        wrong.boundaries(18, full)


def test_a_model_that_never_sees_everything_is_refused(args_of):
    config = LLAMA | {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    model = args_of(config | {"sliding_window": 512}).create_model_config()
    with pytest.raises(ConfigError, match="512.*--disable-sliding-window"):
        full_layers(model)
