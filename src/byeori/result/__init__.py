"""What comes out of a run: merge, generate, compare, report, publish."""
