// The gradients of S_fast (SPEC.md 10). With P = Q K^T, D = dO V^T and F_tj = scale gate_t Gamma_tj for j <= t of one chunk, else 0:
//   dv = (F P)^T dO    dk = (F D)^T Q    dq = (F D) K    dgate = scale rowsum(P D Gamma)    dg_i = sum over t < i of colsum(F P D)_t - rowsum(F P D)_t
// The diagonal of F P D, which would cancel in dg, is left out. dO enters products as it came: F meets float32 scores alone. A state W that is carried into
// the first chunk (sweep of queries) and the gradient dW of the one that the last chunk leaves (sweep of keys) add
//   dq += (scale gate e^G) dO W^T    dk += e^(G_C - G) V dW^T    dv += e^(G_C - G) K dW    dW at the start = (scale gate e^G Q)^T dO + e^(G_C) dW
// A token and v head costs 8 C (K + V) / 2 FLOP and moves 4 K / group + 3 V numbers: bound by memory (H100, bf16, 1 x 8192, 16/32 heads of 128: 335 MB, 110 us).
//
// fast_core_gradients: a block takes SIDE tokens of a chunk and a q/k head, with the v heads that share it one after the other: as keys it meets the queries
// from its own on (dk, dv), as queries the keys up to its own (dq, the sums over rows). 16 tokens a warp; half of the warps take D's part, half of them P's,
// so that no score passes from one warp to another. fast_core_running sums for dg, fast_core_start makes dW at the start.
//
// DTYPE; KEYS, VALUES: head_dims; SIDE; BUFFERS, 1 or 2 tiles of what is met; DECAYED: g is given; FLOWING: dg is wanted; STARTED: W is given; ENDED: dW is;
// ALIGNED: 16-byte copies can take the rows of q, k, v and dO; WORK: which kernel is compiled, 0 gradients, 1 running, 2 start.
#include "fast_gradients.cuh"

constexpr int BANDS = SIDE / 16, THREADS = 64 * BANDS, MOST = SIDE < 64 ? SIDE : 64, USUAL = SIDE < 32 ? SIDE : 32, FEW = 16;
constexpr int RESIDENT = SIZE == 2 ? 512 / THREADS : 1;  // blocks that registers must allow: 16 warps of 128 registers

// x (16 x 8 N) += 16 rows of `own` times rows of `met` from 16 at on, of blocks of 16 those from `low` to below `high`
template <int WIDTH, int N>
DEVICE void add_scores(float (&x)[N][4], const Tile<DTYPE, WIDTH>& own, int row, const Tile<DTYPE, WIDTH>& met, int at, int low, int high) {
#pragma unroll(2)
    for (int s = 0; s < WIDTH / 16; s++) {
        Pair<DTYPE> a[4], b[4];
        own.rows(a[0], a[1], a[2], a[3], row, 16 * s);
#pragma unroll
        for (int j = 0; j < N / 2; j++) {
            if (at + j < low || at + j >= high) continue;
            met.right_rows(b[0], b[1], b[2], b[3], 16 * (at + j), 16 * s);
            Product<DTYPE>::add(x[2 * j], a[0], a[1], a[2], a[3], b[0], b[1]);
            Product<DTYPE>::add(x[2 * j + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
        }
    }
}

// acc (16 x WIDTH) += x (16 x 8 N), rounded, times rows of `met` from 16 at on
template <int WIDTH, int N>
DEVICE void add_product(float (&acc)[WIDEST / 8][4], const float (&x)[N][4], const Tile<DTYPE, WIDTH>& met, int at, int low, int high) {
#pragma unroll
    for (int j = 0; j < N / 2; j++) {
        if (at + j < low || at + j >= high) continue;
        Pair<DTYPE> a[4];
        as_operand<DTYPE>(a, x[2 * j], x[2 * j + 1]);
        add_rows(acc, a, met, 16 * (at + j));
    }
}

// What weighs the scores of a warp's 16 rows from `row0` on with tokens from `column0` on: logs and rates by the token's place in the chunk.
template <bool AS_KEYS> struct Pairs {
    const Log* logs;
    const float* rates;
    int row0, column0;
    bool own;  // the tile that the rows are of: on and below the diagonal

    DEVICE int row(int e) const { return row0 + lane_id() / 4 + e / 2 * 8; }
    DEVICE int column(int n, int e) const { return column0 + 8 * n + 2 * (lane_id() % 4) + e % 2; }

    // x Gamma; of the blocks of 8 columns x is those from 2 block on
    template <int N> DEVICE void decay(float (&x)[N][4], int block) const {
#pragma unroll
        for (int n = 0; n < N; n++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int query = AS_KEYS ? column(2 * block + n, e) : row(e), key = AS_KEYS ? row(e) : column(2 * block + n, e);
                if (own && key > query) x[n][e] = 0.0f;
                else if (DECAYED) x[n][e] *= exp_between(logs[query], logs[key]);
            }
        }
    }
    // x F
    template <int N> DEVICE void weigh(float (&x)[N][4], int block) const {
        decay(x, block);
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) x[n][e] *= rates[AS_KEYS ? column(2 * block + n, e) : row(e)];
    }
    // sums of x y over the rows, the diagonal apart
    template <int N> DEVICE void sum_up(float (&sum)[2], float (&diagonal)[2], const float (&x)[N][4], const float (&y)[N][4], int block) const {
#pragma unroll
        for (int n = 0; n < N; n++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                if (own && row(e) == column(2 * block + n, e)) diagonal[e / 2] += x[n][e] * y[n][e];
                else sum[e / 2] += x[n][e] * y[n][e];
            }
        }
    }
};

