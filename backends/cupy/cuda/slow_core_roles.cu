// slow_core in one launch whose warps have roles (SPEC.md 4): S~ = d S, U' = u - w S~, o = gate (scale e^G q S~ + (tril(scale q k^T) * Gamma) U'),
// S' = e^G_C S~ + (e^(G_C - G) k)^T U'.
//   walkers   own 16 value columns of a state each, transposed, in registers: of a chunk only w S~ and k^T U' are on their way; S~ and U' they hand on, rounded
//   readers   are a chunk behind: 16 tokens each of the scores, which stay in registers as the operand of their product with U', and of q S~: they write o
//   a loader  brings the tiles of chunks to come, and the clerk the next chunk's running decay and gates
// All meet once a chunk. A token and head costs C (K + V) + 6 K V FLOP and moves 3 K + 2 V numbers (C K FLOP and 3 K from the L2 cache again for each slice of
// columns): bound by memory for many heads (H100, bf16, 1 x 8192, 32 heads of 128: 336 MB, 113 us). For few heads what limits it is a walker's chain, of 64
// tokens and K = 128 128 products of 16 x 8 x 16, about 1100 cycles, and what all warps read from shared memory, about 2000 for 32 columns.
//
// DTYPE; KEYS, VALUES: head_dims; SIDE: tokens of a tile, 16 to 128; WARPS: walkers; DEPTH: chunks loaded ahead; RESIDENT: blocks of a processor; GROUPS:
// of readers, two take turns, each with two meetings for a chunk; DECAYED: g; FACTORED: chunk_decay; DELTA; ALIGNED: 16-byte copies can take all rows.
#include "chunks.cuh"
#include "tiles.cuh"

constexpr int KEY_WIDTH = KEYS <= 32 ? 32 : KEYS <= 64 ? 64 : 128, KEY_BLOCKS = (KEYS + 15) / 16, VALUE_BLOCKS = (VALUES + 15) / 16;
constexpr int COLUMNS = WARPS < 2 ? 32 : 16 * WARPS, SLICES = (VALUE_BLOCKS + WARPS - 1) / WARPS, BLOCKS = SIDE / 16, SIZE = sizeof(DTYPE);
constexpr int READERS = BLOCKS < 4 ? BLOCKS : 4, FIRST = READERS < 2 ? READERS : 2, THREADS = 32 * (WARPS + GROUPS * READERS + 2);
constexpr int LOADERS = KEYS <= 64 ? 32 : 64;  // wide heads: the clerk loads as well
constexpr int KEY_BYTES = SIDE * KEY_WIDTH * SIZE, VALUE_BYTES = SIDE * COLUMNS * SIZE, READ_STAGE = 2 * KEY_BYTES, WALK_STAGE = DELTA * KEY_BYTES + VALUE_BYTES;
constexpr int FRAGMENT = 256 * SIZE, HANDED = WARPS * (KEY_BLOCKS + BLOCKS) * FRAGMENT;  // of 16 x 16; S~ of every walker, then U'
constexpr int WALK_AT = (DEPTH + 2) * READ_STAGE, HANDED_AT = WALK_AT + (DEPTH + 1) * WALK_STAGE, LINES_AT = HANDED_AT + 2 * HANDED;
constexpr int TOKENS_AT_ONCE = BLOCKS < 2 ? 1 : SIZE == 4 || BLOCKS < 4 || (THREADS > 256 && KEYS > 64) ? 2 : 4;  // blocks of 16 whose products a walker mixes
static_assert(GROUPS == 1 || BLOCKS <= READERS, "a reader keeps the scores of one block of rows");
constexpr int TOGETHER = WARPS < 2 ? 1 : 2;  // walkers whose columns a reader has at once
constexpr int LANES = (SIDE + 31) / 32;

