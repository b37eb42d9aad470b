// Products of a chunk's 16-token rows, a warp each, that slow_core's launches share: scores, their product with rows, and fragments of states as tiles.
// The file that includes it says DTYPE, SIDE, KEYS, VALUES, DECAYED and KEY_SLICE as macros (see there).
#ifndef TITANS_SLOW_CHUNKS_CUH
#define TITANS_SLOW_CHUNKS_CUH

#include "factors.cuh"
#include "tiles.cuh"

constexpr int KEY_BLOCKS = (KEYS + 15) / 16, VALUE_BLOCKS = (VALUES + 15) / 16, BLOCKS = SIDE / 16, THREADS = 2 * SIDE, SIZE = sizeof(DTYPE);
constexpr int TRIANGLE = SIDE < 32 ? 32 : SIDE, LINE = 2 * SIDE + 4;

using KeyTile = Tile<DTYPE, KEY_SLICE>;
using TokenTile = Tile<DTYPE, TRIANGLE>;

// The scores of the warp's 16 rows, all but those above the diagonal, plus those over this slice of columns
template <int COLUMNS> DEVICE void add_scores(float (&sums)[2 * BLOCKS][4], const Tile<DTYPE, COLUMNS>& left, const Tile<DTYPE, COLUMNS>& right, int warp) {
#pragma unroll(STEPS_AT_ONCE<DTYPE>)
    for (int s = 0; s < COLUMNS / 16; s++) {
        Pair<DTYPE> a[4], b[4];
        left.rows(a[0], a[1], a[2], a[3], 16 * warp, 16 * s);
#pragma unroll
        for (int j = 0; j < BLOCKS; j++) {
            if (j > warp) break;
            right.right_rows(b[0], b[1], b[2], b[3], 16 * j, 16 * s);
            Product<DTYPE>::add(sums[2 * j], a[0], a[1], a[2], a[3], b[0], b[1]);
            Product<DTYPE>::add(sums[2 * j + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
        }
    }
}

// The warp's 16 rows of scores: scaled, decayed, zero above the diagonal.
DEVICE void mask_scores(float (&sums)[2 * BLOCKS][4], const Log* logs, float scale, int warp) {
    const int r = lane_id() / 4, c = lane_id() % 4;
#pragma unroll
    for (int n = 0; n < 2 * BLOCKS; n++) {
        if (n / 2 > warp) break;
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int row = 16 * warp + r + e / 2 * 8, at = 8 * n + 2 * c + e % 2;
            float x = at <= row ? scale * sums[n][e] : 0.0f;
            if (DECAYED && at <= row) x *= exp_between(logs[row], logs[at]);
            sums[n][e] = x;
        }
    }
}

// The same to shared memory, each row times its gate.
DEVICE void store_scores(const TokenTile& to, const float (&sums)[2 * BLOCKS][4], const float (&gates)[2], int warp) {
    const int r = lane_id() / 4, c = lane_id() % 4;
#pragma unroll
    for (int n = 0; n < 2 * BLOCKS; n++) {
        if (n / 2 > warp) break;
#pragma unroll
        for (int half = 0; half < 2; half++)
            *to.pair_at(16 * warp, 8 * half + r, 8 * n + 2 * c) = Make<DTYPE>::pair_of(gates[half] * sums[n][2 * half], gates[half] * sums[n][2 * half + 1]);
    }
}

// sums += (scores^T rows) for the warp's 16 columns of the scores
template <int COLUMNS> DEVICE void add_turned(float (&sums)[COLUMNS / 8][4], const TokenTile& scores, const Tile<DTYPE, COLUMNS>& rows, int warp, int length) {
#pragma unroll 1
    for (int i = warp; i < BLOCKS; i++) {
        if (16 * i >= length) break;
        Pair<DTYPE> a[4], b[4];
        scores.columns(a[0], a[1], a[2], a[3], 16 * warp, 16 * i);
#pragma unroll
        for (int n = 0; n < COLUMNS / 16; n++) {
            rows.right_columns(b[0], b[1], b[2], b[3], 16 * n, 16 * i);
            Product<DTYPE>::add(sums[2 * n], a[0], a[1], a[2], a[3], b[0], b[1]);
            Product<DTYPE>::add(sums[2 * n + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
        }
    }
}

// The warp's 16 rows of sums to device memory, `columns` of them
template <int COLUMNS, bool PAIRS> DEVICE void store_rows(DTYPE* to, int64_t stride, const float (&sums)[COLUMNS / 8][4], int warp, int length, int columns) {
    const int r = lane_id() / 4, c = lane_id() % 4;
#pragma unroll
    for (int n = 0; n < COLUMNS / 8; n++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int token = 16 * warp + 8 * half + r, at = 8 * n + 2 * c;
            if (token < length) store_pair<PAIRS>(to + token * stride + at, sums[n][2 * half], sums[n][2 * half + 1], columns - at);
        }
    }
}

// Fragments of ROWS values of S, of E, of both, as tiles of value rows; their product's sum of this thread, where both are there.
template <int ROWS> DEVICE float load_states(const KeyTile& to, const DTYPE* from, const KeyTile& other_to, const DTYPE* other, int value_block, int key_block) {
    constexpr int KEY_PARTS = KEY_SLICE / 16;
    float sum = 0.0f;
#pragma unroll 2
    for (int i = threadIdx.x / 32; i < ROWS / 16 * KEY_PARTS; i += THREADS / 32) {
        const int value = i / KEY_PARTS, key = i % KEY_PARTS, r = lane_id() / 4, c = lane_id() % 4;
        const bool inside = value_block + value < VALUE_BLOCKS && key_block + key < KEY_BLOCKS;
        const int64_t at = (static_cast<int64_t>(value_block + value) * KEY_BLOCKS + key_block + key) * 256;
        alignas(16) Pair<DTYPE> x[4] = {Make<DTYPE>::zero(), Make<DTYPE>::zero(), Make<DTYPE>::zero(), Make<DTYPE>::zero()}, y[4] = {x[0], x[1], x[2], x[3]};
        if (inside) {
#pragma unroll
            for (int part = 0; part < SIZE / 2; part++) {
                if (from) reinterpret_cast<uint4*>(x)[part] = reinterpret_cast<const uint4*>(from + at)[32 * part + lane_id()];
                if (other) reinterpret_cast<uint4*>(y)[part] = reinterpret_cast<const uint4*>(other + at)[32 * part + lane_id()];
            }
        }
#pragma unroll
        for (int j = 0; j < 4; j++) {
            if (from) *to.pair_at(16 * value + j % 2 * 8 + r, 16 * key + j / 2 * 8 + 2 * c) = x[j];
            if (other) *other_to.pair_at(16 * value + j % 2 * 8 + r, 16 * key + j / 2 * 8 + 2 * c) = y[j];
            const float2 one = Make<DTYPE>::floats(x[j]), two = Make<DTYPE>::floats(y[j]);
            sum += one.x * two.x + one.y * two.y;
        }
    }
    return sum;
}

#endif
