"""Effects in order: the data path, the log, replication and resync, over ``ports`` alone."""