// SIDE tokens of a chunk from `from` on, as its keys or as its queries, and what half of the warps makes of them: OF_KEYS P's part, else D's. Both halves meet
// at the same barriers, each from its own code, so that neither holds the other's registers.
template <bool AS_KEYS, bool OF_KEYS> DEVICE void sweep(const Params& p, unsigned char* memory, const Chunk& chunk, int shared_head, int from) {
    const KeyTile own_key{memory};
    const ValueTile own_value{memory + KEY_BYTES};
    const auto key_met = [&](int i) { return KeyTile{memory + (1 + i % BUFFERS) * PAIR_BYTES}; };
    const auto value_met = [&](int i) { return ValueTile{memory + (1 + i % BUFFERS) * PAIR_BYTES + KEY_BYTES}; };
    Log* const logs = reinterpret_cast<Log*>(memory + (1 + BUFFERS) * PAIR_BYTES);  // of the tokens from `first` on
    float* const rates = reinterpret_cast<float*>(logs + p.tiles * SIDE);  // scale times gate of the tokens from `from` on
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), band = warp % BANDS, lane = lane_id(), r = lane / 4, c = lane % 4;
    const int rows = chunk.length - from, tiles = AS_KEYS ? (rows + SIDE - 1) / SIDE : from / SIDE + 1, first = AS_KEYS ? from : 0;
    const bool idle = 16 * band >= rows || (OF_KEYS ? (AS_KEYS ? !p.dv : !p.dgate && !p.outflow) : (AS_KEYS ? !p.dk && !FLOWING : !p.dq));
    const int64_t key_t = AS_KEYS ? p.k_t : p.q_t, met_key_t = AS_KEYS ? p.q_t : p.k_t, value_t = AS_KEYS ? p.v_t : p.do_t, met_value_t = AS_KEYS ? p.do_t : p.v_t;
    const int batch = static_cast<int>(chunk.batch), begin = static_cast<int>(chunk.begin);
    // a tensor's first number of a token of the chunk and of a head: addresses are made anew where they are needed, registers are scarcer than products
    const auto place = [&](int64_t b, int64_t t, int64_t h, int token, int head) { return fresh(batch) * b + static_cast<int64_t>(fresh(begin) + token) * t + head * h; };
    const DTYPE* const key = AS_KEYS ? p.k + place(p.k_b, p.k_t, p.k_h, from, shared_head) : p.q + place(p.q_b, p.q_t, p.q_h, from, shared_head);
    load_rounds<SIDE, THREADS, ALIGNED>(own_key, key, key_t, rows, KEYS);

    float acc[WIDEST / 8][4] = {};
