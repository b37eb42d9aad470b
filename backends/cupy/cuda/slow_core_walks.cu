// The two walks of slow_core's backward (SPEC.md 10), from what slow_core_gradients.cu's first launch left of each chunk:
//   slow_core_forward: the states again, S~ = d S, U' = u - w S~, S' = e^G_C S~ + (e^(G_C - G) k)^T U': stores S at every chunk's start, and U';
//   slow_core_reverse: with E the gradient of the state that leaves a chunk, dU' = D + e^(G_C - G) (k E), D = P^T dY, then
//                      E = d (e^G_C E + (scale e^G gate q)^T dO - w^T dU') for the chunk before: stores E before every chunk, and dU'.
// A token and head costs 4 K V and 6 K V FLOP and moves 2 K + 2 V + K V / C and 3 K + 3 V + K V / C numbers. What limits them is the chain: a warp owns 16
// value columns of the state, transposed, in registers from the first chunk to the last, as the next product's operand; of a chunk only the
// two products that need the state wait for it, and two more warps bring its rows, PIECE tokens at a time, STAGES - 1 pieces ahead.
//
// DTYPE; KEYS, VALUES: head_dims; SIDE: tokens of a chunk at most; PIECE: tokens loaded at once; STAGES; WARPS: 16 value columns each; FACTORED: chunk_decay;
// DELTA; REVERSE: which walk; ALIGNED: 16-byte copies can take all rows.
#include "chunks.cuh"
#include "tiles.cuh"

constexpr int KEY_WIDTH = KEYS <= 32 ? 32 : KEYS <= 64 ? 64 : 128, KEY_BLOCKS = (KEYS + 15) / 16, VALUE_BLOCKS = (VALUES + 15) / 16;
constexpr int COLUMNS = WARPS < 2 ? 32 : 16 * WARPS, SLICES = (VALUE_BLOCKS + WARPS - 1) / WARPS, BLOCKS = PIECE / 16;
constexpr int LOADERS = 64, THREADS = 32 * WARPS + LOADERS, SIZE = sizeof(DTYPE);
constexpr int KEY_BYTES = PIECE * KEY_WIDTH * SIZE, VALUE_BYTES = PIECE * COLUMNS * SIZE, LINE = 2 * SIDE + 4, LINE_BYTES = (2 * PIECE + 4) * 4;

struct Params {
    const DTYPE *q, *k, *w, *u, *d_o;  // forward: k, w, u; in reverse all but u
    const float *lines, *begin;  // per chunk and head e^(G_C - G), scale gate e^G and what the state decays by; the initial state or the final one's gradient
    DTYPE *states, *rows;  // fragments of S or E for every chunk; U', or D where dU' goes, [B, T, H, V]
    float* end;  // the final state or the initial one's gradient
    const void* cu_seqlens;
    int64_t q_b, q_t, q_h, k_b, k_t, k_h, w_b, w_t, w_h, u_b, u_t, u_h, do_b, do_t, do_h;
    int heads, group, cu_wide, tokens, chunk_size, slots;
};

using KeyTile = Tile<DTYPE, KEY_WIDTH>;
using ValueTile = Tile<DTYPE, COLUMNS>;

// A product's left operand of 16 x 16 to device memory, 16 bytes of a lane after those of the one before it.
DEVICE void store_fragment(DTYPE* to, const Pair<DTYPE> (&a)[4]) {
    alignas(16) Pair<DTYPE> x[4] = {a[0], a[1], a[2], a[3]};
#pragma unroll
    for (int i = 0; i < SIZE / 2; i++) reinterpret_cast<uint4*>(to)[32 * i + lane_id()] = reinterpret_cast<const uint4*>(x)[i];
}


