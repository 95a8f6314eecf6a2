"""Every argument of vLLM's engine, and what becomes of it with LazyLLM on.

One that is in no list here nor in ``refusals.REFUSALS`` came with a newer vLLM and is unknown:
``tests/unit/test_engine_args.py`` fails until somebody has looked at it.
"""

# These belong to features that no model in ``models.families`` has, or that are refused.
WITHOUT_EFFECT = frozenset(
    """
    all2all_backend cp_kv_cache_interleave_size cpu_offload_params dbo_decode_token_threshold
    dbo_prefill_token_threshold dcp_comm_backend dcp_kv_cache_interleave_size dcp_q_replicate
    default_mm_loras disable_cascade_attn disable_chunked_mm_input
    disable_nccl_for_dp_synchronization dp_sync_interval ec_manager_config elastic_ep_max_dp_size
    enable_elastic_ep enable_ep_weight_filter enable_eplb
    enable_fault_tolerance enable_hc_sp enable_mamba_cache_stochastic_rounding
    enable_mamba_shared_prefix_checkpoint enable_mixed_moe_lora_format enable_mm_embeds
    enable_mm_processor_stats enable_moe_shared_loras enable_tower_connector_lora engram_config
    eplb_config expert_placement_strategy fault_tolerance_config fully_sharded_loras
    gdn_prefill_backend interleave_mm_strings io_processor_plugin kda_decode_backend
    kda_prefill_backend kv_offloading_backend language_model_only limit_mm_per_prompt lora_dtype
    lora_target_modules mamba_backend mamba_block_size mamba_cache_dtype mamba_cache_mode
    mamba_cache_philox_rounds mamba_config mamba_ssm_cache_dtype mamba_ssu_algorithm max_cpu_loras
    max_lora_cls_labels max_lora_rank max_loras media_io_kwargs mm_device_do_normalize
    mm_encoder_attn_backend mm_encoder_attn_dtype mm_encoder_fp8_scale_path
    mm_encoder_fp8_scale_save_margin mm_encoder_fp8_scale_save_path mm_encoder_only
    mm_encoder_tp_mode mm_hasher_algorithm mm_ipc_gpu_memory_gb mm_processor_cache_gb
    mm_processor_cache_type mm_processor_device mm_processor_kwargs mm_shm_cache_max_object_size_mb
    mm_tensor_ipc per_request_spec_decode_metrics pooler_config prefix_cache_retention_interval
    ray_workers_use_nsight replayssm_buffer_len skip_mm_profiling sleep_mode_backend
    sleep_mode_offload_cudagraph sleep_preserve_parameter_names sparse_indexer_topk_backend
    specialize_active_lora swa_bounded_replay use_replayssm video_pruning_method video_pruning_rate
    """.split()
)

# LazyLLM changes nothing where vLLM uses these, or follows them.
WORKS = frozenset(
    """
    _api_process_count _api_process_rank additional_config aggregate_engine_logging
    allow_deprecated_quantization allowed_local_media_path allowed_media_domains async_scheduling
    attention_config aux_output_config block_size code_revision collect_detailed_traces
    compilation_config config_format cpu_distributed_timeout_seconds cpu_offload_gb
    cudagraph_capture_sizes cudagraph_metrics custom_histogram_buckets data_parallel_address
    data_parallel_backend data_parallel_external_lb data_parallel_hybrid_lb
    data_parallel_multi_port_external_lb data_parallel_rank data_parallel_rpc_port
    data_parallel_size data_parallel_size_local data_parallel_start_rank device_ids
    disable_custom_all_reduce disable_log_stats disable_sliding_window distributed_executor_backend
    distributed_timeout_seconds download_dir dtype enable_batch_sharded_sampling
    enable_chunked_prefill enable_cumem_allocator enable_flashinfer_autotune
    enable_layerwise_nvtx_tracing enable_log_requests enable_logging_iteration_details
    enable_mfu_metrics enable_nccl_comm_suspend enable_prefix_caching enable_shm_tensor_arena
    enable_trace_replay enforce_eager fail_on_environ_validation generation_config
    gpu_memory_utilization hf_config_path hf_overrides hf_token ignore_patterns ir_op_priority
    jit_monitor_mode jit_monitor_verbose kernel_config kv_cache_memory_bytes kv_cache_metrics
    kv_cache_metrics_sample kv_events_config linear_backend load_format log_config_file log_level
    logging_config logits_processors logprobs_mode long_prefill_token_threshold
    long_prefill_token_threshold_adaptive master_addr master_port max_cudagraph_capture_size
    max_logprobs max_model_len max_num_active_seqs max_num_batched_tokens max_num_queued_reqs
    max_num_queued_tokens max_num_scheduled_tokens max_num_seqs max_parallel_loading_workers model
    model_loader_extra_config model_weights moe_backend nnodes node_rank num_gpu_blocks_override
    numa_bind numa_bind_cpus numa_bind_nodes offload_backend offload_group_size offload_num_in_group
    offload_params offload_prefetch_step optimization_level otlp_traces_endpoint
    override_generation_config performance_mode prefill_schedule_interval prefix_caching_hash_algo
    prefix_match_unit profiler_config pt_load_map_location quantization quantization_config
    reasoning_config reasoning_parser reasoning_parser_plugin renderer_num_workers
    return_sampling_mask revision safetensors_load_strategy safetensors_prefetch_block_size
    safetensors_prefetch_num_threads scheduling_policy seed served_model_name
    show_hidden_metrics_for_version shutdown_timeout skip_tokenizer_init stream_interval
    structured_outputs_config tokenizer tokenizer_mode tokenizer_revision tokens_only
    trust_remote_code use_fp64_gumbel use_tqdm_on_load watchdog_config watermark watermark_config
    weight_transfer_config worker_extension_cls
    """.split()
)
