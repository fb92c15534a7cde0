"""The command `wasi-peft`."""
