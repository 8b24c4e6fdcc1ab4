"""Before a chip is booked: what a run needs, and the jobs that schedulers run."""
