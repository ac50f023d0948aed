"""Results of a job for people and monitoring: the report, its page, and the metrics server."""
