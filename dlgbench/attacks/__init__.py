"""The attacks: one file per published method."""
