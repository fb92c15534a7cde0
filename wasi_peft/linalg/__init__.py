"""The subspace mathematics on plain tensors: spectra, bases, compressed activations, coordinates."""
