"""A Workspace as plain Kubernetes objects, for a cluster without the controller. Talks to no cluster.

A tuning Workspace becomes a Job (job.py), an inference Workspace a Deployment with a Service (deployment.py);
how many pods with how many GPUs stands in placement.py, on which nodes in nodes.py. Start at `objects`.
"""

from runtime.workspace.kubernetes.objects import objects
from runtime.workspace.kubernetes.options import PodOptions

__all__ = ["PodOptions", "objects"]