struct Params {
    const DTYPE *q, *k, *u, *w;
    const void *g, *decay, *gate;
    const float* initial;
    DTYPE* o;
    float* final;
    const void* cu_seqlens;
    int64_t q_b, q_t, q_h, k_b, k_t, k_h, u_b, u_t, u_h, w_b, w_t, w_h, g_b, g_t, g_h, decay_b, decay_m, decay_h, gate_b, gate_t, gate_h;
    int heads, group, g_wide, decay_wide, gate_wide, cu_wide, tokens, chunk_size;
    float scale;
};

struct alignas(16) Lines {
    Log log[SIDE];
    float left[SIDE], pull[SIDE], gate[SIDE], total, unused[3];  // e^(G_C - G), scale e^G; what the state decays by
};

// What the clerk has fetched of a chunk: token `lane` of every 32.
struct Fetched { float g[LANES], gate[LANES], factor; };

using KeyTile = Tile<DTYPE, KEY_WIDTH>;
using ValueTile = Tile<DTYPE, COLUMNS>;

// A product's left operand of 16 x 16 in shared memory, 16 bytes of a lane after those of the one before it.
DEVICE void store_fragment(unsigned char* to, const Pair<DTYPE> (&a)[4]) {
    alignas(16) Pair<DTYPE> x[4] = {a[0], a[1], a[2], a[3]};
#pragma unroll
    for (int i = 0; i < SIZE / 2; i++) reinterpret_cast<uint4*>(to)[32 * i + lane_id()] = reinterpret_cast<const uint4*>(x)[i];
}
DEVICE void load_fragment(Pair<DTYPE> (&a)[4], const unsigned char* from) {
    alignas(16) Pair<DTYPE> x[4];
#pragma unroll
    for (int i = 0; i < SIZE / 2; i++) reinterpret_cast<uint4*>(x)[i] = reinterpret_cast<const uint4*>(from)[32 * i + lane_id()];
#pragma unroll
    for (int i = 0; i < 4; i++) a[i] = x[i];
}

