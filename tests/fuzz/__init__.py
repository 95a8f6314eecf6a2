"""Random lives of requests over a real engine, and what must hold after each step of them."""
