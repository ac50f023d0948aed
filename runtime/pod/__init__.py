"""What a Workspace controller's pod starts: fine_tuning.py, inference_api.py and metrics_server.py.

The files it names lie in docker/workspace and hold nothing but a call into here. Turns the controllers'
flags, variables and mounts into the jobs and servers of this project; knows no other way to start them.
Start at `fine_tuning` and `inference`.
"""
