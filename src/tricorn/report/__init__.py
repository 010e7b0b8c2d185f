"""What a person is told: progress, tables, and the last word of a run that failed."""
