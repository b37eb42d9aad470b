// Matrices of a warp as 8 x 8 blocks of pairs: lane l = 4 r + c holds of a block (row r, columns 2c and 2c + 1), as two 16-bit numbers or two float32.
// That is how mma.sync leaves its sums, and every operand of a product is made of such blocks with the pairs along the summed dimension: sums become
// the next product's operand by rounding alone, for any dtype. Tiles in shared memory hold rows of operands, their 16-byte pieces mixed against conflicts.
#ifndef TITANS_FRAGMENTS_CUH
#define TITANS_FRAGMENTS_CUH

#include "warp.cuh"

template <typename T> struct PairOf { using type = uint32_t; };
template <> struct PairOf<float> { using type = float2; };
template <typename T> using Pair = typename PairOf<T>::type;

DEVICE int lane_id() { return threadIdx.x & 31; }

template <typename T> struct Make {
    static DEVICE uint32_t pair_of(float x, float y) { return pair<T>(x, y); }
    static DEVICE float2 floats(uint32_t p) { return unpair<T>(p); }
    // what rounding to a pair left out, rounded itself
    static DEVICE uint32_t rest(float x, float y, uint32_t rounded_pair) {
        const float2 z = unpair<T>(rounded_pair);
        return pair<T>(x - z.x, y - z.y);
    }
    static DEVICE uint32_t zero() { return 0; }
};
template <> struct Make<float> {
    static DEVICE float2 pair_of(float x, float y) { return make_float2(x, y); }
    static DEVICE float2 floats(float2 p) { return p; }
    static DEVICE float2 rest(float, float, float2) { return make_float2(0.f, 0.f); }
    static DEVICE float2 zero() { return make_float2(0.f, 0.f); }
};

// x = big + small up to 2^-21 in three instructions: big is what tf32 keeps of x, small is rounded by the add (cvt.rna takes three each). NaN stays in big.
DEVICE void parts_of(float x, uint32_t& big, uint32_t& small) {
    big = __float_as_uint(x) & 0xffffe000u;
    small = __float_as_uint(x - __uint_as_float(big)) + 0x1000u;
}
// d += a b of float32 over 8 of the summed dimension, but for the product of the two small parts
DEVICE void mma_parts(float (&d)[4], const float (&a)[4], const float (&b)[2]) {
    uint32_t a_big[4], a_small[4], b_big[2], b_small[2];
#pragma unroll
    for (int i = 0; i < 4; i++) parts_of(a[i], a_big[i], a_small[i]);
#pragma unroll
    for (int i = 0; i < 2; i++) parts_of(b[i], b_big[i], b_small[i]);
    mma_tf32(d, a_small, b_big);
    mma_tf32(d, a_big, b_small);
    mma_tf32(d, a_big, b_big);
}

// d (16 x 8) += a b over 16 of the summed dimension. a: blocks (rows 0-7, first half) (rows 8-15, first) (0-7, second) (8-15, second); b: first, second.
template <typename T> struct Product {
    static DEVICE void add(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
        const uint32_t a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};
        mma<T>(d, a, b);
    }
};
template <> struct Product<float> {
    static DEVICE void add(float (&d)[4], float2 a0, float2 a1, float2 a2, float2 a3, float2 b0, float2 b1) {
        const float first[4] = {a0.x, a1.x, a0.y, a1.y}, second[4] = {a2.x, a3.x, a2.y, a3.y};
        const float b_first[2] = {b0.x, b0.y}, b_second[2] = {b1.x, b1.y};
#ifdef TF32_ONCE
        mma_float_once(d, first, b_first);
        mma_float_once(d, second, b_second);
#else
        mma_parts(d, first, b_first);
        mma_parts(d, second, b_second);
#endif
    }
};

