"""A checkpoint to a model folder that detectors/session.py serves. Needs torch."""
