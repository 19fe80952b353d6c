"""``erde accelerate``: a front is trained for somebody's network, and both are chained. May import every room but cli."""