template <bool REVERSED> DEVICE void walk(const Params& p, unsigned char* memory) {
    constexpr int TILES = 1 + REVERSED + DELTA, VALUES_AT = TILES * KEY_BYTES, LINES_AT = VALUES_AT + (1 + REVERSED) * VALUE_BYTES, STAGE = LINES_AT + LINE_BYTES;
    const int slice = blockIdx.x % SLICES, stream = blockIdx.x / SLICES, head = stream % p.heads, sequence = stream / p.heads, shared_head = head / p.group;
    const int warp = threadIdx.x / 32, lane = lane_id(), r = lane / 4, c = lane % 4, column = slice * 16 * WARPS, value_block = slice * WARPS + warp;
    int64_t start = 0, batch = sequence, count = p.tokens;
    int first_slot = sequence * p.slots;
    if (p.cu_seqlens) {
        batch = 0, start = load_index(p.cu_seqlens, sequence, p.cu_wide), count = load_index(p.cu_seqlens, sequence + 1, p.cu_wide) - start;
        first_slot = static_cast<int>(start / p.chunk_size) + sequence;
    }
    const int chunks = static_cast<int>((count + p.chunk_size - 1) / p.chunk_size), each = (p.chunk_size + PIECE - 1) / PIECE;
    const int last_length = static_cast<int>(count - static_cast<int64_t>(chunks - 1) * p.chunk_size), last_pieces = (last_length + PIECE - 1) / PIECE;
    const int pieces = chunks ? (chunks - 1) * each + last_pieces : 0;
    const DTYPE* q = p.q + batch * p.q_b + start * p.q_t + shared_head * p.q_h;
    const DTYPE* k = p.k + batch * p.k_b + start * p.k_t + shared_head * p.k_h;
    const DTYPE* w = p.w + batch * p.w_b + start * p.w_t + head * p.w_h;
    const DTYPE* d_o = p.d_o + batch * p.do_b + start * p.do_t + head * p.do_h + column;
    const int64_t row_t = static_cast<int64_t>(p.heads) * VALUES;
    DTYPE* const rows = p.rows + (batch * p.tokens + start) * row_t + head * VALUES + column;
    const DTYPE* u = REVERSED ? rows : p.u + batch * p.u_b + start * p.u_t + head * p.u_h + column;
    const int64_t u_t = REVERSED ? row_t : p.u_t;
    const int loader = static_cast<int>(threadIdx.x) - 32 * WARPS;  // negative: this warp walks
    const int mine = VALUES - column < 16 * WARPS ? VALUES - column : 16 * WARPS;

    const auto load = [&](int number) {
        if (number < pieces) {
            int chunk, piece;
            if (REVERSED) {
                const bool in_last = number < last_pieces;
                chunk = in_last ? chunks - 1 : chunks - 2 - (number - last_pieces) / each, piece = in_last ? number : (number - last_pieces) % each;
            } else {
                chunk = number / each, piece = number % each;
            }
            const int length = (chunk == chunks - 1 ? last_length : p.chunk_size) - piece * PIECE;
            const int64_t from = static_cast<int64_t>(chunk) * p.chunk_size + piece * PIECE;
            unsigned char* const base = memory + number % STAGES * STAGE;
            load_tile_by<PIECE, LOADERS, ALIGNED>(loader, KeyTile{base}, k + from * p.k_t, p.k_t, length, KEYS);
            if (REVERSED) load_tile_by<PIECE, LOADERS, ALIGNED>(loader, KeyTile{base + KEY_BYTES}, q + from * p.q_t, p.q_t, length, KEYS);
            if (DELTA) load_tile_by<PIECE, LOADERS, ALIGNED>(loader, KeyTile{base + (1 + REVERSED) * KEY_BYTES}, w + from * p.w_t, p.w_t, length, KEYS);
            load_tile_by<PIECE, LOADERS, ALIGNED>(loader, ValueTile{base + VALUES_AT}, u + from * u_t, u_t, length, mine);
            if (REVERSED) load_tile_by<PIECE, LOADERS, ALIGNED>(loader, ValueTile{base + VALUES_AT + VALUE_BYTES}, d_o + from * p.do_t, p.do_t, length, mine);
            const float* line = p.lines + (static_cast<int64_t>(first_slot + chunk) * p.heads + head) * LINE;
            for (int i = loader; i < LINE_BYTES / 16; i += LOADERS) {
                const int at = i < PIECE / 4 ? piece * PIECE + 4 * i : i < PIECE / 2 ? SIDE + piece * PIECE + 4 * i - PIECE : 2 * SIDE;
                cp_async_16(base + LINES_AT + 16 * i, line + at, true);
            }
        }
        cp_async_commit();
    };
    if (loader >= 0) {
        for (int i = 0; i < STAGES - 1; i++) load(i);
#pragma unroll 1
        for (int i = 0; i < pieces; i++) {
            cp_async_wait<STAGES - 2>();
            barrier_sync(1, THREADS);
            load(i + STAGES - 1);
        }
        return;
    }

    float state[2 * KEY_BLOCKS][4];
    const int64_t place = (static_cast<int64_t>(sequence) * p.heads + head) * (KEYS * VALUES);
#pragma unroll
    for (int n = 0; n < 2 * KEY_BLOCKS; n++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int key = 8 * n + 2 * c + e % 2, value = column + 16 * warp + r + e / 2 * 8;
            state[n][e] = p.begin && key < KEYS && value < VALUES ? p.begin[place + key * VALUES + value] : 0.0f;
        }
    }
    const auto scale_state = [&](float by) {
#pragma unroll
        for (int n = 0; n < 2 * KEY_BLOCKS; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) state[n][e] *= by;
    };

    int number = 0;
