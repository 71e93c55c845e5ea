"""Real daemons, real clients, real faults: what unit tests and the simulation cannot show."""
