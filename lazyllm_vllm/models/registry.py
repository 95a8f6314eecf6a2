"""A staged class for each of vLLM's causal language models, made when it is first asked for.

vLLM's registry names classes as ``module:class`` and imports them late, some in processes of their
own. So this module has an attribute ``Lazy<class>`` for each, which is vLLM's class with
``StagedDecoder`` before it.
"""

import importlib

from vllm import ModelRegistry

PREFIX = "Lazy"


def vllm_class(architecture: str) -> tuple[str, str] | None:
    """Module and name of the class that vLLM runs an architecture as; None: it has none, or it is
    not a plain causal language model."""
    entry = ModelRegistry.models.get(architecture)
    model = getattr(entry, "model_cls", None)
    if model is not None:
        module, name = model.__module__, model.__name__
    else:
        module, name = getattr(entry, "module_name", ""), getattr(entry, "class_name", "")
    is_plain = name.endswith("ForCausalLM") and not name.startswith("Transformers")
    return (module, name) if is_plain else None


def register_staged_models() -> None:
    """Tell vLLM of the staged classes, by names of their own. Safe to call again."""
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    classes = {vllm_class(architecture) for architecture in list(ModelRegistry.models)}
    for module, name in classes - {None}:
        if module == __name__:
            continue
        _MODULES.setdefault(PREFIX + name, module)
        ModelRegistry.register_model(PREFIX + name, f"{__name__}:{PREFIX}{name}")
        if name in MODELS_CONFIG_MAP:  # what vLLM sets for an architecture by its name
            MODELS_CONFIG_MAP[PREFIX + name] = MODELS_CONFIG_MAP[name]


_MODULES: dict[str, str] = {}  # of vLLM's class, by the name of ours


def __getattr__(name: str) -> type:
    if name not in _MODULES:
        raise AttributeError(name)
    from lazyllm_vllm.models.staged import StagedDecoder

    model = getattr(importlib.import_module(_MODULES[name]), name.removeprefix(PREFIX))
    staged = type(name, (StagedDecoder, model), {"__module__": __name__, "__doc__": model.__doc__})
    globals()[name] = staged
    return staged
