// The exact gated delta rule with a sequence cut into segments that run side by side, in one launch (SPEC.md 4; chunks of 16: delta_chunk.cuh).
//
// A cluster of CLUSTER blocks has one sequence, head and tile of values; a block has SEGMENTS segments in a row, a segment of up to `longest` tokens
// GROUP warps, which share the rows of [transposed state; map]. Tokens are read once, by cp.async, two chunks while the two before are worked on, and stay
// in shared memory.
//   A  Every segment runs its chunks from an empty state and, beside it, from the identity: what it adds to the state (R), what it does to a state that
//      enters it (gamma I - D), what its tokens read of their own segment (over v in place), and what they would read of that state: q_eff (over q).
//   B  A block's maps are composed in a tree (log2 steps through shared memory, 16-bit operands in two parts, rows shared among all warps). After a barrier
//      of the cluster a block fetches its predecessors' maps from their shared memory, all warps at once, and applies them to the initial state in turn;
//      a segment's start follows from the block's by the nodes of the tree before it, log2 of the segments at most.
//   C  Every segment's tokens add q_eff S_start to what they have: no chain any more, and the only write of o.
// Sequences longer than SEGMENTS * CLUSTER * longest go in rounds; the state between rounds is computed by every block for itself.
//
// Floor, bf16, head_dim 32, 12 heads, 1 x 8192: 25 MB, 8 us on an H100. FLOP of a chunk: 80 mma of 4096, 2.1 times the plain recurrence's, 0.16 GFLOP each
// 8192 tokens and head: 2 GFLOP, 4 us at a tenth of the tensor cores' rate. What remains is latency: about 3 us for a pair of chunks with eight warps (most
// of it the chain of products and the inversion), 0.7 us for a composition step or the cluster's barrier, and the launch.
//
// Shared memory: a segment's keys (whose place its map takes when it is done), values, queries; the warps' scratch, which the published map and the
// predecessors' maps share.
//
// DTYPE; KEYS, VALUES: tile sizes, 32 or 64; WARPS, GROUP, CLUSTER.
#include "delta_chunk.cuh"

constexpr int SEGMENTS = WARPS / GROUP, ROWS = VALUES + KEYS, MT = ROWS / 16 / GROUP, BLOCKS = KEYS / 8, STEPS = KEYS / 16, VALUE_TILES = VALUES / 16;
constexpr int OWN_TILES = VALUE_TILES / GROUP > 0 ? VALUE_TILES / GROUP : 1;  // of the values, in the last pass
constexpr int ROW_TILES = ROWS / 16, SHARE = (SEGMENTS / 2 * ROW_TILES + WARPS - 1) / WARPS > 0 ? (SEGMENTS / 2 * ROW_TILES + WARPS - 1) / WARPS : 1;
constexpr bool HALF = Dtype<DTYPE>::half, SCORES_SHARED = HALF && GROUP > 1;
constexpr int PIECE = 16 / sizeof(DTYPE), WORDS = sizeof(DTYPE) / 2;  // of 16 bytes, for four pairs
constexpr int MAP_BYTES = ROWS * KEYS * 4, PUBLISHED_BYTES = KEYS * KEYS * sizeof(DTYPE), START_BYTES = VALUES * KEYS * 4;
// Small maps of all predecessors are fetched at once, by all warps, and folded from the block's own memory: N into the scratch, R into the second parts of
// the segments' maps, which nobody needs any more, and what of it is left into the scratch too.
constexpr bool GATHERED = CLUSTER > 1 && HALF && KEYS == 32;
constexpr int LINE = 512, MAP_LINES = PUBLISHED_BYTES / LINE, OFFSET_LINES = VALUE_TILES * BLOCKS;  // what a warp copies at once
constexpr int AT_ONCE = CLUSTER > 4 ? 4 : CLUSTER > 1 ? CLUSTER - 1 : 1;  // maps
constexpr int OFFSET_SHARE = (OFFSET_LINES + WARPS - 1) / WARPS, MAP_SHARE = (AT_ONCE * MAP_LINES + WARPS - 1) / WARPS;
constexpr int OFFSETS_LEFT = (CLUSTER - 1) * VALUE_TILES > SEGMENTS ? (CLUSTER - 1) * VALUE_TILES - SEGMENTS : 0;
constexpr int SHARED_BY_BLOCKS = PUBLISHED_BYTES + (GATHERED ? (CLUSTER - 1) * PUBLISHED_BYTES + OFFSETS_LEFT * BLOCKS * LINE : START_BYTES);
static_assert(ROWS % (16 * GROUP) == 0 && VALUE_TILES % GROUP == 0 && WARPS % GROUP == 0 && WARPS >= VALUE_TILES, "rows of a segment's warps");
using Keys = Tile<DTYPE, KEYS>;
using Values = Tile<DTYPE, VALUES>;
using Sums = float[BLOCKS][4];  // 16 rows

