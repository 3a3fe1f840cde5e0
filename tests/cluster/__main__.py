"""`python -m tests.cluster up|down|status` is what `make cluster-up` and `make cluster-down` call."""

from tests.cluster.cluster import main

main()
