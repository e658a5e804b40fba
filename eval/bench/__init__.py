"""What only benchmarks need."""
