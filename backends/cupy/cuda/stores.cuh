// Writing a number to device memory as load_gate (loads.cuh) reads it.
#ifndef TITANS_STORES_CUH
#define TITANS_STORES_CUH

#include "warp.cuh"

// element `at` of a gate or of its gradient: float32 where `wide`, else T
template <typename T> DEVICE void store_gate(void* to, int64_t at, int wide, float x) {
    if (wide) static_cast<float*>(to)[at] = x;
    else static_cast<T*>(to)[at] = narrow<T>(x);
}

#endif
