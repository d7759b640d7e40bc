"""The package's model: config, loading, state, towers, generation."""
