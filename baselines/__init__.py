"""Methods that the algorithm is compared with."""

import algorithm  # noqa: F401 - before torch, see algorithm.cpus
