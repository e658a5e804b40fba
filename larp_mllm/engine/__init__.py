"""How a language model is trained: stages, what each trains, what is measured and told on the way."""
