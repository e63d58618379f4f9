"""A model over HTTP: what comes in and who may, the queue and its batches, what goes out."""
