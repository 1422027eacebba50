"""Text in, calibrated numbers out. Knows nothing of Kafka, Redis or the worker."""
