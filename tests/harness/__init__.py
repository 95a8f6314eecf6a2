"""What tests share: engines, a random paged world, the slow reference."""
