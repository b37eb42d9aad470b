// The gradients of S_fast where one block holds a whole chunk (SPEC.md 10; formulas, those of states among them, and cost: fast_core_gradients.cu).
// A warp takes 16 queries: P = Q K^T and D = dO V^T are computed once; F P and F D stay in its registers, rounded, as the operand of dq = (F D) K. Through
// one square in shared memory, F P first, they become what a warp needs as 16 keys: dv = (F P)^T dO, dk = (F D)^T Q. dg is summed on the spot.
// 5 products of a triangle of C^2 (K or V) where the tiles of fast_core_gradients take 8; the v heads of a q/k head come one after the other.
//
// DTYPE; KEYS, VALUES: head_dims; SIDE: tokens, 16 to 128; DECAYED: g is given; FLOWING: dg is wanted; GROUPED: several v heads share a q/k head;
// STARTED: a state is carried into the first chunk; ENDED: a gradient of the last state arrives; ALIGNED: 16-byte copies can take the rows of q, k, v and dO.
#include "fast_gradients.cuh"

constexpr int BANDS = SIDE / 16, THREADS = 32 * BANDS, SQUARE = SIDE < 32 ? 32 : SIDE;
constexpr int AT_ONCE = SIZE == 4 || WIDEST > 64 || SIDE < 32 ? 1 : (WIDEST > 32 && GROUPED ? 384 : 512) / THREADS;  // blocks that registers must allow

using Scores = Tile<DTYPE, SQUARE>;

// 16 x 16 scores of a warp's rows, whose operands are there already, with 16 rows of `met`
template <int WIDTH> DEVICE void score(float (&x)[2][4], const Pair<DTYPE> (&own)[WIDTH / 16][4], const Tile<DTYPE, WIDTH>& met, int row) {
#pragma unroll
    for (int s = 0; s < WIDTH / 16; s++) {
        Pair<DTYPE> b[4];
        met.right_rows(b[0], b[1], b[2], b[3], row, 16 * s);
        Product<DTYPE>::add(x[0], own[s][0], own[s][1], own[s][2], own[s][3], b[0], b[1]);
        Product<DTYPE>::add(x[1], own[s][0], own[s][1], own[s][2], own[s][3], b[2], b[3]);
    }
}

// acc += the scores' 16 columns from 16 band on, transposed, times the rows of `met`
template <int WIDTH> DEVICE void add_turned(float (&acc)[WIDEST / 8][4], const Scores& scores, const Tile<DTYPE, WIDTH>& met, int band, int bands) {
#pragma unroll 1
    for (int m = band; m < bands; m++) {
        Pair<DTYPE> a[4];
        scores.columns(a[0], a[1], a[2], a[3], 16 * band, 16 * m);
        add_rows(acc, a, met, 16 * m);
    }
}

// SIDE rows of a state, from `key` on, rounded
DEVICE void load_state(const ValueTile& state, const float* w, int key) {
    __syncthreads();
    for (int i = threadIdx.x; i < SIDE * VALUE_WIDTH; i += THREADS) keep_state(state, w, key, i);
    __syncthreads();
}

// What a state adds to a gradient of keys' width: by own state^T, `rate` times it to acc, and its product with the rows of `met` to `sum`
DEVICE void add_state(float (&acc)[WIDEST / 8][4], float (&sum)[2], const Pair<DTYPE> (&own)[VALUE_WIDTH / 16][4], const ValueTile& state, int key,
                      const KeyTile& met, int row0, const float (&by)[2], const float (&rate)[2]) {
#pragma unroll
    for (int j = 0; j < SIDE / 16; j++) {
        if (key + 16 * j >= KEY_WIDTH) break;
        float x[2][4] = {};
        score(x, own, state, 16 * j);
#pragma unroll
        for (int n = 0; n < 2; n++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const float more = by[e / 2] * x[n][e];
                sum[e / 2] += more * widen(*met.element(row0 + lane_id() / 4 + e / 2 * 8, key + 16 * j + 8 * n + lane_id() % 4 * 2 + e % 2));
                acc[(key + 16 * j) / 8 + n][e] += rate[e / 2] * more;
            }
        }
    }
}

