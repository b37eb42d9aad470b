// Tiles between device memory and shared memory, by all threads of a block: asynchronous copies where rows are aligned, else numbers one by one.
#ifndef TITANS_TILES_CUH
#define TITANS_TILES_CUH

#include "fragments.cuh"

// How far loops over a product's inner dimension are unrolled: float32's three products a step leave no registers for a second one.
template <typename T> constexpr int STEPS_AT_ONCE = Dtype<T>::half ? 8 : 1;

// ROWS rows; those from `rows` on and columns from `columns` on become zeros. WIDE: rows start on 16 bytes, and 16 divides those of `columns`.
// To be followed by cp_async_commit, cp_async_wait and a barrier.
template <int ROWS, int THREADS, bool WIDE, typename T, int COLUMNS>
DEVICE void load_tile(const Tile<T, COLUMNS>& tile, const T* from, int64_t stride, int rows, int columns) {
    constexpr int PER = Tile<T, COLUMNS>::PER, PIECES = Tile<T, COLUMNS>::PIECES;
#pragma unroll 4
    for (int i = threadIdx.x; i < ROWS * PIECES; i += THREADS) {
        const int row = i / PIECES, piece = i % PIECES;
        const bool inside = row < rows && piece * PER < columns;
        if constexpr (WIDE) {
            cp_async_16(tile.piece(row, piece), inside ? from + row * stride + piece * PER : from, inside);
        } else {
            alignas(16) T x[PER];
#pragma unroll
            for (int j = 0; j < PER; j++) x[j] = inside && piece * PER + j < columns ? from[row * stride + piece * PER + j] : narrow<T>(0.0f);
            *reinterpret_cast<uint4*>(tile.piece(row, piece)) = *reinterpret_cast<const uint4*>(x);
        }
    }
}

// load_tile, where the threads load the rows in whole rounds: a thread's column stays, so that few addresses are held.
template <int ROWS, int THREADS, bool WIDE, typename T, int COLUMNS>
DEVICE void load_rounds(const Tile<T, COLUMNS>& tile, const T* from, int64_t stride, int rows, int columns) {
    constexpr int PER = Tile<T, COLUMNS>::PER, PIECES = Tile<T, COLUMNS>::PIECES, STEP = THREADS < PIECES ? 1 : THREADS / PIECES;
    if constexpr (WIDE && THREADS % PIECES == 0 && ROWS % STEP == 0) {
        const int thread = fresh(threadIdx.x), row = thread / PIECES, piece = thread % PIECES, left = piece * PER < columns ? rows - row : 0;
        unsigned char* const to = tile.piece(row, piece);
        const T* at = from + row * stride + piece * PER;
#pragma unroll
        for (int i = 0; i < ROWS / STEP; i++) {
            const bool inside = i * STEP < left;
            cp_async_16(STEP % 8 ? tile.piece(row + i * STEP, piece) : to + i * STEP * Tile<T, COLUMNS>::ROW, inside ? at : from, inside);
            at += STEP * stride;
        }
    } else {
        load_tile<ROWS, THREADS, WIDE>(tile, from, stride, rows, columns);
    }
}

// The same by some threads of a block, `thread` of them below THREADS; written so that the compiler knows how many pieces each has.
template <int ROWS, int THREADS, bool WIDE, typename T, int COLUMNS>
DEVICE void load_tile_by(int thread, const Tile<T, COLUMNS>& tile, const T* from, int64_t stride, int rows, int columns) {
    constexpr int PER = Tile<T, COLUMNS>::PER, PIECES = Tile<T, COLUMNS>::PIECES, COUNT = ROWS * PIECES, EACH = (COUNT + THREADS - 1) / THREADS;
    if constexpr (WIDE && THREADS % PIECES == 0) {
        constexpr int STEP = THREADS / PIECES;
        const int row = thread / PIECES, piece = thread % PIECES;
        const T* at = from + row * stride + piece * PER;
        if (COUNT % THREADS == 0 && rows >= ROWS && columns >= COLUMNS) {
#pragma unroll 8
            for (int j = 0; j < EACH; j++, at += STEP * stride) cp_async_16(tile.piece(row + j * STEP, piece), at, true);
            return;
        }
#pragma unroll 2
        for (int j = 0; j < EACH; j++, at += STEP * stride) {
            if (COUNT % THREADS && j * THREADS + thread >= COUNT) break;
            const bool inside = row + j * STEP < rows && piece * PER < columns;
            cp_async_16(tile.piece(row + j * STEP, piece), inside ? at : from, inside);
        }
    } else {
#pragma unroll 1
        for (int i = thread; i < COUNT; i += THREADS) {
            const int row = i / PIECES, piece = i % PIECES;
            const bool inside = row < rows && piece * PER < columns;
            alignas(16) T x[PER];
#pragma unroll
            for (int j = 0; j < PER; j++) x[j] = inside && piece * PER + j < columns ? from[row * stride + piece * PER + j] : narrow<T>(0.0f);
            *reinterpret_cast<uint4*>(tile.piece(row, piece)) = *reinterpret_cast<const uint4*>(x);
        }
    }
}

