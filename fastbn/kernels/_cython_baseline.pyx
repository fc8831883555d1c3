# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
include "cython_kernels.pyx"
include "cython_calls.pyx"