#pragma unroll 1
    for (int member = 0; member < p.group; member++) {
        const int head = shared_head * p.group + member;
        const DTYPE* const value = AS_KEYS ? p.v + place(p.v_b, p.v_t, p.v_h, from, head) : p.d_o + place(p.do_b, p.do_t, p.do_h, from, head);
        load_rounds<SIDE, THREADS, ALIGNED>(own_value, value, value_t, rows, VALUES);
        cp_async_commit();
        const auto load = [&](int i) {
            if (i < tiles) {
                const int at = first + i * SIDE, left = chunk.length - at;
                const DTYPE* const key = AS_KEYS ? p.q + place(p.q_b, p.q_t, p.q_h, at, shared_head) : p.k + place(p.k_b, p.k_t, p.k_h, at, shared_head);
                const DTYPE* const value = AS_KEYS ? p.d_o + place(p.do_b, p.do_t, p.do_h, at, head) : p.v + place(p.v_b, p.v_t, p.v_h, at, head);
                load_rounds<SIDE, THREADS, ALIGNED>(key_met(i), key, met_key_t, left, KEYS);
                load_rounds<SIDE, THREADS, ALIGNED>(value_met(i), value, met_value_t, left, VALUES);
            }
            cp_async_commit();
        };
        if (DECAYED && warp == 0) running_log<DTYPE>(logs, tiles * SIDE, p.g, place(p.g_b, p.g_t, p.g_h, first, head), p.g_t, p.g_wide, chunk.length - first);
        for (int t = threadIdx.x; t < (AS_KEYS ? tiles * SIDE : SIDE); t += THREADS) {
            const float gate = p.gate && t < rows ? load_gate<DTYPE>(p.gate, place(p.gate_b, p.gate_t, p.gate_h, from + t, head), p.gate_wide) : 1.0f;
            rates[t] = t < rows ? p.scale * gate : 0.0f;
        }
        float flow[2] = {}, diagonal[2] = {};
        if constexpr (OF_KEYS && AS_KEYS) {
#pragma unroll
            for (int n = 0; n < WIDEST / 8; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) acc[n][e] = 0.0f;
        }
        if constexpr (AS_KEYS ? ENDED : STARTED) {
            if (AS_KEYS ? chunk.last : chunk.first && p.offset > 0) {
                const float* const w = (AS_KEYS ? p.d_final : p.initial) + (static_cast<int64_t>(chunk.sequence) * p.heads + head) * (KEYS * VALUES);
                const ValueTile state = value_met(0);
                float by[2] = {1.0f, 1.0f};
                cp_async_wait<0>();
#pragma unroll
                for (int key = 0; key < KEY_WIDTH; key += SIDE) {  // SIDE of its keys at once
                    for (int i = threadIdx.x; i < SIDE * VALUE_WIDTH; i += THREADS) keep_state(state, w, key, i);
                    barrier_sync(1, THREADS);
                    if (DECAYED && key == 0) {
#pragma unroll
                        for (int half = 0; half < 2; half++) {
                            const Log mine = logs[from - first + 16 * band + r + 8 * half];
                            by[half] = AS_KEYS ? exp_between(logs[tiles * SIDE - 1], mine) : exp_log(mine);
                        }
                    }
                    if (idle) {
                    } else if constexpr (OF_KEYS && AS_KEYS) {
#pragma unroll
                        for (int s = 0; s < SIDE / 16; s++) {
                            if (key + 16 * s >= KEY_WIDTH) break;
                            Pair<DTYPE> a[4];
                            own_key.rows(a[0], a[1], a[2], a[3], 16 * band, key + 16 * s);
                            add_rows(acc, a, state, 16 * s);
                        }
                    } else {
#pragma unroll
                        for (int j = 0; j < SIDE / 16; j++) {
                            if (key + 16 * j >= KEY_WIDTH) break;
                            float x[2][4] = {};
                            add_scores(x, own_value, 16 * band, state, j, 0, BANDS);
#pragma unroll
                            for (int n = 0; n < 2; n++) {
#pragma unroll
                                for (int e = 0; e < 4; e++) {
                                    const int row = 16 * band + r + e / 2 * 8, column = key + 16 * j + 8 * n + 2 * c + e % 2;
                                    const float more = by[e / 2] * x[n][e];
                                    if (OF_KEYS || (AS_KEYS && FLOWING)) flow[e / 2] += more * widen(*own_key.element(row, column));
                                    if (!OF_KEYS) acc[(key + 16 * j) / 8 + n][e] += AS_KEYS ? more : rates[row] * more;
                                }
                            }
                        }
                    }
                    barrier_sync(1, THREADS);
                }
                if constexpr (OF_KEYS && AS_KEYS) {
#pragma unroll
                    for (int n = 0; n < VALUE_WIDTH / 8; n++)
#pragma unroll
                        for (int e = 0; e < 4; e++) acc[n][e] *= by[e / 2];
                }
            }
        }
        load(0);
        if (BUFFERS == 2) load(1);
#pragma unroll 1
        for (int i = 0; i < tiles; i++) {
            cp_async_wait<BUFFERS - 1>();
            barrier_sync(1, THREADS);
            const int at = first + i * SIDE, left = (min(chunk.length - at, SIDE) + 15) / 16;
            const bool own = at == from;
            const int low = own && AS_KEYS ? band : 0, high = own && !AS_KEYS ? band + 1 : left;
            const Pairs<AS_KEYS> pairs{logs - first, rates - from, from + 16 * band, at, own};
            if (idle) {
            } else if constexpr (OF_KEYS && AS_KEYS) {
#pragma unroll 1
                for (int block = 0; block < BANDS; block += USUAL / 16) {
                    float x[USUAL / 8][4] = {};
                    add_scores(x, own_key, 16 * band, key_met(i), block, low, high);
                    pairs.weigh(x, block);
                    add_product(acc, x, value_met(i), block, low, high);
                }
            } else if constexpr (OF_KEYS) {
#pragma unroll 1
                for (int block = 0; block < BANDS; block += MOST / 16) {
                    float x[MOST / 8][4] = {}, y[MOST / 8][4] = {};
                    add_scores(x, own_key, 16 * band, key_met(i), block, low, high);
                    add_scores(y, own_value, 16 * band, value_met(i), block, low, high);
                    pairs.decay(x, block);
                    pairs.sum_up(flow, diagonal, x, y, block);
                }
            } else {
                constexpr int WIDE = AS_KEYS && FLOWING ? FEW : USUAL;
#pragma unroll 1
                for (int block = 0; block < BANDS; block += WIDE / 16) {
                    float x[WIDE / 8][4] = {};
                    add_scores(x, own_value, 16 * band, value_met(i), block, low, high);
                    pairs.weigh(x, block);
                    if constexpr (AS_KEYS && FLOWING) {
                        float y[WIDE / 8][4] = {};
                        add_scores(y, own_key, 16 * band, key_met(i), block, low, high);
                        pairs.sum_up(flow, diagonal, x, y, block);
                    }
                    add_product(acc, x, key_met(i), block, low, high);
                }
            }
            barrier_sync(1, THREADS);
            load(i + BUFFERS);
        }
        const int64_t token = static_cast<int64_t>(fresh(batch)) * p.tokens + fresh(begin) + from + 16 * band;
        if (OF_KEYS && AS_KEYS && !idle)
            store_rows<VALUE_WIDTH>(p.dv + (token * p.heads + head) * VALUES, static_cast<int64_t>(p.heads) * VALUES, acc, rows - 16 * band, VALUES);
        if ((AS_KEYS ? FLOWING && !OF_KEYS : OF_KEYS) && !idle) {
            const int64_t line = (static_cast<int64_t>(fresh(batch)) * p.heads + head) * p.tokens + fresh(begin) + from + 16 * band;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float sum = row_sum(flow[half]), apart = row_sum(diagonal[half]);
                const int row = r + 8 * half;
                if (c || 16 * band + row >= rows) continue;
                if (AS_KEYS) {
                    p.inflow[line + row] = sum;
                } else {
                    if (p.outflow) p.outflow[line + row] = sum * rates[16 * band + row];
                    if (p.dgate) store_gate<DTYPE>(p.dgate, (token + row) * p.heads + head, p.gate_wide, (sum + apart) * p.scale);
                }
            }
        }
        if (p.group > 1) barrier_sync(1, THREADS);
    }
    DTYPE* const to = AS_KEYS ? p.dk : p.dq;
    if (!OF_KEYS && !idle && to) {
        const int groups = p.heads / p.group;
        const int64_t token = static_cast<int64_t>(fresh(batch)) * p.tokens + fresh(begin) + from + 16 * band;
        store_rows<KEY_WIDTH>(to + (token * groups + shared_head) * KEYS, static_cast<int64_t>(groups) * KEYS, acc, rows - 16 * band, KEYS);
    }
}