// A tile's rows below `rows` and columns below `columns` to device memory; WIDE: its rows are aligned as above.
template <int ROWS, int THREADS, bool WIDE, typename T, int COLUMNS>
DEVICE void store_tile(const Tile<T, COLUMNS>& tile, T* to, int64_t stride, int rows, int columns) {
    constexpr int PER = Tile<T, COLUMNS>::PER, PIECES = Tile<T, COLUMNS>::PIECES;
#pragma unroll 4
    for (int i = threadIdx.x; i < ROWS * PIECES; i += THREADS) {
        const int row = i / PIECES, piece = i % PIECES;
        if (row >= rows || piece * PER >= columns) continue;
        if constexpr (WIDE) {
            *reinterpret_cast<uint4*>(to + row * stride + piece * PER) = *reinterpret_cast<const uint4*>(tile.piece(row, piece));
        } else {
            const T* x = reinterpret_cast<const T*>(tile.piece(row, piece));
#pragma unroll
            for (int j = 0; j < PER; j++)
                if (piece * PER + j < columns) to[row * stride + piece * PER + j] = x[j];
        }
    }
}

// The blocks of a 16 x 8 sum as half of a product's left operand over those 8 columns, rounded.
template <typename T> DEVICE void as_operand(Pair<T> (&to)[4], const float (&left)[4], const float (&right)[4]) {
    to[0] = Make<T>::pair_of(left[0], left[1]), to[1] = Make<T>::pair_of(left[2], left[3]);
    to[2] = Make<T>::pair_of(right[0], right[1]), to[3] = Make<T>::pair_of(right[2], right[3]);
}

// Two neighbours of a row to device memory, where `columns` are left of it; PAIRS: both at once.
template <bool PAIRS, typename T> DEVICE void store_pair(T* to, float first, float second, int columns) {
    if constexpr (PAIRS) {
        if (columns > 0) *reinterpret_cast<Pair<T>*>(to) = Make<T>::pair_of(first, second);
    } else {
        if (columns > 0) to[0] = narrow<T>(first);
        if (columns > 1) to[1] = narrow<T>(second);
    }
}

// An 8 x 8 block of sums, (r, 2c) and (r, 2c + 1) in lane 4 r + c, turned around, to device memory: column r of its rows 2c and 2c + 1, below `rows` and
// `columns`. PAIRS: two neighbours of a row may be stored at once.
template <bool PAIRS, typename T> DEVICE void store_turned(T* to, int64_t stride, float first, float second, int rows, int columns) {
    const int r = lane_id() / 4, c = lane_id() % 4;
    if constexpr (Dtype<T>::half) {
        const uint32_t both = transposed(pair<T>(first, second));
        to += r * stride + 2 * c;
        if (r < rows && 2 * c < columns) {
            if constexpr (PAIRS) {
                *reinterpret_cast<uint32_t*>(to) = both;
            } else {
                to[0].bits = static_cast<uint16_t>(both);
                if (2 * c + 1 < columns) to[1].bits = static_cast<uint16_t>(both >> 16);
            }
        }
    } else {
        if (2 * c < rows && r < columns) to[2 * c * stride + r] = first;
        if (2 * c + 1 < rows && r < columns) to[(2 * c + 1) * stride + r] = second;
    }
}

// An 8 x 8 block of sums, (r, 2c) and (r, 2c + 1) in lane 4 r + c, turned around into a tile: its columns become rows from `row` on.
template <typename T, int COLUMNS> DEVICE void put_turned(const Tile<T, COLUMNS>& tile, int row, int column, float first, float second) {
    const int r = lane_id() / 4, c = lane_id() % 4;
    if constexpr (Dtype<T>::half) {
        *tile.pair_at(row, r, column + 2 * c) = transposed(pair<T>(first, second));
    } else {
        *tile.element(row, 2 * c, column + r) = first;
        *tile.element(row, 2 * c + 1, column + r) = second;
    }
}

#endif
