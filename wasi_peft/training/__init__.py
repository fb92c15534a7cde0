"""While a model trains: optimizers, the Trainer's callback, ranks that change."""