#if WORK == 0
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) fast_core_gradients(const __grid_constant__ Params p) {
    SHARED_MEMORY(memory);
    const int sweeps = p.as_queries + p.as_keys, groups = p.heads / p.group, part = blockIdx.x % (p.tiles * sweeps), stream = blockIdx.x / (p.tiles * sweeps);
    const int from = part / sweeps * SIDE;
    const Chunk chunk = find_chunk(grid_of(p), stream / groups);
    if (chunk.length <= from) return;
    const bool of_keys = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0) >= BANDS;
    if (p.as_keys && part % sweeps == 0) {
        if (of_keys) sweep<true, true>(p, memory, chunk, stream % groups, from);
        else sweep<true, false>(p, memory, chunk, stream % groups, from);
    } else {
        if (of_keys) sweep<false, true>(p, memory, chunk, stream % groups, from);
        else sweep<false, false>(p, memory, chunk, stream % groups, from);
    }
}

#elif WORK == 1
// dg of a chunk and head: a warp sums what flows in less what flows out before each token.
extern "C" __global__ void __launch_bounds__(32) fast_core_running(const __grid_constant__ Params p) {
    const int head = blockIdx.x % p.heads, lane = lane_id();
    const Chunk chunk = find_chunk(grid_of(p), blockIdx.x / p.heads);
    const int64_t from = (chunk.batch * p.heads + head) * p.tokens + chunk.begin, to = (chunk.batch * p.tokens + chunk.begin) * p.heads + head;
    float before = STARTED && p.total && chunk.first && p.offset > 0 ? p.total[chunk.sequence * p.heads + head] : 0.0f;
    for (int base = 0; base < chunk.length; base += 32) {
        const int token = base + lane;
        const float sum = sum_up_to(token < chunk.length ? p.inflow[from + token] - p.outflow[from + token] : 0.0f, lane);
        const float up_to = __shfl_up_sync(0xffffffffu, sum, 1);
        if (token < chunk.length) store_gate<DTYPE>(p.dg, to + static_cast<int64_t>(token) * p.heads, p.g_wide, before + (lane ? up_to : 0.0f));
        before += __shfl_sync(0xffffffffu, sum, 31);
    }
}

