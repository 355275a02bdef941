"""Results as text for people. Nothing here reads a checkpoint or decides anything."""
