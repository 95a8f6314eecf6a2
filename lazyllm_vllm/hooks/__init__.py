"""Everything that vLLM calls: entry points, specs, managers, attention, per-step hooks."""
