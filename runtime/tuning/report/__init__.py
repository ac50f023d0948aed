"""What a job says of itself: progress lines, metrics, samples, the report."""
