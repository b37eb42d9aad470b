// Reading numbers from device memory as float32: runs of one dtype in loads as wide as their alignment allows, and gates, which are float32 or DTYPE.
#ifndef TITANS_LOADS_CUH
#define TITANS_LOADS_CUH

#include "warp.cuh"

// N numbers from p on, which is aligned to their size in bytes or to 16
template <typename T, int N> DEVICE void load_run(float (&x)[N], const T* p) {
    constexpr int BYTES = N * sizeof(T);
    if constexpr (BYTES % 16 == 0 || BYTES == 8 || BYTES == 4) {
        constexpr int WORDS = BYTES / 4;
        uint32_t words[WORDS];
        if constexpr (BYTES % 16 == 0) {
#pragma unroll
            for (int i = 0; i < WORDS / 4; i++) {
                const uint4 four = reinterpret_cast<const uint4*>(p)[i];
                words[4 * i] = four.x, words[4 * i + 1] = four.y, words[4 * i + 2] = four.z, words[4 * i + 3] = four.w;
            }
        } else if constexpr (BYTES == 8) {
            const uint2 two = *reinterpret_cast<const uint2*>(p);
            words[0] = two.x, words[1] = two.y;
        } else {
            words[0] = *reinterpret_cast<const uint32_t*>(p);
        }
#pragma unroll
        for (int i = 0; i < WORDS; i++) {
            if constexpr (Dtype<T>::half) {
                const float2 both = unpair<T>(words[i]);
                x[2 * i] = both.x, x[2 * i + 1] = both.y;
            } else {
                x[i] = __uint_as_float(words[i]);
            }
        }
    } else {
#pragma unroll
        for (int i = 0; i < N; i++) x[i] = widen(p[i]);
    }
}

// element `at` of a gate: float32 where `wide`, else T
template <typename T> DEVICE float load_gate(const void* gate, int64_t at, int wide) {
    return wide ? static_cast<const float*>(gate)[at] : widen(static_cast<const T*>(gate)[at]);
}

// The same in two steps, so that the load's width is nobody's branch and nothing waits for it: the aligned word around the element, then the element of it.
template <typename T> DEVICE uint64_t gate_address(const void* gate, int64_t at, int wide) {
    return reinterpret_cast<uint64_t>(gate) + at * (wide ? 4 : static_cast<int>(sizeof(T)));
}
template <typename T> DEVICE uint32_t gate_word(const void* gate, int64_t at, int wide) {
    return *reinterpret_cast<const uint32_t*>(gate_address<T>(gate, at, wide) & ~static_cast<uint64_t>(3));
}
template <typename T> DEVICE float gate_of(uint32_t word, const void* gate, int64_t at, int wide) {
    if constexpr (Dtype<T>::half) {
        const float2 both = unpair<T>(word);
        if (!wide) return gate_address<T>(gate, at, wide) & 2 ? both.y : both.x;
    }
    return __uint_as_float(word);
}

// element `at` of an index tensor: int64 where `wide`, else int32
DEVICE int64_t load_index(const void* index, int64_t at, int wide) {
    return wide ? static_cast<const int64_t*>(index)[at] : static_cast<const int32_t*>(index)[at];
}

#endif
