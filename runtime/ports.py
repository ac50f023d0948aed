"""The TCP ports that clients, controllers and other nodes expect, each in one place.

Settings and flags take them as defaults. docker/healthcheck.sh and docker/Dockerfile repeat two of them; a
test holds those equal to these.
"""

SERVING = 80
"""Where `runtime serve` listens, and the Service in front of it: the port that clients of /chat expect."""

CONTROLLER = 5000
"""What a Workspace controller probes and scrapes in its pods: the inference server, or a job's /metrics."""

RENDEZVOUS = 29500
"""Where node 0 of a tuning job listens for the others: torchrun's default, and KAITO's Service's port."""
