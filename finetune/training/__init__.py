"""Train a model on the rows of a run. `loop` holds the loop; nothing is imported here, so that probes start fast."""
