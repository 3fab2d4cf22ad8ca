"""The plans: one TOML file, one table."""
