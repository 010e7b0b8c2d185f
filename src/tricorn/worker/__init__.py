"""A worker's process: its link to the coordinator, its loop over steps, evaluation and saving."""
