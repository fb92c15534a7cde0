"""Forms: what is stored in place of a dense weight. Plain modules that know neither PEFT nor training."""
