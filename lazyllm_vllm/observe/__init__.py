"""What a user can see: the start-up log, counters, the trace."""
