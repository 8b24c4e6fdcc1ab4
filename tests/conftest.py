"""What every test has: the devices and the cache of simulated.py, and a bucket to ask for."""

import simulated  # noqa: F401
from bucket import bucket, doors  # noqa: F401  fixtures
