"""What the converter asks of a model's code: which values are read by whom, and what follows what."""