DEVICE void clear(float (&acc)[WIDEST / 8][4]) {
#pragma unroll
    for (int n = 0; n < WIDEST / 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) acc[n][e] = 0.0f;
}

extern "C" __global__ void __launch_bounds__(THREADS, AT_ONCE) fast_core_chunk_gradients(const __grid_constant__ Params p) {
    SHARED_MEMORY(memory);
    const KeyTile queries{memory}, keys{memory + KEY_BYTES};
    const ValueTile values{memory + 2 * KEY_BYTES}, d_outputs{memory + 2 * KEY_BYTES + VALUE_BYTES};
    const Scores scores{memory + 2 * (KEY_BYTES + VALUE_BYTES)};
    Log* const logs = reinterpret_cast<Log*>(scores.base + SIDE * SQUARE * SIZE);
    float *const rates = reinterpret_cast<float*>(logs + SIDE), *const flows = rates + SIDE, *const parts = flows + SIDE;
    const ValueTile state{reinterpret_cast<unsigned char*>(parts + BANDS * SIDE)};

    const int groups = p.heads / p.group, shared_head = blockIdx.x % groups, warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
    const int lane = lane_id(), r = lane / 4, c = lane % 4;
    const Chunk chunk = find_chunk(grid_of(p), blockIdx.x / groups);
    if (chunk.length == 0) return;
    const int batch = static_cast<int>(chunk.batch), begin = static_cast<int>(chunk.begin), length = chunk.length, bands = (length + 15) / 16;
    const int rows = length - 16 * warp;  // of this warp's 16 tokens those below; none: it has nothing to do
    const auto place = [&](int64_t b, int64_t t, int64_t h, int head) { return fresh(batch) * b + static_cast<int64_t>(fresh(begin)) * t + head * h; };
    load_rounds<SIDE, THREADS, ALIGNED>(queries, p.q + place(p.q_b, p.q_t, p.q_h, shared_head), p.q_t, length, KEYS);
    load_rounds<SIDE, THREADS, ALIGNED>(keys, p.k + place(p.k_b, p.k_t, p.k_h, shared_head), p.k_t, length, KEYS);

    const auto load_values = [&](int head) {
        load_rounds<SIDE, THREADS, ALIGNED>(values, p.v + place(p.v_b, p.v_t, p.v_h, head), p.v_t, length, VALUES);
    };
    const auto load_outputs = [&](int head) {
        load_rounds<SIDE, THREADS, ALIGNED>(d_outputs, p.d_o + place(p.do_b, p.do_t, p.do_h, head), p.do_t, length, VALUES);
    };
    load_values(shared_head * p.group);
    load_outputs(shared_head * p.group);
    cp_async_commit();
    float dq[WIDEST / 8][4] = {}, dk[WIDEST / 8][4] = {};
#pragma unroll 1
    for (int member = 0; member < (GROUPED ? p.group : 1); member++) {
        const int head = shared_head * p.group + member;
        const bool more = GROUPED && member < p.group - 1;  // the next head's tiles come as soon as nobody reads this one's
        if (DECAYED && warp == 0) running_log<DTYPE>(logs, SIDE, p.g, place(p.g_b, p.g_t, p.g_h, head), p.g_t, p.g_wide, length);
        for (int t = threadIdx.x; t < SIDE; t += THREADS) {
            const float gate = p.gate && t < length ? load_gate<DTYPE>(p.gate, place(p.gate_b, p.gate_t, p.gate_h, head) + t * p.gate_t, p.gate_wide) : 1.0f;
            rates[t] = t < length ? p.scale * gate : 0.0f;
        }
        cp_async_wait<0>();
        __syncthreads();

        const int64_t token = static_cast<int64_t>(fresh(batch)) * p.tokens + fresh(begin) + 16 * warp;
        const int64_t memory_of = (static_cast<int64_t>(chunk.sequence) * p.heads + head) * (KEYS * VALUES);
        float flow[2] = {}, diagonal[2] = {}, left[2] = {};
        if (!GROUPED) clear(dq);
        if constexpr (STARTED) {
            if (chunk.first && p.offset > 0) {
                const int row = 16 * warp + r;
                const float by[2] = {DECAYED ? exp_log(logs[row]) : 1.0f, DECAYED ? exp_log(logs[row + 8]) : 1.0f}, rate[2] = {rates[row], rates[row + 8]};
                Pair<DTYPE> own[VALUE_WIDTH / 16][4];
#pragma unroll
                for (int s = 0; s < VALUE_WIDTH / 16; s++) d_outputs.rows(own[s][0], own[s][1], own[s][2], own[s][3], 16 * warp, 16 * s);
#pragma unroll
                for (int key = 0; key < KEY_WIDTH; key += SIDE) {
                    load_state(state, p.initial + memory_of, key);
                    add_state(dq, flow, own, state, key, queries, 16 * warp, by, rate);
                }
            }
        }
        Pair<DTYPE> kept[BANDS][4];  // F D
        if (rows > 0) {
            Pair<DTYPE> own_key[KEY_WIDTH / 16][4], own_value[VALUE_WIDTH / 16][4];
#pragma unroll
            for (int s = 0; s < KEY_WIDTH / 16; s++) queries.rows(own_key[s][0], own_key[s][1], own_key[s][2], own_key[s][3], 16 * warp, 16 * s);
#pragma unroll
            for (int s = 0; s < VALUE_WIDTH / 16; s++) d_outputs.rows(own_value[s][0], own_value[s][1], own_value[s][2], own_value[s][3], 16 * warp, 16 * s);
            const float rate[2] = {rates[16 * warp + r], rates[16 * warp + r + 8]};
#pragma unroll
            for (int j = 0; j < BANDS; j++) {
                if (j > warp) break;
                float x[2][4] = {}, y[2][4] = {}, met[2][2] = {};
                score(x, own_key, keys, 16 * j);
                score(y, own_value, values, 16 * j);
#pragma unroll
                for (int n = 0; n < 2; n++) {
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        const int query = 16 * warp + r + e / 2 * 8, key = 16 * j + 8 * n + 2 * c + e % 2;
                        if (key > query) x[n][e] = y[n][e] = 0.0f;
                        else if (DECAYED) y[n][e] *= exp_between(logs[query], logs[key]);
                        const float both = x[n][e] * y[n][e];
                        if (key == query) {
                            diagonal[e / 2] += both;
                        } else {
                            flow[e / 2] += both;
                            if (FLOWING) met[n][e % 2] += both * rate[e / 2];
                        }
                        if (DECAYED && key <= query) x[n][e] *= exp_between(logs[query], logs[key]);
                        x[n][e] *= rate[e / 2], y[n][e] *= rate[e / 2];
                    }
                }
                if constexpr (FLOWING) {
                    const float mine = sum_of_four(met[0][0], met[0][1], met[1][0], met[1][1]);
                    if (r % 2 == 0) parts[warp * SIDE + 16 * j + r / 4 * 8 + 2 * c + r / 2 % 2] = mine;
                }
                Pair<DTYPE> a[4];
                as_operand<DTYPE>(a, x[0], x[1]);
                as_operand<DTYPE>(kept[j], y[0], y[1]);
#pragma unroll
                for (int i = 0; i < 4; i++) *scores.pair_at(16 * warp + i % 2 * 8, r, 16 * j + i / 2 * 8 + 2 * c) = a[i];
                if (p.dq) add_rows(dq, kept[j], keys, 16 * j);
            }
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float sum = row_sum(flow[half]), apart = row_sum(diagonal[half]);
                const int row = r + 8 * half;
                if (c || row >= rows) continue;
                if (FLOWING) flows[16 * warp + row] = sum * rate[half];
                if (p.dgate) store_gate<DTYPE>(p.dgate, (token + row) * p.heads + head, p.gate_wide, (sum + apart) * p.scale);
            }
            if (p.dq && (!GROUPED || member == p.group - 1))
                store_rows<KEY_WIDTH>(p.dq + (token * groups + shared_head) * KEYS, static_cast<int64_t>(groups) * KEYS, dq, rows, KEYS);
        }
        float dv[WIDEST / 8][4] = {};
        if constexpr (ENDED) {
            if (!GROUPED) clear(dk);
            if (chunk.last) {
                const Log last = logs[SIDE - 1];
                const int row = 16 * warp + r;
                const float by[2] = {DECAYED ? exp_between(last, logs[row]) : 1.0f, DECAYED ? exp_between(last, logs[row + 8]) : 1.0f}, one[2] = {1.0f, 1.0f};
                Pair<DTYPE> own[VALUE_WIDTH / 16][4];
#pragma unroll
                for (int s = 0; s < VALUE_WIDTH / 16; s++) values.rows(own[s][0], own[s][1], own[s][2], own[s][3], 16 * warp, 16 * s);
#pragma unroll
                for (int key = 0; key < KEY_WIDTH; key += SIDE) {
                    load_state(state, p.d_final + memory_of, key);
                    add_state(dk, left, own, state, key, keys, 16 * warp, by, one);
#pragma unroll
                    for (int s = 0; s < SIDE / 16; s++) {
                        if (key + 16 * s >= KEY_WIDTH) break;
                        Pair<DTYPE> a[4];
                        keys.rows(a[0], a[1], a[2], a[3], 16 * warp, key + 16 * s);
                        add_rows(dv, a, state, 16 * s);
                    }
                }
#pragma unroll
                for (int n = 0; n < VALUE_WIDTH / 8; n++)
#pragma unroll
                    for (int e = 0; e < 4; e++) dv[n][e] *= by[e / 2];
                if constexpr (FLOWING) {
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        left[half] = row_sum(left[half]);
                        if (c == 0 && r + 8 * half < rows) flows[row + 8 * half] -= left[half];
                    }
                }
            }
        }
        __syncthreads();
        if (more) load_values(head + 1);
        if constexpr (FLOWING) {  // before token t the sum of what flows in less what flows out
            for (int t = threadIdx.x; t < length; t += THREADS) {
                float sum = -flows[t];
                for (int i = t / 16; i < bands; i++) sum += parts[i * SIDE + t];
                flows[t] = sum;
            }
        }
        if (p.dv && rows > 0) {
            add_turned(dv, scores, d_outputs, warp, bands);
            store_rows<VALUE_WIDTH>(p.dv + (token * p.heads + head) * VALUES, static_cast<int64_t>(p.heads) * VALUES, dv, rows, VALUES);
        }
        if (!p.dk && !FLOWING && !GROUPED) return;
        __syncthreads();
        if (more) {
            load_outputs(head + 1);
            cp_async_commit();
        }
        if (FLOWING && warp == 0) {
            float before = STARTED && p.total && chunk.first && p.offset > 0 ? p.total[chunk.sequence * p.heads + head] : 0.0f;
            for (int base = 0; base < length; base += 32) {
                const int t = base + lane;
                const float sum = sum_up_to(t < length ? flows[t] : 0.0f, lane);
                const float up_to = __shfl_up_sync(0xffffffffu, sum, 1);
                if (t < length) store_gate<DTYPE>(p.dg, (static_cast<int64_t>(batch) * p.tokens + begin + t) * p.heads + head, p.g_wide, before + (lane ? up_to : 0.0f));
                before += __shfl_sync(0xffffffffu, sum, 31);
            }
        }
        if (p.dk && rows > 0) {
#pragma unroll
            for (int j = 0; j < BANDS; j++) {
                if (j > warp) break;
#pragma unroll
                for (int i = 0; i < 4; i++) *scores.pair_at(16 * warp + i % 2 * 8, r, 16 * j + i / 2 * 8 + 2 * c) = kept[j][i];
            }
        }
        __syncthreads();
        if (p.dk && rows > 0) {
            if (!GROUPED && !ENDED) clear(dk);
            add_turned(dk, scores, queries, warp, bands);
            if (!GROUPED || member == p.group - 1)
                store_rows<KEY_WIDTH>(p.dk + (token * groups + shared_head) * KEYS, static_cast<int64_t>(groups) * KEYS, dk, rows, KEYS);
        }
        if (GROUPED) __syncthreads();
    }
}
