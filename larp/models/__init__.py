"""The networks: tokenizer, prior, generator, discriminator, and the losses that they are trained with."""
