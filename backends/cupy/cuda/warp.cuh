// The three dtypes of a kernel under one set of names, and a warp's product of them: Bfloat and Half (16 bits in memory) and float.
//   widen(x), narrow<T>(x)    T to float32 and back, to nearest even;   rounded<T>(x): there and back
//   pair<T>(x, y), unpair<T>  two 16-bit numbers in a register, the first one low
//   mma<T>(d, a, b)           16-bit: m16n8k16 on packed registers;   float: m16n8k8 in three tf32 products, errors of about 1e-7
// A kernel is compiled with -DDTYPE=Bfloat, Half or float, and with other macros for what it is specialised to, each a word in capitals.
#ifndef TITANS_WARP_CUH
#define TITANS_WARP_CUH

#include "ptx.cuh"

struct Bfloat { uint16_t bits; };
struct Half { uint16_t bits; };

template <typename T> struct Dtype;
template <> struct Dtype<Bfloat> { static constexpr bool half = true; };
template <> struct Dtype<Half> { static constexpr bool half = true; };
template <> struct Dtype<float> { static constexpr bool half = false; };

DEVICE float widen(Bfloat x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
DEVICE float widen(Half x) { return f16_value(x.bits); }
DEVICE float widen(float x) { return x; }

template <typename T> DEVICE T narrow(float x);
template <> DEVICE Bfloat narrow<Bfloat>(float x) { return Bfloat{bf16_bits(x)}; }
template <> DEVICE Half narrow<Half>(float x) { return Half{f16_bits(x)}; }
template <> DEVICE float narrow<float>(float x) { return x; }

template <typename T> DEVICE float rounded(float x) { return widen(narrow<T>(x)); }

template <typename T> DEVICE uint32_t pair(float first, float second);
template <> DEVICE uint32_t pair<Bfloat>(float first, float second) { return bf16_pair(first, second); }
template <> DEVICE uint32_t pair<Half>(float first, float second) { return f16_pair(first, second); }

template <typename T> DEVICE float2 unpair(uint32_t both);
template <> DEVICE float2 unpair<Bfloat>(uint32_t both) { return make_float2(__uint_as_float(both << 16), __uint_as_float(both & 0xffff0000u)); }
template <> DEVICE float2 unpair<Half>(uint32_t both) {
    return make_float2(f16_value(static_cast<uint16_t>(both)), f16_value(static_cast<uint16_t>(both >> 16)));
}

template <typename T> DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <> DEVICE void mma<Bfloat>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma_bf16(d, a, b); }
template <> DEVICE void mma<Half>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma_f16(d, a, b); }

// x = big + small up to 2^-22: both tf32
DEVICE void split_tf32(float x, uint32_t& big, uint32_t& small) {
    big = tf32_bits(x);
    small = tf32_bits(x - __uint_as_float(big));
}
// d += a b with float32 operands: small products first, the product of the two small parts is left out
DEVICE void mma_float(float (&d)[4], const float (&a)[4], const float (&b)[2]) {
    uint32_t a_big[4], a_small[4], b_big[2], b_small[2];
#pragma unroll
    for (int i = 0; i < 4; i++) split_tf32(a[i], a_big[i], a_small[i]);
#pragma unroll
    for (int i = 0; i < 2; i++) split_tf32(b[i], b_big[i], b_small[i]);
    mma_tf32(d, a_small, b_big);
    mma_tf32(d, a_big, b_small);
    mma_tf32(d, a_big, b_big);
}
// the same with operands rounded to tf32 once, where torch's float32 matmul precision allows it
DEVICE void mma_float_once(float (&d)[4], const float (&a)[4], const float (&b)[2]) {
    uint32_t a_bits[4] = {tf32_bits(a[0]), tf32_bits(a[1]), tf32_bits(a[2]), tf32_bits(a[3])}, b_bits[2] = {tf32_bits(b[0]), tf32_bits(b[1])};
    mma_tf32(d, a_bits, b_bits);
}

template <typename T> DEVICE T cluster_load(const T* mine, uint32_t rank) {
    static_assert(sizeof(T) == 4, "cluster_load reads 4 bytes");
    const uint32_t bits = cluster_load_bits(mine, rank);
    return *reinterpret_cast<const T*>(&bits);
}

// Four sums over the lanes 4 r + c of one c, in four shuffles: lane r gets the one of number r / 2.
DEVICE float sum_of_four(float x0, float x1, float x2, float x3) {
    const bool upper = threadIdx.x & 16, odd = threadIdx.x & 8;
    const float first = (upper ? x2 : x0) + __shfl_xor_sync(0xffffffffu, upper ? x0 : x2, 16);
    const float second = (upper ? x3 : x1) + __shfl_xor_sync(0xffffffffu, upper ? x1 : x3, 16);
    const float sum = (odd ? second : first) + __shfl_xor_sync(0xffffffffu, odd ? first : second, 8);
    return sum + __shfl_xor_sync(0xffffffffu, sum, 4);
}

DEVICE float warp_sum(float x) {
#pragma unroll
    for (int lanes = 16; lanes; lanes /= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
    return x;
}

#endif
