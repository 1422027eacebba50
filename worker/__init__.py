"""The stream: deltas in, decisions out. The files are listed in the order a record travels."""
