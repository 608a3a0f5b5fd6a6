"""What export.py writes and reads: contents.py gathers what is released, the other modules know one format each."""
