"""The networks (tokenizer, prior, generator, discriminator), their losses, and the published checkpoint layout."""
