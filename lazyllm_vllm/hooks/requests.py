"""What a single request may not ask for: a 400 that names the field, for it alone."""

from functools import cached_property

from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine import EngineCoreRequest

from lazyllm_vllm.hooks.engine_config import block_needs, schedule_of
from lazyllm_vllm.plan.blocks import BlockNeeds
from lazyllm_vllm.plan.request_plan import RequestPlan
from lazyllm_vllm.plan.request_setting import DEFAULT, KEEP, OFF, SCHEDULE, SettingError


class RequestError(VLLMValidationError, ValueError):
    """What vLLM answers with a 400, and what a caller of its Python interface expects."""


class RequestChecks:
    """Those of one engine with LazyLLM on, in the process that takes requests."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        self.vllm_config = vllm_config
        self.schedule = schedule_of(vllm_config)

    def check(self, request: EngineCoreRequest) -> None:
        """Raises RequestError."""
        params = request.sampling_params
        if params is None or request.prompt_token_ids is None:
            return
        if request.resumable:
            raise RequestError(
                "lazyllm: a prompt that comes in parts does not work with LazyLLM, which prunes it "
                "as a whole; send it at once",
                parameter="resumable",
            )
        num_prompt = len(request.prompt_token_ids)
        try:
            setting = self.schedule.setting(params.extra_args)
        except SettingError as error:
            raise RequestError(str(error), parameter=error.field) from None
        plan = self.schedule.plan(num_prompt, setting)
        for field in ("prompt_logprobs", "prompt_logprob_token_ids"):
            if getattr(params, field, None) is None:
                continue
            if plan.is_pruned:
                raise RequestError(
                    f"lazyllm: {field} does not work for a prompt of {num_prompt} tokens, which is "
                    "pruned: dropped tokens have no logits; leave it out (and echo with logprobs), "
                    f"set {SCHEDULE} to {OFF} for this request, or raise min_prompt_tokens, now "
                    f"{self.schedule.config.min_prompt_tokens}",
                    parameter=field,
                )
        self._check_fits(num_prompt, params.max_tokens or 1)
        if setting != DEFAULT:
            self._check_own_fits(plan)

    def _check_fits(self, num_prompt: int, max_tokens: int) -> None:
        """vLLM's own check at start makes sure that every request fits, except where the number of
        blocks was set by hand. A prompt that is too short to be pruned needs the most."""
        shortest_pruned = self.schedule.config.min_prompt_tokens
        blocks = self.vllm_config.cache_config.num_gpu_blocks_override
        if blocks is None or num_prompt >= shortest_pruned:
            return
        fits = self._longest_unpruned
        if fits < shortest_pruned - 1 and num_prompt + max_tokens - 1 > fits:
            raise RequestError(
                f"lazyllm: a prompt of {num_prompt} tokens with max_tokens {max_tokens} is not "
                f"pruned and may not fit in the KV cache of {blocks} blocks, which holds {fits} "
                "tokens of it; lower max_tokens, lower min_prompt_tokens, or raise "
                "--num-gpu-blocks-override",
                parameter="max_tokens",
            )

    def _check_own_fits(self, plan: RequestPlan) -> None:
        """vLLM makes sure at start that every prompt fits with the engine's own schedule. With one
        that keeps more it would wait for ever. vLLM adds up the blocks of the engines that this
        process sends requests to."""
        config, parallel = self.vllm_config, self.vllm_config.parallel_config
        engines = parallel.data_parallel_size
        if parallel.local_engines_only:
            engines = parallel.data_parallel_size_local
        blocks = (config.cache_config.num_gpu_blocks or 0) // engines - 1
        needed = self._needs.total_of(plan, plan.num_prompt)
        if needed > blocks:
            raise RequestError(
                f"lazyllm: a prompt of {plan.num_prompt} tokens needs {needed} blocks of the KV "
                f"cache by the request's own setting, and there are {blocks}; keep less of it, or "
                f"leave out {SCHEDULE} and {KEEP}",
                parameter=SCHEDULE,
            )

    @cached_property
    def _longest_unpruned(self) -> int:
        blocks = self.vllm_config.cache_config.num_gpu_blocks_override
        return self._needs.longest_unpruned(blocks - 1)

    @cached_property
    def _needs(self) -> BlockNeeds:
        return block_needs(self.vllm_config)
