"""KAITO's Workspace as our job file: manifest, training_config.yaml and environment, merged once.

The only package that knows KAITO's schema and the paths that its controller mounts. Start at `load_job`
(jobs.py) and `load_server` (servers.py); layers.py merges the settings.
"""

from runtime.workspace.jobs import load_job
from runtime.workspace.layers import Resolved
from runtime.workspace.servers import load_server

__all__ = ["Resolved", "load_job", "load_server"]
