"""The training path: pure steps, compiled chunks of steps, exact evaluation. No files, no configuration."""