struct Params {
    const DTYPE *q, *k, *v;
    const void *beta, *g, *gate;  // g and gate may be absent
    const float* initial;         // so may this
    const void* bounds;           // cu_seqlens, or absent
    DTYPE* o;
    float* final;  // or absent
    int64_t q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, beta_b, beta_t, beta_h, g_b, g_t, g_h, gate_b, gate_t, gate_h;
    int tokens, heads, group, keys, values, longest, beta_wide, g_wide, gate_wide, bounds_wide, l2norm, pieces, o_pieces;
    float scale;
};

// 16 rows of float32 as the lanes of a warp hold them
struct Rows {
    float4* base;
    DEVICE explicit Rows(unsigned char* p, int tile) : base(reinterpret_cast<float4*>(p) + tile * BLOCKS * 32 + lane_id()) {}
    DEVICE void write(const Sums& x) const {
#pragma unroll
        for (int b = 0; b < BLOCKS; b++) base[32 * b] = make_float4(x[b][0], x[b][1], x[b][2], x[b][3]);
    }
    DEVICE void read(Sums& x) const {
#pragma unroll
        for (int b = 0; b < BLOCKS; b++) {
            const float4 four = base[32 * b];
            x[b][0] = four.x, x[b][1] = four.y, x[b][2] = four.z, x[b][3] = four.w;
        }
    }
};

// A segment's map in shared memory: S0 becomes gamma S0 + S0 N + R. N in two parts of the dtype, the first one being what products use; R in float32.
struct Map {
    unsigned char* base;
    DEVICE Keys high() const { return Keys{base}; }
    DEVICE Keys low() const { return Keys{base + KEYS * Keys::ROW}; }
    DEVICE Rows offset(int tile) const { return Rows(base + KEYS * KEYS * 4, tile); }
    DEVICE void write(int row0, const Sums& x) const {
        const int r = lane_id() / 4, c = lane_id() % 4;
#pragma unroll
        for (int b = 0; b < BLOCKS; b++)
#pragma unroll
            for (int t = 0; t < 2; t++) {
                const Pair<DTYPE> both = Make<DTYPE>::pair_of(x[b][2 * t], x[b][2 * t + 1]);
                *high().pair_at(row0, r + 8 * t, 8 * b + 2 * c) = both;
                if constexpr (HALF) *low().pair_at(row0, r + 8 * t, 8 * b + 2 * c) = Make<DTYPE>::rest(x[b][2 * t], x[b][2 * t + 1], both);
            }
    }
    // 16 rows, rounded and whole
    DEVICE void read(int row0, Rounded<DTYPE, BLOCKS>& rounded_rows, Sums& x) const {
#pragma unroll
        for (int s = 0; s < STEPS; s++) {
            Pair<DTYPE> high_pairs[4], low_pairs[4];
            high().rows(high_pairs[0], high_pairs[1], high_pairs[2], high_pairs[3], row0, 16 * s);
            if constexpr (HALF) low().rows(low_pairs[0], low_pairs[1], low_pairs[2], low_pairs[3], row0, 16 * s);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int b = 2 * s + i / 2, t = i % 2;
                float2 two = Make<DTYPE>::floats(high_pairs[i]);
                if constexpr (HALF) {
                    const float2 rest = Make<DTYPE>::floats(low_pairs[i]);
                    two.x += rest.x, two.y += rest.y;
                }
                rounded_rows.p[t][b] = high_pairs[i], x[b][2 * t] = two.x, x[b][2 * t + 1] = two.y;
            }
        }
    }
};

// x += a N for 16 rows
DEVICE void add_product(Sums& x, const Rounded<DTYPE, BLOCKS>& a, const Keys& n) {
#pragma unroll
    for (int s = 0; s < STEPS; s++)
#pragma unroll
        for (int b = 0; b < BLOCKS; b += 2) {
            Pair<DTYPE> n0, n1, n2, n3;
            n.right_columns(n0, n1, n2, n3, 8 * b, 16 * s);
            a.times(x[b], s, n0, n1), a.times(x[b + 1], s, n2, n3);
        }
}