#else
// The gradient of a sequence's initial state for one head: 16 keys a warp, the first chunk's tokens in tiles of SIDE.
constexpr int STATE_THREADS = 2 * KEY_WIDTH;

extern "C" __global__ void __launch_bounds__(STATE_THREADS) fast_core_start(const __grid_constant__ Params p) {
    SHARED_MEMORY(memory);
    const KeyTile queries{memory};
    const ValueTile d_outputs{memory + KEY_BYTES};
    Log* const logs = reinterpret_cast<Log*>(memory + PAIR_BYTES);
    float* const factors = reinterpret_cast<float*>(logs + p.tiles * SIDE);
    const int head = blockIdx.x % p.heads, sequence = blockIdx.x / p.heads;
    const int warp = threadIdx.x / 32, lane = lane_id(), r = lane / 4, c = lane % 4;
    int slot = sequence * p.slots;
    if (p.cu_seqlens) slot = static_cast<int>((load_index(p.cu_seqlens, sequence, p.cu_wide) + static_cast<int64_t>(sequence) * p.offset) / p.chunk_size) + sequence;
    const Chunk chunk = find_chunk(grid_of(p), slot);
    const bool carried = p.offset > 0;
    const int length = carried ? chunk.length : 0, tokens = p.tiles * SIDE;
    const DTYPE* q = p.q + chunk.batch * p.q_b + chunk.begin * p.q_t + head / p.group * p.q_h;
    const DTYPE* d_o = p.d_o + chunk.batch * p.do_b + chunk.begin * p.do_t + head * p.do_h;
    if (DECAYED && warp == 0) running_log<DTYPE>(logs, tokens, p.g, chunk.batch * p.g_b + chunk.begin * p.g_t + head * p.g_h, p.g_t, p.g_wide, length);
    __syncthreads();
    for (int t = threadIdx.x; t < tokens; t += STATE_THREADS) {
        const int64_t at = chunk.batch * p.gate_b + (chunk.begin + t) * p.gate_t + head * p.gate_h;
        const float rate = t < length ? p.scale * (p.gate ? load_gate<DTYPE>(p.gate, at, p.gate_wide) : 1.0f) : 0.0f;
        factors[t] = DECAYED ? rate * exp_log(logs[t]) : rate;
    }
    float sums[VALUE_WIDTH / 8][4] = {};
    __syncthreads();
#pragma unroll 1
    for (int from = 0; from < length; from += SIDE) {
        load_tile<SIDE, STATE_THREADS, ALIGNED>(queries, q + from * p.q_t, p.q_t, length - from, KEYS);
        load_tile<SIDE, STATE_THREADS, ALIGNED>(d_outputs, d_o + from * p.do_t, p.do_t, length - from, VALUES);
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();
#pragma unroll(2)
        for (int s = 0; s < SIDE / 16; s++) {
            Pair<DTYPE> a[4];
            queries.columns(a[0], a[1], a[2], a[3], 16 * warp, 16 * s);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int token = from + 16 * s + 8 * half + 2 * c;
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const float2 both = Make<DTYPE>::floats(a[2 * half + e]);
                    a[2 * half + e] = Make<DTYPE>::pair_of(factors[token] * both.x, factors[token + 1] * both.y);
                }
            }
            add_rows(sums, a, d_outputs, 16 * s);
        }
        __syncthreads();
    }
    // what dW adds: all of it where there were no tokens, none where another chunk's start cleared the state
    const bool empty = chunk.length == 0;
    const float share = empty ? 1.0f : !carried || !chunk.last ? 0.0f : DECAYED ? exp_log(logs[tokens - 1]) : 1.0f;
    const int64_t at = (static_cast<int64_t>(sequence) * p.heads + head) * (KEYS * VALUES);
    float product = 0.0f;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int key = 16 * warp + r + 8 * half;
        if (key >= KEYS) break;
#pragma unroll
        for (int n = 0; n < VALUE_WIDTH / 8; n++) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const int value = 8 * n + 2 * c + e;
                const int64_t place = at + key * VALUES + value;
                if (value >= VALUES) continue;
                const float x = sums[n][2 * half + e] + (ENDED && share != 0.0f ? share * p.d_final[place] : 0.0f);
                if (p.d_initial) p.d_initial[place] = x;
                if (STARTED && p.total) product += x * p.initial[place];
            }
        }
    }
    if (STARTED && p.total) {
        product = warp_sum(product);
        if (lane == 0) factors[warp] = product;  // the tokens' factors are done with: a barrier ended the last tile, or none was read
        __syncthreads();
        if (threadIdx.x == 0) {
            float sum = 0.0f;
            for (int i = 0; i < STATE_THREADS / 32; i++) sum += factors[i];
            p.total[sequence * p.heads + head] = sum;
        }
    }
}
#endif
