// What the passes of the delta rule over blocks of SIDE tokens share: where a block's factors lie between them, and tiles turned around.
// A block and v head has a place = slot * heads + head (chunks.cuh). There lie, made by delta_prepare.cu:
//   inverses, scores   SIDE x SIDE numbers of DTYPE, only the 16 x 16 squares on and below the diagonal:
//                      A' = Gamma * (I + stril(beta k k^T))^-1 without beta on its right; P = gate scale tril(q k^T) * Gamma
//   lines              float32: weight = beta, lost = beta e^G |k|, write = e^(G_C - G) |k|, read = scale gate e^G |q|, then total = e^(G_C)
// (|q|, |k|: the inverse norms under qk_l2norm, else 1), so that all passes work on q, k and v as they are given. States are kept transposed between
// passes, VALUES rows of KEY_WIDTH numbers, zeros beyond the keys.
#ifndef TITANS_DELTA_BLOCKS_CUH
#define TITANS_DELTA_BLOCKS_CUH

#include "chunks.cuh"
#include "tiles.cuh"

constexpr int KEY_WIDTH = KEYS <= 32 ? 32 : KEYS <= 64 ? 64 : 128, KEY_STEPS = KEY_WIDTH / 16;
constexpr int BLOCKS = SIDE / 16, TRIANGLE = SIDE < 32 ? 32 : SIDE, SIZE = sizeof(DTYPE), PIECE = 16 / SIZE;
constexpr int LINES = 4 * SIDE + 4, WEIGHT = 0, LOST = SIDE, WRITE = 2 * SIDE, READ = 3 * SIDE, TOTAL = 4 * SIDE;
constexpr int KEY_BYTES = SIDE * KEY_WIDTH * SIZE, SQUARE_BYTES = SIDE * TRIANGLE * SIZE, LINES_BYTES = (4 * LINES + 127) / 128 * 128;

using KeyTile = Tile<DTYPE, KEY_WIDTH>;
using Square = Tile<DTYPE, TRIANGLE>;

// load_tile (tiles.cuh) by few instructions a copy: a thread stays in its column, and what the mixing of pieces makes of its rows repeats every 8 of them.
template <int ROWS, int THREADS, bool WIDE, typename T, int COLUMNS>
DEVICE void copy_rows(const Tile<T, COLUMNS>& tile, const T* from, int64_t stride, int rows, int columns) {
    if constexpr (WIDE) {
        constexpr int PIECES = Tile<T, COLUMNS>::PIECES, STEP = THREADS / PIECES, PERIOD = STEP >= 8 ? 1 : 8 / STEP;
        static_assert(THREADS % PIECES == 0 && (8 % STEP == 0 || STEP % 8 == 0), "threads take whole rows");
        const int row = threadIdx.x / PIECES, piece = threadIdx.x % PIECES, left = piece * Tile<T, COLUMNS>::PER < columns ? rows - row : 0;
        const T* at = from + row * stride + piece * Tile<T, COLUMNS>::PER;
        unsigned char* to[PERIOD];
#pragma unroll
        for (int i = 0; i < PERIOD; i++) to[i] = tile.piece(row + i * STEP, piece);
#pragma unroll
        for (int i = 0; i * STEP < ROWS; i++) {
            if (STEP > ROWS && row >= ROWS) break;
            cp_async_16(to[i % PERIOD] + i / PERIOD * PERIOD * STEP * Tile<T, COLUMNS>::ROW, at, i * STEP < left);
            at += STEP * stride;
        }
    } else {
        load_tile<ROWS, THREADS, false>(tile, from, stride, rows, columns);
    }
}

// the lower squares of a place, asynchronously; THREADS threads with numbers from 0 on
template <int THREADS> DEVICE void load_square(const Square& tile, const DTYPE* from) {
    constexpr int PIECES = SIDE / PIECE, STEP = THREADS / PIECES, PERIOD = STEP >= 8 ? 1 : 8 / STEP;
    static_assert(THREADS % PIECES == 0 && (8 % STEP == 0 || STEP % 8 == 0), "threads take whole rows");
    const int row = threadIdx.x / PIECES, piece = threadIdx.x % PIECES;
    const DTYPE* const at = from + row * SIDE + piece * PIECE;
    unsigned char* to[PERIOD];
#pragma unroll
    for (int i = 0; i < PERIOD; i++) to[i] = tile.piece(row + i * STEP, piece);
#pragma unroll
    for (int i = 0; i * STEP < SIDE; i++) {
        if (STEP > SIDE && row >= SIDE) break;
        if (piece * PIECE < ((row + i * STEP) / 16 + 1) * 16) cp_async_16(to[i % PERIOD] + i / PERIOD * PERIOD * STEP * Square::ROW, at + i * STEP * SIDE, true);
    }
}
template <int THREADS> DEVICE void store_square(const Square& tile, DTYPE* to) {
    constexpr int PIECES = SIDE / PIECE;
#pragma unroll 4
    for (int i = threadIdx.x; i < SIDE * PIECES; i += THREADS) {
        const int row = i / PIECES, piece = i % PIECES;
        if (piece * PIECE < (row / 16 + 1) * 16) *reinterpret_cast<uint4*>(to + row * SIDE + piece * PIECE) = *reinterpret_cast<const uint4*>(tile.piece(row, piece));
    }
}
template <int THREADS> DEVICE void load_lines(float* lines, const float* from) {
    for (int i = threadIdx.x; i < LINES / 4; i += THREADS) cp_async_16(lines + 4 * i, from + 4 * i, true);
}

// two neighbours of a line
DEVICE float2 two(const float* line) { return *reinterpret_cast<const float2*>(line); }

// the four pairs of an operand, their numbers scaled: a and b are those of the pairs of the first and of the second half
DEVICE void scale_pairs(Pair<DTYPE> (&p)[4], float2 a, float2 b) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 x = Make<DTYPE>::floats(p[i]), by = i < 2 ? a : b;
        p[i] = Make<DTYPE>::pair_of(x.x * by.x, x.y * by.y);
    }
}

// The grid of a call's blocks, and of a sequence's the first slot.
struct Blocked {
    int64_t start, count, batch;  // first token in its batch row, tokens
    int first_slot, blocks;
};
DEVICE Blocked find_sequence(const Grid& grid, int sequence) {
    Blocked found;
    found.start = 0, found.count = grid.tokens, found.batch = sequence, found.first_slot = sequence * grid.slots;
    if (grid.cu_seqlens) {
        found.batch = 0, found.start = load_index(grid.cu_seqlens, sequence, grid.cu_wide);
        found.count = load_index(grid.cu_seqlens, sequence + 1, grid.cu_wide) - found.start;
        found.first_slot = static_cast<int>(found.start / SIDE) + sequence;
    }
    found.blocks = static_cast<int>((found.count + SIDE - 1) / SIDE);
    return found;
}

#endif