// N of a block's last map as its successors read it: for every pair of blocks what a lane needs.
struct Published {
    unsigned char* base;
    DEVICE uint4* lines() const { return reinterpret_cast<uint4*>(base) + lane_id(); }
    DEVICE uint4* word(int s, int b, int part) const { return lines() + ((s * (BLOCKS / 2) + b / 2) * WORDS + part) * 32; }
};
DEVICE void to_words(uint4 (&words)[1], const uint32_t (&p)[4]) { words[0] = make_uint4(p[0], p[1], p[2], p[3]); }
DEVICE void to_words(uint4 (&words)[2], const float2 (&p)[4]) {
#pragma unroll
    for (int i = 0; i < 2; i++)
        words[i] = make_uint4(__float_as_uint(p[2 * i].x), __float_as_uint(p[2 * i].y), __float_as_uint(p[2 * i + 1].x), __float_as_uint(p[2 * i + 1].y));
}
DEVICE void from_words(uint32_t (&p)[4], const uint4 (&words)[1]) { p[0] = words[0].x, p[1] = words[0].y, p[2] = words[0].z, p[3] = words[0].w; }
DEVICE void from_words(float2 (&p)[4], const uint4 (&words)[2]) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        p[2 * i] = make_float2(__uint_as_float(words[i].x), __uint_as_float(words[i].y));
        p[2 * i + 1] = make_float2(__uint_as_float(words[i].z), __uint_as_float(words[i].w));
    }
}

// x becomes gamma x + x N + offset for 16 rows, N in published words
DEVICE void apply(Sums& x, const uint4 (&words)[STEPS * BLOCKS / 2 * WORDS], const uint4 (&offset)[BLOCKS], float gamma) {
    Rounded<DTYPE, BLOCKS> a;
    a.take(x);
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) {
        x[b][0] = gamma * x[b][0] + __uint_as_float(offset[b].x), x[b][1] = gamma * x[b][1] + __uint_as_float(offset[b].y);
        x[b][2] = gamma * x[b][2] + __uint_as_float(offset[b].z), x[b][3] = gamma * x[b][3] + __uint_as_float(offset[b].w);
    }
#pragma unroll
    for (int s = 0; s < STEPS; s++)
#pragma unroll
        for (int b = 0; b < BLOCKS; b += 2) {
            Pair<DTYPE> n[4];
            uint4 four[WORDS];
#pragma unroll
            for (int i = 0; i < WORDS; i++) four[i] = words[(s * (BLOCKS / 2) + b / 2) * WORDS + i];
            from_words(n, four);
            a.times(x[b], s, n[0], n[1]), a.times(x[b + 1], s, n[2], n[3]);
        }
}

// Copies rows of `columns` numbers into a tile, 32 a step; rows from `count` on are zeros. Whole pieces asynchronously, others now.
template <int COLUMNS> struct Copy {
    static constexpr int PIECES = COLUMNS / PIECE, STEP = 32 * GROUP / PIECES, COPIES = 32 / STEP;
    static_assert(STEP % 8 == 0 && COPIES > 0, "a step's rows are mixed alike");
    const DTYPE *from, *piece_from;
    unsigned char* to;
    int64_t step;
    int columns, row;
    bool whole, there;
    DEVICE Copy(const Tile<DTYPE, COLUMNS>& tile, const DTYPE* first, int64_t row_step, int numbers, bool pieces, int thread)
        : from(first), step(row_step), columns(numbers), row(thread / PIECES), whole(pieces) {
        const int piece = thread % PIECES;
        to = tile.piece(row, piece), piece_from = first + row * step + piece * PIECE, there = piece * PIECE < columns;
    }
    DEVICE void pair(const Tile<DTYPE, COLUMNS>& tile, int row0, int count, int rows, int thread) const {
        if (whole) {
#pragma unroll
            for (int i = 0; i < COPIES; i++) {
                if (i * STEP >= CHUNK && rows <= CHUNK) break;
                const bool valid = there && row0 + row + i * STEP < count;
                cp_async_16(to + (row0 + i * STEP) * Tile<DTYPE, COLUMNS>::ROW, valid ? piece_from + (row0 + i * STEP) * step : from, valid);
            }
        } else {
#pragma unroll 1
            for (int i = thread; i < rows * COLUMNS; i += 32 * GROUP) {
                const int token = row0 + i / COLUMNS, column = i % COLUMNS;
                *tile.element(token, column) = token < count && column < columns ? from[token * step + column] : narrow<DTYPE>(0.f);
            }
        }
    }
};

// With PROFILE the final state holds cycles instead: of a head's blocks, 12 numbers of every warp in the first round.
#ifdef PROFILE
#define STAMP(i) stamps[i] = clock64() - began
#else
#define STAMP(i)
#endif

#if CLUSTER > 1
#define CLUSTERED __cluster_dims__(CLUSTER, 1, 1)
#else
#define CLUSTERED
#endif

