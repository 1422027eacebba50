"""Data to checkpoints. Needs torch; nothing at run time imports this."""
