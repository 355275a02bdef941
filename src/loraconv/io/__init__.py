"""Reading and writing checkpoint files safely. Nothing in here knows a format's key names."""
