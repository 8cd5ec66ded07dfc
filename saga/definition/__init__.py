"""Front end 1: activities and contracts, the step graph, its checks, and the registry of versions."""
