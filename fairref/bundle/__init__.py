"""One folder of weights -> ready networks: a registry of parts, loading, inspection."""
