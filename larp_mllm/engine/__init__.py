"""Training of a language model: options, stages, trained weights, metrics, samples, report."""
