"""The coordinator: who is in, where the run stands, what is committed. Nothing here imports torch."""
