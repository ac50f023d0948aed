"""KAITO's Workspace as our job file: manifest, training_config.yaml and environment, merged once.

The only place that knows KAITO's schema and the paths its controller mounts; nothing behind it does.
Start at `load_job` (jobs.py) and `load_serve` (servers.py); `Settings` (settings.py) is how layers merge.
"""

from runtime.workspace.jobs import load_job
from runtime.workspace.servers import load_serve
from runtime.workspace.settings import Resolved

__all__ = ["Resolved", "load_job", "load_serve"]
