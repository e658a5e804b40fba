"""Matrix multiplication and attention on CPUs by the faster library, and the number of CPU threads."""
