"""This server beside others, with the same weights on the same machine: `make bench-peers`."""
