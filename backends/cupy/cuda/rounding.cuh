// Rounding to DTYPE up or down by a number's place (EVENLY), so that errors of equal numbers in a diagonal cancel.
#ifndef TITANS_ROUNDING_CUH
#define TITANS_ROUNDING_CUH

#include "warp.cuh"

template <typename T> constexpr int DROPPED = 16;
template <> constexpr int DROPPED<Half> = 13;
// x as one of DTYPE's numbers, rounded up as often as the part that is dropped says, by its place in the block
DEVICE float evenly(float x, int row, int column) {
    if constexpr (!Dtype<DTYPE>::half || !EVENLY) return x;
    const int level = ((row * 37344 + column * 49473) & 0xffff) >> (16 - DROPPED<DTYPE>);  // 2^16 times two irrational numbers
    return x == x ? __int_as_float((__float_as_int(x) + level) & -(1 << DROPPED<DTYPE>)) : x;
}

#endif
