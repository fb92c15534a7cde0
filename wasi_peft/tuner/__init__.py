"""The PEFT tuner: configuration, layer, model. What a PEFT maintainer would read."""
