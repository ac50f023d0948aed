"""Copies of one model, each in a process and on a GPU of its own, behind one engine. Start at engine.py."""
