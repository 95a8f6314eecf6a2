"""One engine step on the device: its plan, its buffers, its boundaries."""
