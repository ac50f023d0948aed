"""What a Workspace controller's pod starts: fine_tuning.py, inference_api.py and metrics_server.py.

The files that controllers start lie in docker/workspace and only call into this package. It turns their
flags, variables and mounts into the jobs and servers of this project; knows no other way to start them.
Start at `fine_tuning` and `inference`.
"""
