"""Images on their way through the engine: opened, encoded once, kept by content."""