extern "C" __global__ void CLUSTERED __launch_bounds__(32 * WARPS, 1) delta_segments(const __grid_constant__ Params p) {
    SHARED_MEMORY(memory);
    const int warp = threadIdx.x / 32, lane = lane_id(), r = lane / 4, c = lane % 4;
    const int segment = warp / GROUP, part = GROUP == 1 ? 0 : warp % GROUP, first_row = part * MT * 16, group_thread = threadIdx.x % (32 * GROUP);
    const int rank = CLUSTER > 1 ? static_cast<int>(cluster_rank()) : 0, unit = blockIdx.x / CLUSTER;
    const int value_tiles = (p.values + VALUES - 1) / VALUES;
    const int tile = unit % value_tiles, head = unit / value_tiles % p.heads, sequence = unit / value_tiles / p.heads;
    const int value0 = tile * VALUES, values = min(p.values - value0, VALUES);
    const int64_t row = p.bounds ? 0 : sequence;
    const int begin = p.bounds ? static_cast<int>(load_index(p.bounds, sequence, p.bounds_wide)) : 0;
    const int end = p.bounds ? static_cast<int>(load_index(p.bounds, sequence + 1, p.bounds_wide)) : p.tokens;
    const DTYPE* q = p.q + row * p.q_b + head / p.group * p.q_h;
    const DTYPE* k = p.k + row * p.k_b + head / p.group * p.k_h;
    const DTYPE* v = p.v + row * p.v_b + head * p.v_h + value0;
    DTYPE* o = p.o + (row * p.tokens * p.heads + head) * p.values + value0;
    const int64_t o_t = static_cast<int64_t>(p.heads) * p.values;

    // a segment's place: keys, or later its map; values; queries
    const int key_bytes = max(p.longest * Keys::ROW, MAP_BYTES), place = key_bytes + p.longest * (Keys::ROW + Values::ROW);
    unsigned char* mine = memory + segment * place;
    const Keys key_tile{mine}, query_tile{mine + key_bytes + p.longest * Values::ROW};
    const Values value_tile{mine + key_bytes};
    const Map map{mine};
    unsigned char* scratches = memory + SEGMENTS * place;
    PairScratch& scratch = reinterpret_cast<PairScratch*>(scratches)[segment];
    const Published published{scratches};
    unsigned char* gathered = scratches + PUBLISHED_BYTES;  // N of the other blocks
    const int offsets_left = static_cast<int>(gathered - memory) + (CLUSTER - 1) * PUBLISHED_BYTES;
    const auto gathered_offset = [&](int index) {  // 16 rows of R
        return Rows(memory + (index < SEGMENTS ? index * place + KEYS * Keys::ROW : offsets_left + (index - SEGMENTS) * BLOCKS * LINE), 0);
    };
    // 16 rows of the state where the block starts, where the warp that writes them has read a predecessor's
    const auto start = [&](int tile_index) { return GATHERED ? gathered_offset(tile_index) : Rows(gathered, tile_index); };
    unsigned char* round_start = scratches + max(SEGMENTS * static_cast<int>(sizeof(PairScratch)), SHARED_BY_BLOCKS);
    float* gammas = reinterpret_cast<float*>(round_start + START_BYTES);

#ifdef PROFILE
    const long long began = clock64();
    long long stamps[12] = {};
#endif
    const auto meet = [&] {
        __syncwarp();
        if constexpr (GROUP > 1) barrier_sync(1 + segment, 32 * GROUP);
    };

    const bool leads = GROUP == 1 || part == 0;  // what all of a segment's warps know, one of them writes

    // the state at the round's start stays in shared memory: 16 rows (values) of a warp
    if (warp < VALUE_TILES) {
        Sums state = {};
        if (p.initial) {
            const float* from = p.initial + (static_cast<int64_t>(sequence) * p.heads + head) * p.keys * p.values + value0;
#pragma unroll
            for (int b = 0; b < BLOCKS; b++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const int key = 8 * b + 2 * c + (e & 1), value = 16 * warp + r + 8 * (e >> 1);
                    if (key < p.keys && value < values) state[b][e] = from[static_cast<int64_t>(key) * p.values + value];
                }
        }
        Rows(round_start, warp).write(state);
    }

    int at = begin;
    do {
        const int left = end - at;
        const int length = min(p.longest, (left + SEGMENTS * CLUSTER * CHUNK - 1) / (SEGMENTS * CLUSTER * CHUNK) * CHUNK);
        const int next = at + SEGMENTS * CLUSTER * length;
        const bool last = next >= end;
        const int token0 = at + (rank * SEGMENTS + segment) * length, count = max(0, min(length, end - token0));
        const int pairs = (count + 31) / 32;

        // the copies of a pair of chunks, and the loads of its gates: nothing here waits for what is read
        uint32_t decay_word = 0, beta_word = 0, out_word = 0;
        const int64_t token = token0 + lane;
        const int64_t beta_at = row * p.beta_b + token * p.beta_t + head * p.beta_h, g_at = row * p.g_b + token * p.g_t + head * p.g_h;
        const int64_t gate_at = row * p.gate_b + token * p.gate_t + head * p.gate_h;
        const auto fetch = [&](int pair) {
            const int row0 = 32 * pair, rows = min(32, length - row0);
            if (row0 + lane < count) {
                beta_word = gate_word<DTYPE>(p.beta, beta_at + row0 * p.beta_t, p.beta_wide);
                if (p.g) decay_word = gate_word<DTYPE>(p.g, g_at + row0 * p.g_t, p.g_wide);
                if (p.gate) out_word = gate_word<DTYPE>(p.gate, gate_at + row0 * p.gate_t, p.gate_wide);
            }
            Copy<KEYS>(key_tile, k + static_cast<int64_t>(token0) * p.k_t, p.k_t, p.keys, p.pieces, group_thread).pair(key_tile, row0, count, rows, group_thread);
            Copy<KEYS>(query_tile, q + static_cast<int64_t>(token0) * p.q_t, p.q_t, p.keys, p.pieces, group_thread).pair(query_tile, row0, count, rows, group_thread);
            Copy<VALUES>(value_tile, v + static_cast<int64_t>(token0) * p.v_t, p.v_t, values, p.pieces, group_thread).pair(value_tile, row0, count, rows, group_thread);
            cp_async_commit();
        };

        // A: chunk after chunk from an empty state and from the identity
        float x[MT][BLOCKS][4] = {};
        const auto on_diagonal = [&](int m, int b, int e) { return first_row + 16 * m + r + 8 * (e >> 1) - VALUES == 8 * b + 2 * c + (e & 1); };
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
            for (int b = 0; b < BLOCKS; b++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    if (on_diagonal(m, b, e)) x[m][b][e] = 1.f;
        float gamma = 1.f;
#pragma unroll 1
        for (int pair = -1; pair < pairs; pair++) {
            const int row0 = 32 * pair, chunks = count - row0 > CHUNK ? 2 : 1;
            if (pair >= 0) {
                float log_decay = 0.f, beta = 0.f, out = 0.f;
                if (row0 + lane < count) {
                    beta = gate_of<DTYPE>(beta_word, p.beta, beta_at + row0 * p.beta_t, p.beta_wide);
                    if (p.g) log_decay = 1.4426950408889634f * gate_of<DTYPE>(decay_word, p.g, g_at + row0 * p.g_t, p.g_wide);
                    out = p.gate ? p.scale * gate_of<DTYPE>(out_word, p.gate, gate_at + row0 * p.gate_t, p.gate_wide) : p.scale;
                }
                cp_async_wait<0>();
                meet();
                if (leads) write_lines(scratch, log_decay, beta, out, p.l2norm, key_tile, query_tile, row0, CHUNK * chunks);
                if constexpr (GROUP > 1) meet();
            }
            if (pair + 1 < pairs) fetch(pair + 1);  // on their way while this pair is worked on
            if (pair < 0) {
                STAMP(1);
                continue;
            }
            Scores<DTYPE> kept_first, kept_second;
            const auto chunk_of = [&](const Keys& tile, int which) { return Keys{tile.base + (row0 + CHUNK * which) * Keys::ROW}; };
            if constexpr (SCORES_SHARED) {  // a warp a chunk
                if (part < chunks) {
                    score(kept_first, scratch, part, chunk_of(key_tile, part), chunk_of(query_tile, part), 0);
                    hand_over(kept_first, scratch, part);
                }
                meet();
            } else {
                score(kept_first, scratch, 0, chunk_of(key_tile, 0), chunk_of(query_tile, 0), 0, leads);
                if (chunks > 1) score(kept_second, scratch, 1, chunk_of(key_tile, 1), chunk_of(query_tile, 1), 0, leads);
                if constexpr (GROUP > 1) meet();
            }
            if (pair == 0) STAMP(2);
            invert<SCORES_SHARED>(scratch, meet, leads);
            if (pair == 0) STAMP(3);
#pragma unroll 1
            for (int which = 0; which < chunks; which++) {
                Factors<DTYPE> f;
                read_factors(f, scratch, which);
                if constexpr (SCORES_SHARED) take_over(kept_first, scratch, which);
                const Values chunk_values{value_tile.base + (row0 + CHUNK * which) * Values::ROW};
                advance<DTYPE, KEYS, VALUES, MT>(x, f, kept_first, first_row, chunk_of(key_tile, which), chunk_of(query_tile, which), chunk_values, 0, meet);
                gamma *= f.total;
                kept_first = kept_second;
            }
            if (pair == 0) STAMP(4);
        }
        meet();
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
            for (int b = 0; b < BLOCKS; b++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    if (on_diagonal(m, b, e)) x[m][b][e] -= gamma;
        STAMP(5);

        // B: the maps of the segments, composed in a tree: a segment's place ends with the map of the largest power of two of segments that ends there
#pragma unroll
        for (int m = 0; m < MT; m++) {
            const int row0 = first_row + 16 * m;
            if (row0 < VALUES) map.offset(row0 / 16).write(x[m]);
            else map.write(row0 - VALUES, x[m]);
        }
        if (group_thread == 0) gammas[segment] = gamma;
        __syncthreads();
#pragma unroll 1
        for (int step = 1; step < SEGMENTS; step *= 2) {
            const int joined = SEGMENTS / (2 * step);  // maps of this step, their rows shared among all warps
            Sums composed[SHARE];
#pragma unroll
            for (int i = 0; i < SHARE; i++) {
                const int item = warp + i * WARPS;
                if (item >= joined * ROW_TILES) continue;
                const int later_segment = item / ROW_TILES * 2 * step + 2 * step - 1, row0 = item % ROW_TILES * 16;
                const Map later{memory + later_segment * place}, earlier{memory + (later_segment - step) * place};
                const float after = gammas[later_segment], before = gammas[later_segment - step];
                Rounded<DTYPE, BLOCKS> a, unused;
                Sums was;
                if (row0 >= VALUES) {
                    earlier.read(row0 - VALUES, a, was), later.read(row0 - VALUES, unused, composed[i]);
                } else {
                    earlier.offset(row0 / 16).read(was), later.offset(row0 / 16).read(composed[i]);
                    a.take(was);
                }
                const float kept = row0 >= VALUES ? before : 1.f;
#pragma unroll
                for (int b = 0; b < BLOCKS; b++)
#pragma unroll
                    for (int e = 0; e < 4; e++) composed[i][b][e] = after * was[b][e] + kept * composed[i][b][e];
                add_product(composed[i], a, later.high());
            }
            __syncthreads();
#pragma unroll
            for (int i = 0; i < SHARE; i++) {
                const int item = warp + i * WARPS;
                if (item >= joined * ROW_TILES) continue;
                const int later_segment = item / ROW_TILES * 2 * step + 2 * step - 1, row0 = item % ROW_TILES * 16;
                const Map later{memory + later_segment * place};
                if (row0 < VALUES) later.offset(row0 / 16).write(composed[i]);
                else later.write(row0 - VALUES, composed[i]);
            }
            if (static_cast<int>(threadIdx.x) < joined) gammas[threadIdx.x * 2 * step + 2 * step - 1] *= gammas[threadIdx.x * 2 * step + step - 1];
            __syncthreads();
        }
        STAMP(6);

        // the block's map for its successors, in the place of the scratch
        if constexpr (CLUSTER > 1) {
            const Map whole{memory + (SEGMENTS - 1) * place};
#pragma unroll
            for (int s = 0; s < STEPS; s++)
#pragma unroll
                for (int b = 0; b < BLOCKS; b += 2) {
                    if ((s * (BLOCKS / 2) + b / 2) % WARPS != warp) continue;
                    Pair<DTYPE> n[4];
                    uint4 words[WORDS];
                    whole.high().right_columns(n[0], n[1], n[2], n[3], 8 * b, 16 * s);
                    to_words(words, n);
#pragma unroll
                    for (int i = 0; i < WORDS; i++) *published.word(s, b, i) = words[i];
                }
            __syncwarp();
            cluster_arrive();
            cluster_wait();
        }
        STAMP(7);

        // the state where this block starts, and for a next round or as the final state where the round ends
        const bool ends = !last || (p.final && rank == CLUSTER - 1);
        const int blocks = ends ? CLUSTER : rank;
        const Map whole{memory + (SEGMENTS - 1) * place};
        float decays = 0.f;  // lane l: of block l
        if constexpr (GATHERED) {
            const uint4* offset = reinterpret_cast<const uint4*>(whole.offset(0).base);
            const int others = ends ? CLUSTER - 1 : rank;  // counted from the nearest predecessor back, so that not all of a cluster read from one block
            const auto other_block = [&](int other) { return (rank - 1 - other + CLUSTER) % CLUSTER; };
            if (lane < blocks) decays = cluster_load(gammas + SEGMENTS - 1, lane);
#pragma unroll 1
            for (int first = 0; first < others; first += AT_ONCE) {
                uint4 offset_lines[AT_ONCE][OFFSET_SHARE], map_lines[MAP_SHARE];
#pragma unroll
                for (int other = 0; other < AT_ONCE; other++)
#pragma unroll
                    for (int i = 0; i < OFFSET_SHARE; i++)
                        if (first + other < others && i * WARPS + warp < OFFSET_LINES)
                            offset_lines[other][i] = cluster_load_16(offset + (i * WARPS + warp) * 32, other_block(first + other));
#pragma unroll
                for (int i = 0; i < MAP_SHARE; i++) {
                    const int line = first * MAP_LINES + i * WARPS + warp;
                    if (line < others * MAP_LINES) map_lines[i] = cluster_load_16(published.lines() + line % MAP_LINES * 32, other_block(line / MAP_LINES));
                }
#pragma unroll
                for (int other = 0; other < AT_ONCE; other++)
#pragma unroll
                    for (int i = 0; i < OFFSET_SHARE; i++) {
                        const int line = i * WARPS + warp;
                        if (first + other < others && line < OFFSET_LINES)
                            reinterpret_cast<uint4*>(gathered_offset((first + other) * VALUE_TILES + line / BLOCKS).base)[line % BLOCKS * 32] = offset_lines[other][i];
                    }
#pragma unroll
                for (int i = 0; i < MAP_SHARE; i++) {
                    const int line = first * MAP_LINES + i * WARPS + warp;
                    if (line < others * MAP_LINES) Published{gathered}.lines()[line * 32] = map_lines[i];
                }
            }
            __syncthreads();
        }
        if (warp < VALUE_TILES) {
            const Rows offset = whole.offset(warp);
            Sums carried;
            Rows(round_start, warp).read(carried);
            if (!GATHERED && rank == 0) start(warp).write(carried);
            if constexpr (CLUSTER > 1) {
                if constexpr (GATHERED) {
                    const auto through = [&](int from, int to) {
#pragma unroll 2
                        for (int block = from; block < to; block++) {
                            const int other = (rank - 1 - block + CLUSTER) % CLUSTER;
                            const Published n{memory + (block == rank ? static_cast<int>(scratches - memory) : static_cast<int>(gathered - memory) + other * PUBLISHED_BYTES)};
                            const int index = other * VALUE_TILES + warp, own = static_cast<int>(reinterpret_cast<unsigned char*>(offset.base - lane) - memory);
                            const Rows r(memory + (block == rank ? own : index < SEGMENTS ? index * place + KEYS * Keys::ROW : offsets_left + (index - SEGMENTS) * BLOCKS * LINE), 0);
                            uint4 words[STEPS * BLOCKS / 2 * WORDS], there[BLOCKS];
#pragma unroll
                            for (int i = 0; i < STEPS * BLOCKS / 2 * WORDS; i++) words[i] = n.lines()[32 * i];
#pragma unroll
                            for (int b = 0; b < BLOCKS; b++) there[b] = reinterpret_cast<const uint4*>(r.base)[32 * b];
                            apply(carried, words, there, __shfl_sync(0xffffffffu, decays, block));
                        }
                    };
                    through(0, rank);
                    Sums entering;
#pragma unroll
                    for (int b = 0; b < BLOCKS; b++)
#pragma unroll
                        for (int e = 0; e < 4; e++) entering[b][e] = carried[b][e];
                    if (ends) through(rank, CLUSTER);
                    start(warp).write(entering);
                } else {
#pragma unroll 1
                    for (int block = 0; block < blocks; block++) {
                        uint4 words[STEPS * BLOCKS / 2 * WORDS], there[BLOCKS];
#pragma unroll
                        for (int i = 0; i < STEPS * BLOCKS / 2 * WORDS; i++) words[i] = cluster_load_16(published.lines() + 32 * i, block);
#pragma unroll
                        for (int b = 0; b < BLOCKS; b++) there[b] = cluster_load_16(offset.base + 32 * b, block);
                        apply(carried, words, there, cluster_load(gammas + SEGMENTS - 1, block));
                        if (block + 1 == rank) start(warp).write(carried);
                    }
                }
            } else if (ends) {
                Rounded<DTYPE, BLOCKS> a;
                Sums own;
                a.take(carried);
                offset.read(own);
#pragma unroll
                for (int b = 0; b < BLOCKS; b++)
#pragma unroll
                    for (int e = 0; e < 4; e++) carried[b][e] = gammas[SEGMENTS - 1] * carried[b][e] + own[b][e];
                add_product(carried, a, whole.high());
            }
            if (!last) Rows(round_start, warp).write(carried);
            if (last && p.final && rank == CLUSTER - 1) {
                float* to = p.final + (static_cast<int64_t>(sequence) * p.heads + head) * p.keys * p.values + value0;
#pragma unroll
                for (int b = 0; b < BLOCKS; b++)
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        const int key = 8 * b + 2 * c + (e & 1), value = 16 * warp + r + 8 * (e >> 1);
                        if (key < p.keys && value < values) to[static_cast<int64_t>(key) * p.values + value] = carried[b][e];
                    }
            }
        }
        __syncthreads();
        if constexpr (CLUSTER > 1) cluster_arrive_relaxed();  // its counterpart below: nobody leaves or publishes again while others read
        STAMP(8);

        // C: the state where this warp's segment starts, then every token's read of it
        if (count > 0) {
            Rounded<DTYPE, BLOCKS> entering[OWN_TILES];
#pragma unroll
            for (int m = 0; m < OWN_TILES; m++) {
                const int value_tile_index = part * OWN_TILES + m;
                Sums state;
                start(value_tile_index).read(state);
                entering[m].take(state);
                int before = 0;  // so many segments are in the state
#pragma unroll 1
                for (int step = SEGMENTS / 2; step > 0; step /= 2) {
                    if (!(segment & step)) continue;
                    before += step;
                    const Map earlier{memory + (before - 1) * place};
                    const float decay = gammas[before - 1];
                    Sums own;
                    earlier.offset(value_tile_index).read(own);
#pragma unroll
                    for (int b = 0; b < BLOCKS; b++)
#pragma unroll
                        for (int e = 0; e < 4; e++) state[b][e] = decay * state[b][e] + own[b][e];
                    add_product(state, entering[m], earlier.high());
                    entering[m].take(state);
                }
            }
#pragma unroll 1
            for (int row0 = 0; row0 < count; row0 += 2 * CHUNK) {  // two chunks at once, so that they wait together; the last one, if alone, twice
                constexpr int CHUNKS = 2;
                const int second = count - row0 > CHUNK ? CHUNK : 0;
                float read[CHUNKS][2 * OWN_TILES][4];
#pragma unroll
                for (int which = 0; which < CHUNKS; which++) {
                    const int first_token = row0 + which * second;
#pragma unroll
                    for (int m = 0; m < OWN_TILES; m++) {
                        Pair<DTYPE> own[4];
                        value_tile.rows(own[0], own[1], own[2], own[3], first_token, (part * OWN_TILES + m) * 16);
#pragma unroll
                        for (int i = 0; i < 4; i++) {
                            const float2 two = Make<DTYPE>::floats(own[i]);
                            read[which][2 * m + i / 2][i % 2 * 2] = two.x, read[which][2 * m + i / 2][i % 2 * 2 + 1] = two.y;
                        }
                    }
#pragma unroll
                    for (int s = 0; s < STEPS; s++) {
                        Pair<DTYPE> a0, a1, a2, a3;
                        query_tile.rows(a0, a1, a2, a3, first_token, 16 * s);
#pragma unroll
                        for (int m = 0; m < OWN_TILES; m++)
#pragma unroll
                            for (int half = 0; half < 2; half++)
                                Product<DTYPE>::add(read[which][2 * m + half], a0, a1, a2, a3, entering[m].p[half][2 * s], entering[m].p[half][2 * s + 1]);
                    }
                }
                __syncwarp();  // the rows have been read by all lanes
#pragma unroll
                for (int which = 0; which < CHUNKS; which++)
#pragma unroll
                    for (int n = 0; n < 2 * OWN_TILES; n++)
#pragma unroll
                        for (int t = 0; t < 2; t++)
                            *value_tile.pair_at(row0 + which * second, r + 8 * t, (part * OWN_TILES * 2 + n) * 8 + 2 * c) =
                                Make<DTYPE>::pair_of(read[which][n][2 * t], read[which][n][2 * t + 1]);
                meet();
                constexpr int PIECES = VALUES / PIECE;
                const int rows = min(CHUNKS * CHUNK, count - row0);
                DTYPE* to = o + (token0 + row0) * o_t;
                if (p.o_pieces) {
                    constexpr int STEP = 32 * GROUP / PIECES;
                    const int first = group_thread / PIECES, piece = group_thread % PIECES;
#pragma unroll
                    for (int i = 0; i < CHUNKS * CHUNK; i += STEP)
                        if (first + i < rows && piece * PIECE < values)
                            *reinterpret_cast<uint4*>(to + (first + i) * o_t + piece * PIECE) = *reinterpret_cast<const uint4*>(value_tile.element(row0, first + i, piece * PIECE));
                } else {
#pragma unroll 1
                    for (int i = group_thread; i < CHUNKS * CHUNK * VALUES; i += 32 * GROUP) {
                        const int token = i / VALUES, column = i % VALUES;
                        if (token < rows && column < values) to[token * o_t + column] = *value_tile.element(row0 + token, column);
                    }
                }
            }
        }
        STAMP(9);
        if constexpr (CLUSTER > 1) cluster_wait();
        STAMP(10);
        at = next;
        if (!last) __syncthreads();
    } while (at < end);
#ifdef PROFILE
    if (lane == 0) {
        float* to = p.final + (static_cast<int64_t>(sequence) * p.heads + head) * p.keys * p.values + (rank * WARPS + warp) * 12;
        for (int i = 0; i < 12; i++)
            if ((rank * WARPS + warp) * 12 + i < p.keys * p.values) to[i] = static_cast<float>(stamps[i]);
    }
#endif
}
