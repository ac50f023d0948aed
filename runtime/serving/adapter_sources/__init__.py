"""Adapters that requests name and a registry holds: looked up, pulled, kept in memory and on disk.

Start at sources.py (the event loop's side), then images.py (the registry) and disk.py; residents.py says
which are in memory. Does not know HTTP, nor how an adapter is read (serving/loading.py).
"""
