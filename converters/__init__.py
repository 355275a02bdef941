"""Format tables: declarations only. How a format is spelled stands here; how anything is converted, in the engine."""
