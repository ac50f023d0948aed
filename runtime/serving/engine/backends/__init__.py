"""Engines beside our own: any architecture one request at a time, and vLLM in a process of its own."""
