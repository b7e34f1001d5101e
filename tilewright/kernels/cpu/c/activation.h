/* Activations by the numbers of kernels/activation.py, whose table says which kernels have which. Those up to RELU6 cut
   off at two bounds and do nothing else. */
#ifndef TILEWRIGHT_ACTIVATION_H
#define TILEWRIGHT_ACTIVATION_H

enum { NONE, RELU, RELU6, HARDSWISH, SILU, LEAKY_RELU, SIGMOID, GELU, GELU_TANH };

#endif
