"""vLLM's command, quicker: ``python -m harness.quick_vllm serve MODEL``. Each process that it
starts imports this module first, and so ``harness.quick``."""

import harness.quick  # noqa: F401

if __name__ == "__main__":
    from vllm.entrypoints.cli.main import main

    main()
