"""Requests that arrive at a server as a Poisson process, at rising rates."""