// Rows of COLUMNS numbers in shared memory.
template <typename T, int COLUMNS> struct Tile {
    static constexpr int SIZE = sizeof(T), PER = 16 / SIZE, ROW = COLUMNS * SIZE, PIECES = COLUMNS / PER;
    unsigned char* base;

    static DEVICE int mixed(int row, int piece) {
        if (SIZE == 4) return piece ^ (((row & 3) * 2) ^ ((row >> 2) & 1));
        return PIECES >= 8 ? piece ^ (row & 7) : piece ^ ((row >> 1) & 3);
    }
    DEVICE unsigned char* piece(int row, int index) const { return base + row * ROW + mixed(row, index) * 16; }
    DEVICE T* element(int row, int column) const { return reinterpret_cast<T*>(piece(row, column / PER)) + column % PER; }
    DEVICE Pair<T>* pair_at(int row, int column) const { return reinterpret_cast<Pair<T>*>(element(row, column)); }
    // the same below row0, a multiple of 8, which the mixing does not see: what depends on the lane alone is computed once
    DEVICE T* element(int row0, int row, int column) const { return reinterpret_cast<T*>(base + row0 * ROW + (row * ROW + mixed(row, column / PER) * 16 + column % PER * SIZE)); }
    DEVICE Pair<T>* pair_at(int row0, int row, int column) const { return reinterpret_cast<Pair<T>*>(element(row0, row, column)); }

    // blocks (row0, column0) (row0 + 8, column0) (row0, column0 + 8) (row0 + 8, column0 + 8), pairs along the columns
    DEVICE void rows(Pair<T>& p0, Pair<T>& p1, Pair<T>& p2, Pair<T>& p3, int row0, int column0) const {
        const int lane = lane_id();
        if constexpr (SIZE == 2) {
            uint32_t r[4];
            ldmatrix_x4(r, element(row0, lane & 15, column0 + (lane >> 4) * 8));
            p0 = r[0], p1 = r[1], p2 = r[2], p3 = r[3];
        } else {
            const int row = lane / 4, column = column0 + 2 * (lane % 4);
            p0 = *pair_at(row0, row, column), p1 = *pair_at(row0, row + 8, column);
            p2 = *pair_at(row0, row, column + 8), p3 = *pair_at(row0, row + 8, column + 8);
        }
    }
    // the same four as right operands: (p0, p1) of rows row0 on, (p2, p3) of rows row0 + 8 on, in registers side by side
    DEVICE void right_rows(Pair<T>& p0, Pair<T>& p1, Pair<T>& p2, Pair<T>& p3, int row0, int column0) const {
        if constexpr (SIZE == 2) {
            const int lane = lane_id();
            uint32_t r[4];
            ldmatrix_x4(r, element(row0, (lane & 7) + (lane >> 4) * 8, column0 + ((lane >> 3) & 1) * 8));
            p0 = r[0], p1 = r[1], p2 = r[2], p3 = r[3];
        } else {
            rows(p0, p2, p1, p3, row0, column0);
        }
    }
    DEVICE void right_columns(Pair<T>& p0, Pair<T>& p1, Pair<T>& p2, Pair<T>& p3, int column0, int row0) const {
        if constexpr (SIZE == 2) {
            const int lane = lane_id();
            uint32_t r[4];
            ldmatrix_x4_trans(r, element(row0, lane & 15, column0 + (lane >> 4) * 8));
            p0 = r[0], p1 = r[1], p2 = r[2], p3 = r[3];
        } else {
            columns(p0, p2, p1, p3, column0, row0);
        }
    }
    // the transposed matrix's blocks: (column0, row0) (column0 + 8, row0) (column0, row0 + 8) (column0 + 8, row0 + 8), pairs along the rows here
    DEVICE void columns(Pair<T>& p0, Pair<T>& p1, Pair<T>& p2, Pair<T>& p3, int column0, int row0) const {
        const int lane = lane_id();
        if constexpr (SIZE == 2) {
            uint32_t r[4];
            ldmatrix_x4_trans(r, element(row0, (lane & 7) + (lane >> 4) * 8, column0 + ((lane >> 3) & 1) * 8));
            p0 = r[0], p1 = r[1], p2 = r[2], p3 = r[3];
        } else {
            const int column = column0 + lane / 4, row = 2 * (lane % 4);
            p0 = make_float2(*element(row0, row, column), *element(row0, row + 1, column));
            p1 = make_float2(*element(row0, row, column + 8), *element(row0, row + 1, column + 8));
            p2 = make_float2(*element(row0, row + 8, column), *element(row0, row + 9, column));
            p3 = make_float2(*element(row0, row + 8, column + 8), *element(row0, row + 9, column + 8));
        }
    }
};

#endif
