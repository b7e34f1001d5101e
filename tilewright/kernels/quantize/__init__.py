"""Dynamic int8 quantisation of activations."""
