"""A run as a job of a cluster: what is uploaded, and the job server that takes it."""
