"""What helps where a plan does not fit: settings that need less memory, more hardware."""
