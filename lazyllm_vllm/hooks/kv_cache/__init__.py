"""What a request's cache takes, as vLLM's scheduler sees it: specs and block managers.

Importing this registers them, in whichever process a spec reaches, pickled or not.
"""

from lazyllm_vllm.hooks.kv_cache.managers import register_managers

register_managers()
