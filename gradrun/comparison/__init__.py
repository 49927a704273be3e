"""Time variants of a run against each other in worker processes."""