// A walker's chunk: from its tiles and lines, hands on S~ and U', leaves the state behind the chunk.
DEVICE void walk_chunk(float (&state)[2 * KEY_BLOCKS][4], int walker, int length, const Lines& lines, const KeyTile& keys, const KeyTile& ws, const ValueTile& us,
                       unsigned char* handed) {
    const int c = lane_id() % 4;
    const float total = lines.total;
    const auto decay = [&]() {
#pragma unroll
        for (int n = 0; n < 2 * KEY_BLOCKS; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) state[n][e] *= total;
    };
    if (FACTORED) decay();
    Pair<DTYPE> read[KEY_BLOCKS][4];
#pragma unroll
    for (int s = 0; s < KEY_BLOCKS; s++) {
        as_operand<DTYPE>(read[s], state[2 * s], state[2 * s + 1]);
        store_fragment(handed + (walker * KEY_BLOCKS + s) * FRAGMENT, read[s]);
    }
    if (DECAYED) decay();
#pragma unroll 1
    for (int first = 0; first < BLOCKS; first += TOKENS_AT_ONCE) {
        if (16 * first >= length) break;
        float x[TOKENS_AT_ONCE][2][4] = {};
        if constexpr (DELTA) {
#pragma unroll
            for (int s = 0; s < KEY_BLOCKS; s++) {
#pragma unroll
                for (int i = 0; i < TOKENS_AT_ONCE; i++) {
                    Pair<DTYPE> b[4];
                    ws.right_rows(b[0], b[1], b[2], b[3], 16 * (first + i), 16 * s);
                    Product<DTYPE>::add(x[i][0], read[s][0], read[s][1], read[s][2], read[s][3], b[0], b[1]);
                    Product<DTYPE>::add(x[i][1], read[s][0], read[s][1], read[s][2], read[s][3], b[2], b[3]);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < TOKENS_AT_ONCE; i++) {
            Pair<DTYPE> a[4], b[4];
            us.columns(b[0], b[1], b[2], b[3], 16 * walker, 16 * (first + i));
#pragma unroll
            for (int half = 0; half < 2; half++) {
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const float2 given = Make<DTYPE>::floats(b[2 * half + e]);
                    x[i][half][2 * e] = given.x - x[i][half][2 * e], x[i][half][2 * e + 1] = given.y - x[i][half][2 * e + 1];
                }
            }
            as_operand<DTYPE>(a, x[i][0], x[i][1]);
            store_fragment(handed + (WARPS * KEY_BLOCKS + walker * BLOCKS + first + i) * FRAGMENT, a);
            if (DECAYED) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const float2 by = *reinterpret_cast<const float2*>(lines.left + 16 * (first + i) + 8 * half + 2 * c);
#pragma unroll
                    for (int e = 0; e < 2; e++) x[i][half][2 * e] *= by.x, x[i][half][2 * e + 1] *= by.y;
                }
                as_operand<DTYPE>(a, x[i][0], x[i][1]);
            }
#pragma unroll
            for (int n = 0; n < KEY_BLOCKS; n++) {
                keys.right_columns(b[0], b[1], b[2], b[3], 16 * n, 16 * (first + i));
                Product<DTYPE>::add(state[2 * n], a[0], a[1], a[2], a[3], b[0], b[1]);
                Product<DTYPE>::add(state[2 * n + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
            }
        }
    }
}

// A reader's scores of the 16 tokens from 16 row on, as right operands: of 16 tokens that were written, for 8 tokens of o, of the first and the last 8.
// REACH: blocks of 16 tokens from the chunk's first on, row among them: a bound that the compiler knows.
using Factors = Pair<DTYPE>[BLOCKS][2][2];
template <int REACH> DEVICE void score_rows(Factors& factors, int row, float scale, const Lines& lines, const KeyTile& queries, const KeyTile& keys) {
    const int r = lane_id() / 4, c = lane_id() % 4;
    float scores[2 * REACH][4] = {};
#pragma unroll(STEPS_AT_ONCE<DTYPE>)
    for (int s = 0; s < KEY_BLOCKS; s++) {
        Pair<DTYPE> a[4], b[4];
        queries.rows(a[0], a[1], a[2], a[3], 16 * row, 16 * s);
#pragma unroll
        for (int j = 0; j < REACH; j++) {
            keys.right_rows(b[0], b[1], b[2], b[3], 16 * j, 16 * s);
            Product<DTYPE>::add(scores[2 * j], a[0], a[1], a[2], a[3], b[0], b[1]);
            Product<DTYPE>::add(scores[2 * j + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
        }
    }
    Log of_rows[2];
    if (DECAYED) of_rows[0] = lines.log[16 * row + r], of_rows[1] = lines.log[16 * row + 8 + r];
#pragma unroll
    for (int j = 0; j < REACH; j++) {
#pragma unroll
        for (int n = 0; n < 2; n++) {
            const int at = 16 * j + 8 * n + 2 * c;
            float4 logs;
            if (DECAYED) logs = *reinterpret_cast<const float4*>(lines.log + at);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int token = 16 * row + 8 * half + r;
                float x[2] = {scale * scores[2 * j + n][2 * half], scale * scores[2 * j + n][2 * half + 1]};
                if (DECAYED) x[0] *= exp_between(of_rows[half], Log{logs.x, logs.y}), x[1] *= exp_between(of_rows[half], Log{logs.z, logs.w});
                factors[j][half][n] = Make<DTYPE>::pair_of(at <= token ? x[0] : 0.0f, at < token ? x[1] : 0.0f);
            }
        }
    }
}

// o of those tokens, for all walkers' columns; `o`: the chunk's first token
template <int REACH> DEVICE void write_rows(const Factors& factors, int row, int length, const Lines& lines, const KeyTile& queries, const unsigned char* handed,
                                            DTYPE* o, int64_t stride, int columns) {
    const int c = lane_id() % 4;
#pragma unroll 1
    for (int walker = 0; walker < WARPS; walker += TOGETHER) {
        float sums[TOGETHER][2][4] = {};
#pragma unroll(STEPS_AT_ONCE<DTYPE>)
        for (int s = 0; s < KEY_BLOCKS; s++) {
            Pair<DTYPE> a[4], b[4];
            queries.right_rows(b[0], b[1], b[2], b[3], 16 * row, 16 * s);
#pragma unroll
            for (int i = 0; i < TOGETHER; i++) {
                load_fragment(a, handed + ((walker + i) * KEY_BLOCKS + s) * FRAGMENT);
                Product<DTYPE>::add(sums[i][0], a[0], a[1], a[2], a[3], b[0], b[1]);
                Product<DTYPE>::add(sums[i][1], a[0], a[1], a[2], a[3], b[2], b[3]);
            }
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float2 by = *reinterpret_cast<const float2*>(lines.pull + 16 * row + 8 * half + 2 * c);
#pragma unroll
            for (int i = 0; i < TOGETHER; i++)
#pragma unroll
                for (int e = 0; e < 2; e++) sums[i][half][2 * e] *= by.x, sums[i][half][2 * e + 1] *= by.y;
        }
#pragma unroll
        for (int j = 0; j < REACH; j++) {
#pragma unroll
            for (int i = 0; i < TOGETHER; i++) {
                Pair<DTYPE> a[4];
                load_fragment(a, handed + (WARPS * KEY_BLOCKS + (walker + i) * BLOCKS + j) * FRAGMENT);
#pragma unroll
                for (int half = 0; half < 2; half++) Product<DTYPE>::add(sums[i][half], a[0], a[1], a[2], a[3], factors[j][half][0], factors[j][half][1]);
            }
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int token = 16 * row + 8 * half;
            const float2 gate = *reinterpret_cast<const float2*>(lines.gate + token + 2 * c);
#pragma unroll
            for (int i = 0; i < TOGETHER; i++) {
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const int value = 16 * (walker + i) + 8 * e;
                    const float one = gate.x * sums[i][half][2 * e], other = gate.y * sums[i][half][2 * e + 1];
                    store_turned<VALUES % 2 == 0>(o + token * stride + value, stride, one, other, length - token, columns - value);
                }
            }
        }
    }
}

// The clerk's lines of a chunk.
DEVICE void write_lines(Lines& lines, const Fetched& of, int length, float scale) {
    const int lane = lane_id();
    Log sums[LANES], carried{0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < LANES; i++) {
        Log sum = DECAYED && 32 * i + lane < length ? log_of(of.g[i]) : Log{0.0f, 0.0f};
        if (DECAYED) {
#pragma unroll
            for (int step = 1; step < 32; step *= 2) {
                const float coarse = __shfl_up_sync(0xffffffffu, sum.coarse, step), fine = __shfl_up_sync(0xffffffffu, sum.fine, step);
                if (lane >= step) sum.coarse += coarse, sum.fine += fine;
            }
            sum.coarse += carried.coarse, sum.fine += carried.fine;
            carried.coarse = __shfl_sync(0xffffffffu, sum.coarse, 31), carried.fine = __shfl_sync(0xffffffffu, sum.fine, 31);
        }
        sums[i] = sum;
    }
#pragma unroll
    for (int i = 0; i < LANES; i++) {
        const int token = 32 * i + lane;
        if (token >= SIDE) break;
        lines.log[token] = sums[i], lines.gate[token] = of.gate[i];
        lines.left[token] = DECAYED ? exp_between(carried, sums[i]) : 1.0f, lines.pull[token] = DECAYED ? scale * exp_log(sums[i]) : scale;
    }
    if (lane == 0) lines.total = FACTORED ? of.factor : DECAYED ? exp_log(carried) : 1.0f;
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) slow_core_roles(const __grid_constant__ Params p) {
    SHARED_MEMORY(memory);
    const int slice = blockIdx.x % SLICES, stream = blockIdx.x / SLICES, head = stream % p.heads, sequence = stream / p.heads, shared_head = head / p.group;
    const int warp = threadIdx.x / 32, lane = lane_id(), r = lane / 4, c = lane % 4, column = slice * 16 * WARPS;
    // of a processor's four schedulers walkers and loaders share two, readers the others
    const int walker = warp - FIRST, after = warp - FIRST - WARPS, group = after >= READERS - FIRST;
    const int reader = warp < FIRST ? warp : group ? after - (READERS - FIRST) : READERS - 1 - after;
    const int loader = static_cast<int>(threadIdx.x) - 32 * (WARPS + GROUPS * READERS);
    const bool walks = warp >= FIRST && warp < FIRST + WARPS, is_clerk = loader >= 32, loads = loader >= 0 && loader < LOADERS;

    int64_t start = 0, batch = sequence, count = p.tokens, earlier = 0;
    if (p.cu_seqlens) {
        batch = 0, start = load_index(p.cu_seqlens, sequence, p.cu_wide), count = load_index(p.cu_seqlens, sequence + 1, p.cu_wide) - start;
        if (FACTORED && is_clerk) {
            for (int i = 0; i < sequence; i++) {  // chunk_decay counts the chunks of all sequences
                const int64_t length = load_index(p.cu_seqlens, i + 1, p.cu_wide) - load_index(p.cu_seqlens, i, p.cu_wide);
                earlier += (length + p.chunk_size - 1) / p.chunk_size;
            }
        }
    }
    const int chunks = static_cast<int>((count + p.chunk_size - 1) / p.chunk_size);
    const int last_length = static_cast<int>(count - static_cast<int64_t>(chunks - 1) * p.chunk_size);
    const int mine = VALUES - column < 16 * WARPS ? VALUES - column : 16 * WARPS;
    const auto length_of = [&](int chunk) { return chunk == chunks - 1 ? last_length : p.chunk_size; };
    const DTYPE* q = p.q + batch * p.q_b + start * p.q_t + shared_head * p.q_h;
    const DTYPE* k = p.k + batch * p.k_b + start * p.k_t + shared_head * p.k_h;
    const DTYPE* u = p.u + batch * p.u_b + start * p.u_t + head * p.u_h + column;
    const DTYPE* w = p.w + batch * p.w_b + start * p.w_t + head * p.w_h;
    Lines* const lines = reinterpret_cast<Lines*>(memory + LINES_AT);
    const auto load = [&](int chunk) {
        if (chunk < chunks) {
            const int64_t from = static_cast<int64_t>(chunk) * p.chunk_size;
            const int length = length_of(chunk);
            unsigned char *const read = memory + chunk % (DEPTH + 2) * READ_STAGE, *const walk = memory + WALK_AT + chunk % (DEPTH + 1) * WALK_STAGE;
            if (DELTA) load_tile_by<SIDE, LOADERS, ALIGNED>(loader, KeyTile{walk + VALUE_BYTES}, w + from * p.w_t, p.w_t, length, KEYS);
            load_tile_by<SIDE, LOADERS, ALIGNED>(loader, ValueTile{walk}, u + from * p.u_t, p.u_t, length, mine);
            load_tile_by<SIDE, LOADERS, ALIGNED>(loader, KeyTile{read + KEY_BYTES}, k + from * p.k_t, p.k_t, length, KEYS);
            load_tile_by<SIDE, LOADERS, ALIGNED>(loader, KeyTile{read}, q + from * p.q_t, p.q_t, length, KEYS);
        }
        cp_async_commit();
    };
    const auto fetch = [&](Fetched& to, int chunk) {
        const int length = chunk < chunks ? length_of(chunk) : 0;
        const int64_t token = start + static_cast<int64_t>(chunk) * p.chunk_size + lane;
#pragma unroll
        for (int i = 0; i < LANES; i++) {
            const bool inside = 32 * i + lane < length;
            to.g[i] = DECAYED && inside ? load_gate<DTYPE>(p.g, batch * p.g_b + (token + 32 * i) * p.g_t + head * p.g_h, p.g_wide) : 0.0f;
            to.gate[i] = p.gate && inside ? load_gate<DTYPE>(p.gate, batch * p.gate_b + (token + 32 * i) * p.gate_t + head * p.gate_h, p.gate_wide) : 1.0f;
        }
        to.factor = FACTORED && length ? load_gate<DTYPE>(p.decay, batch * p.decay_b + (earlier + chunk) * p.decay_m + head * p.decay_h, p.decay_wide) : 1.0f;
    };

    float state[2 * KEY_BLOCKS][4];
    const int64_t place = (static_cast<int64_t>(sequence) * p.heads + head) * (KEYS * VALUES);
    Fetched next, later;
    Factors factors;
    if (walks) {
#pragma unroll
        for (int n = 0; n < 2 * KEY_BLOCKS; n++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int key = 8 * n + 2 * c + e % 2, value = column + 16 * walker + r + e / 2 * 8;
                state[n][e] = p.initial && key < KEYS && value < VALUES ? p.initial[place + key * VALUES + value] : 0.0f;
            }
        }
    } else if (loader >= 0) {
        for (int i = 0; i < DEPTH && loads; i++) load(i);
        if (is_clerk && chunks) {
            fetch(later, 0);
            fetch(next, 1);
            write_lines(lines[0], later, length_of(0), p.scale);
            fetch(later, 2);
        }
    }
#pragma unroll 1
    for (int chunk = 0; chunk <= chunks; chunk++) {
        if (loads) cp_async_wait<DEPTH - 1>();
        __syncthreads();
        if (walks) {
            if (chunk == chunks) break;
            unsigned char* const tiles = memory + WALK_AT + chunk % (DEPTH + 1) * WALK_STAGE;
            const KeyTile keys{memory + chunk % (DEPTH + 2) * READ_STAGE + KEY_BYTES};
            unsigned char* const handed = memory + HANDED_AT + chunk % 2 * HANDED;
            walk_chunk(state, walker, length_of(chunk), lines[chunk % 3], keys, KeyTile{tiles + VALUE_BYTES}, ValueTile{tiles}, handed);
        } else if (loader >= 0) {
            if (loads) load(chunk + DEPTH);
            if (!is_clerk) continue;
            if (chunk + 1 < chunks) write_lines(lines[(chunk + 1) % 3], next, length_of(chunk + 1), p.scale);
            next = later;
            fetch(later, chunk + 3);
        } else {
            constexpr int HALF = BLOCKS > 2 ? BLOCKS / 2 : BLOCKS;
            const bool scores = GROUPS == 2 && chunk % 2 == group;
            const int at = scores ? chunk : chunk - 1, length = at >= 0 && at < chunks ? length_of(at) : 0;
            unsigned char* const tiles = memory + (at + DEPTH + 2) % (DEPTH + 2) * READ_STAGE;
            const KeyTile queries{tiles}, keys{tiles + KEY_BYTES};
            const Lines& of = lines[(at + 3) % 3];
            const unsigned char* const handed = memory + HANDED_AT + (at & 1) * HANDED;
            const int64_t stride = static_cast<int64_t>(p.heads) * VALUES;
            DTYPE* const o = p.o + ((batch * p.tokens + start + static_cast<int64_t>(at) * p.chunk_size) * p.heads + head) * VALUES + column;
#pragma unroll 1
            for (int row = reader; row < BLOCKS; row = BLOCKS > READERS && BLOCKS - 1 - row > row ? BLOCKS - 1 - row : BLOCKS) {
                if (16 * row >= length) continue;
                if (GROUPS == 1 || scores) {
                    if (row < HALF) score_rows<HALF>(factors, row, p.scale, of, queries, keys);
                    else score_rows<BLOCKS>(factors, row, p.scale, of, queries, keys);
                }
                if (scores) continue;
                if (row < HALF) write_rows<HALF>(factors, row, length, of, queries, handed, o, stride, mine);
                else write_rows<BLOCKS>(factors, row, length, of, queries, handed, o, stride, mine);
            }
        }
    }
    if (!walks || !p.final) return;
#pragma unroll
    for (int n = 0; n < 2 * KEY_BLOCKS; n++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int key = 8 * n + 2 * c + e % 2, value = column + 16 * walker + r + e / 2 * 8;
            if (key < KEYS && value < VALUES) p.final[place + key * VALUES + value] = state[n][e];
        }
    }
}