#pragma unroll 1
    for (int step = 0; step < chunks; step++) {
        const int chunk = REVERSED ? chunks - 1 - step : step, length = chunk == chunks - 1 ? last_length : p.chunk_size;
        Pair<DTYPE> read[KEY_BLOCKS][4];
        float total = 1.0f;
#pragma unroll 1
        for (int piece = 0; piece * PIECE < length; piece++, number++) {
            barrier_sync(1, THREADS);
            unsigned char* const base = memory + number % STAGES * STAGE;
            const KeyTile keys{base}, queries{base + KEY_BYTES}, ws{base + (1 + REVERSED) * KEY_BYTES};
            const ValueTile us{base + VALUES_AT}, d_os{base + VALUES_AT + VALUE_BYTES};
            const float* const left = reinterpret_cast<const float*>(base + LINES_AT);
            const float* const pull = left + PIECE;
            if (piece == 0) {
                total = left[2 * PIECE];
                DTYPE* const to = p.states + ((static_cast<int64_t>(first_slot + chunk) * p.heads + head) * VALUE_BLOCKS + value_block) * (KEY_BLOCKS * 256);
#pragma unroll
                for (int s = 0; s < KEY_BLOCKS; s++) {
                    as_operand<DTYPE>(read[s], state[2 * s], state[2 * s + 1]);
                    if (p.states && value_block < VALUE_BLOCKS) store_fragment(to + 256 * s, read[s]);
                }
                if (FACTORED && !REVERSED) {
                    scale_state(total);
#pragma unroll
                    for (int s = 0; s < KEY_BLOCKS; s++) as_operand<DTYPE>(read[s], state[2 * s], state[2 * s + 1]);
                }
                if (!FACTORED) scale_state(total);
            }
            float x[BLOCKS][2][4] = {};
            if constexpr (REVERSED || DELTA) {
#pragma unroll
                for (int s = 0; s < KEY_BLOCKS; s++) {
#pragma unroll
                    for (int i = 0; i < BLOCKS; i++) {
                        Pair<DTYPE> b[4];
                        (REVERSED ? keys : ws).right_rows(b[0], b[1], b[2], b[3], 16 * i, 16 * s);
                        Product<DTYPE>::add(x[i][0], read[s][0], read[s][1], read[s][2], read[s][3], b[0], b[1]);
                        Product<DTYPE>::add(x[i][1], read[s][0], read[s][1], read[s][2], read[s][3], b[2], b[3]);
                    }
                }
            }
#pragma unroll
            for (int i = 0; i < BLOCKS; i++) {
                Pair<DTYPE> a[4], b[4];
                us.columns(b[0], b[1], b[2], b[3], 16 * warp, 16 * i);
                float update[2][4];
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int at = 16 * i + 8 * half + 2 * c;
                    const float2 by = *reinterpret_cast<const float2*>(left + at);
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        const float2 given = Make<DTYPE>::floats(b[2 * half + e]);
                        const float xs[2] = {x[i][half][2 * e], x[i][half][2 * e + 1]};
                        const float one = REVERSED ? given.x + by.x * xs[0] : given.x - xs[0], other = REVERSED ? given.y + by.y * xs[1] : given.y - xs[1];
                        update[half][2 * e] = REVERSED ? -one : by.x * one, update[half][2 * e + 1] = REVERSED ? -other : by.y * other;
                        x[i][half][2 * e] = one, x[i][half][2 * e + 1] = other;
                    }
                }
                if constexpr (!REVERSED || DELTA) {
                    as_operand<DTYPE>(a, update[0], update[1]);
#pragma unroll
                    for (int n = 0; n < KEY_BLOCKS; n++) {
                        (REVERSED ? ws : keys).right_columns(b[0], b[1], b[2], b[3], 16 * n, 16 * i);
                        Product<DTYPE>::add(state[2 * n], a[0], a[1], a[2], a[3], b[0], b[1]);
                        Product<DTYPE>::add(state[2 * n + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
                    }
                }
                if constexpr (REVERSED) {
                    d_os.columns(a[0], a[1], a[2], a[3], 16 * warp, 16 * i);
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        const float2 by = *reinterpret_cast<const float2*>(pull + 16 * i + j / 2 * 8 + 2 * c), given = Make<DTYPE>::floats(a[j]);
                        a[j] = Make<DTYPE>::pair_of(by.x * given.x, by.y * given.y);
                    }
#pragma unroll
                    for (int n = 0; n < KEY_BLOCKS; n++) {
                        queries.right_columns(b[0], b[1], b[2], b[3], 16 * n, 16 * i);
                        Product<DTYPE>::add(state[2 * n], a[0], a[1], a[2], a[3], b[0], b[1]);
                        Product<DTYPE>::add(state[2 * n + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
                    }
                }
            }
            if (!p.rows) continue;
            DTYPE* const to = rows + (static_cast<int64_t>(chunk) * p.chunk_size + piece * PIECE) * row_t + 16 * warp;
#pragma unroll
            for (int i = 0; i < 2 * BLOCKS; i++) {
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const float one = x[i / 2][i % 2][2 * e], other = x[i / 2][i % 2][2 * e + 1];
                    const int tokens = length - piece * PIECE - 8 * i;
                    store_turned<VALUES % 2 == 0>(to + 8 * i * row_t + 8 * e, row_t, one, other, tokens, mine - 16 * warp - 8 * e);
                }
            }
        }
        if (FACTORED && REVERSED) scale_state(total);
    }
    if (!p.end) return;
#pragma unroll
    for (int n = 0; n < 2 * KEY_BLOCKS; n++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int key = 8 * n + 2 * c + e % 2, value = column + 16 * warp + r + e / 2 * 8;
            if (key < KEYS && value < VALUES) p.end[place + key * VALUES + value] = state[n][e];
        }
    }
}

#if REVERSE
#define WALK slow_core_reverse
#else
#define WALK slow_core_forward
#endif
extern "C" __global__ void __launch_bounds__(THREADS) WALK(const __grid_constant__ Params p) {
    SHARED_MEMORY(memory);
    walk<REVERSE != 0>(p, memory);
}
