// What dual_core does before and behind its parts (SPEC.md 5, 10).
//
//   before   q and k with rows of unit norm, x n with n = rsqrt(sum x^2 + 1e-6);  beta v;  the cores' weights F = alpha f and S = (1 - alpha) s
//   behind   dq, dk = the sum of the parts' dX, or where the parts saw n x:  n (dX - x n^2 <x, dX>)
//            dv = dv_below + beta d(beta v)      dbeta = dbeta_below + <d(beta v), v>      dg = the sum of the parts'
//            df = alpha dF      ds = (1 - alpha) dS      dalpha = f dF - s dS, which a second kernel sums over tokens where alpha has none
//   states   S / (|S| + 1e-8), in place
//
// Rows are read and written once, summed in float32 and rounded once; nothing is computed to speak of, bytes limit all of it: a row of D numbers moves
// 2 D before, and behind 3 D (q), 3 or 4 D (k, D more under a norm) and 4 D (v). A row belongs to a few lanes, 16 bytes each.
//
// DTYPE; KEYS, VALUES: head_dims; ALIGNED: 16 bytes can be read and written at once; L2NORM.
#include "fragments.cuh"
#include "loads.cuh"
#include "stores.cuh"

constexpr int THREADS = 128, PER = 16 / sizeof(DTYPE), EACH = 4;  // rows of a thread
constexpr int KEY_WIDTH = KEYS <= 32 ? 32 : KEYS <= 64 ? 64 : 128, VALUE_WIDTH = VALUES <= 32 ? 32 : VALUES <= 64 ? 64 : 128;
constexpr int KEY_LANES = KEY_WIDTH / PER, VALUE_LANES = VALUE_WIDTH / PER;

struct Params {
    const DTYPE *q, *k, *v;
    const void *beta, *alpha, *fast_gate, *slow_gate;  // all but beta may be absent
    DTYPE *q_unit, *k_unit, *values;                    // before; each pair below may be absent
    float *fast_weight, *slow_weight;
    const DTYPE *fast_q, *slow_q, *fast_k, *slow_k, *below_k, *fast_v, *below_v;  // behind
    const void *below_beta, *slow_g, *below_g;
    const float *of_fast, *of_slow;
    DTYPE *dq, *dk, *dv;
    void *dbeta, *dg, *d_alpha, *d_fast_gate, *d_slow_gate;
    int64_t q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, beta_b, beta_t, beta_h, alpha_b, alpha_t, alpha_h, fast_b, fast_t, fast_h, slow_b, slow_t, slow_h;
    int tokens, heads, groups, beta_wide, alpha_wide, fast_wide, slow_wide, g_wide, d_alpha_wide;
    int q_blocks, k_blocks;  // the first blocks of the grid take rows of q, the next rows of k, the others rows of v
    uint32_t key_rows, value_rows;
    float share;  // alpha where it is a number
};

// A row of `[B, T, heads, D]` by its number.
struct Row {
    uint32_t batch, token, head;
    DEVICE Row(uint32_t row, int tokens, int heads) : head(row % heads) {
        const uint32_t rest = row / heads;
        batch = rest / tokens, token = rest % tokens;
    }
    DEVICE int64_t at(int64_t b, int64_t t, int64_t h) const { return batch * b + token * t + head * h; }
};

// PER numbers of a row from `column` on, zeros beyond its COLUMNS
template <int COLUMNS> DEVICE void read(float (&x)[PER], const DTYPE* row, int column) {
#pragma unroll
    for (int i = 0; i < PER; i++) x[i] = 0.0f;
    if constexpr (ALIGNED) {
        if (column < COLUMNS) load_run(x, row + column);
    } else {
#pragma unroll
        for (int i = 0; i < PER; i++)
            if (column + i < COLUMNS) x[i] = widen(row[column + i]);
    }
}
template <int COLUMNS> DEVICE void add(float (&x)[PER], const DTYPE* all, int64_t row, int column) {
    if (!all) return;
    float y[PER];
    read<COLUMNS>(y, all + row * COLUMNS, column);
#pragma unroll
    for (int i = 0; i < PER; i++) x[i] += y[i];
}
template <int COLUMNS> DEVICE void write(DTYPE* row, int column, const float (&x)[PER]) {
    if constexpr (ALIGNED) {
        if (column < COLUMNS) {
            alignas(16) DTYPE y[PER];
#pragma unroll
            for (int i = 0; i < PER; i++) y[i] = narrow<DTYPE>(x[i]);
            *reinterpret_cast<uint4*>(row + column) = *reinterpret_cast<const uint4*>(y);
        }
    } else {
#pragma unroll
        for (int i = 0; i < PER; i++)
            if (column + i < COLUMNS) row[column + i] = narrow<DTYPE>(x[i]);
    }
}
// <x, y> of a row that LANES lanes share
template <int LANES> DEVICE float row_product(const float (&x)[PER], const float (&y)[PER]) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < PER; i++) sum += x[i] * y[i];
#pragma unroll
    for (int lanes = LANES / 2; lanes; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
    return sum;
}
// What a block has to do: rows from `first` on, EACH of a thread's lanes.
template <int LANES, typename Do> DEVICE void each_row(int block, uint32_t rows, Do todo) {
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const uint32_t row = (static_cast<uint32_t>(block) * EACH + i) * (THREADS / LANES) + threadIdx.x / LANES;
        todo(row, row < rows, static_cast<int>(threadIdx.x % LANES) * PER);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) dual_before(const __grid_constant__ Params p) {
    const int block = static_cast<int>(blockIdx.x), of_v = block - p.q_blocks - p.k_blocks;
    if (of_v < 0) {
        const bool queries = block < p.q_blocks;
        each_row<KEY_LANES>(queries ? block : block - p.q_blocks, p.key_rows, [&](uint32_t number, bool there, int column) {
            const Row row(there ? number : 0, p.tokens, p.groups);
            float x[PER];
            read<KEYS>(x, queries ? p.q + row.at(p.q_b, p.q_t, p.q_h) : p.k + row.at(p.k_b, p.k_t, p.k_h), column);
            const float norm = rsqrtf(row_product<KEY_LANES>(x, x) + 1e-6f);
#pragma unroll
            for (int i = 0; i < PER; i++) x[i] *= norm;
            if (there) write<KEYS>((queries ? p.q_unit : p.k_unit) + static_cast<int64_t>(number) * KEYS, column, x);
        });
        return;
    }
    each_row<VALUE_LANES>(of_v, p.value_rows, [&](uint32_t number, bool there, int column) {
        if (!there) return;
        const Row row(number, p.tokens, p.heads);
        if (p.values) {
            const float beta = load_gate<DTYPE>(p.beta, row.at(p.beta_b, p.beta_t, p.beta_h), p.beta_wide);
            float x[PER];
            read<VALUES>(x, p.v + row.at(p.v_b, p.v_t, p.v_h), column);
#pragma unroll
            for (int i = 0; i < PER; i++) x[i] *= beta;
            write<VALUES>(p.values + static_cast<int64_t>(number) * VALUES, column, x);
        }
        if (column == 0) {
            float fast = p.alpha ? load_gate<DTYPE>(p.alpha, row.at(p.alpha_b, p.alpha_t, p.alpha_h), p.alpha_wide) : p.share, slow = 1.0f - fast;
            if (p.fast_gate) fast *= load_gate<DTYPE>(p.fast_gate, row.at(p.fast_b, p.fast_t, p.fast_h), p.fast_wide);
            if (p.slow_gate) slow *= load_gate<DTYPE>(p.slow_gate, row.at(p.slow_b, p.slow_t, p.slow_h), p.slow_wide);
            if (p.fast_weight) p.fast_weight[number] = fast;
            if (p.slow_weight) p.slow_weight[number] = slow;
        }
    });
}

extern "C" __global__ void __launch_bounds__(THREADS) dual_behind(const __grid_constant__ Params p) {
    const int block = static_cast<int>(blockIdx.x), of_v = block - p.q_blocks - p.k_blocks;
    if (of_v < 0) {
        const bool queries = block < p.q_blocks;
        each_row<KEY_LANES>(queries ? block : block - p.q_blocks, p.key_rows, [&](uint32_t number, bool there, int column) {
            const Row row(there ? number : 0, p.tokens, p.groups);
            float total[PER] = {};
            if (there) {
                add<KEYS>(total, queries ? p.fast_q : p.fast_k, number, column);
                add<KEYS>(total, queries ? p.slow_q : p.slow_k, number, column);
                if (!queries) add<KEYS>(total, p.below_k, number, column);
            }
            if constexpr (L2NORM) {
                float x[PER];
                read<KEYS>(x, queries ? p.q + row.at(p.q_b, p.q_t, p.q_h) : p.k + row.at(p.k_b, p.k_t, p.k_h), column);
                const float norm = rsqrtf(row_product<KEY_LANES>(x, x) + 1e-6f), along = norm * norm * row_product<KEY_LANES>(x, total);
#pragma unroll
                for (int i = 0; i < PER; i++) total[i] = norm * (total[i] - along * x[i]);
            }
            if (there) write<KEYS>((queries ? p.dq : p.dk) + static_cast<int64_t>(number) * KEYS, column, total);
        });
        return;
    }
    each_row<VALUE_LANES>(of_v, p.value_rows, [&](uint32_t number, bool there, int column) {
        const Row row(there ? number : 0, p.tokens, p.heads);
        if (p.dv || p.dbeta) {
            float arrived[PER] = {}, x[PER] = {};
            if (there) add<VALUES>(arrived, p.fast_v, number, column);
            if (p.dbeta) {
                if (p.fast_v) read<VALUES>(x, p.v + row.at(p.v_b, p.v_t, p.v_h), column);
                const float found = row_product<VALUE_LANES>(arrived, x);
                if (there && column == 0) store_gate<DTYPE>(p.dbeta, number, p.beta_wide, found + (p.below_beta ? load_gate<DTYPE>(p.below_beta, number, p.beta_wide) : 0.0f));
            }
            if (p.dv && there) {
                const float beta = load_gate<DTYPE>(p.beta, row.at(p.beta_b, p.beta_t, p.beta_h), p.beta_wide);
#pragma unroll
                for (int i = 0; i < PER; i++) arrived[i] *= beta;
                add<VALUES>(arrived, p.below_v, number, column);
                write<VALUES>(p.dv + static_cast<int64_t>(number) * VALUES, column, arrived);
            }
        }
        if (!there || column) return;
        if (p.dg) {
            const float slow = p.slow_g ? load_gate<DTYPE>(p.slow_g, number, p.g_wide) : 0.0f;
            store_gate<DTYPE>(p.dg, number, p.g_wide, slow + (p.below_g ? load_gate<DTYPE>(p.below_g, number, p.g_wide) : 0.0f));
        }
        if (p.d_alpha || p.d_fast_gate || p.d_slow_gate) {
            float quick = p.of_fast ? p.of_fast[number] : 0.0f, steady = p.of_slow ? p.of_slow[number] : 0.0f;
            const float share = p.alpha ? load_gate<DTYPE>(p.alpha, row.at(p.alpha_b, p.alpha_t, p.alpha_h), p.alpha_wide) : p.share;
            if (p.d_fast_gate) store_gate<DTYPE>(p.d_fast_gate, number, p.fast_wide, quick * share);
            if (p.d_slow_gate) store_gate<DTYPE>(p.d_slow_gate, number, p.slow_wide, steady * (1.0f - share));
            if (p.d_alpha) {
                if (p.fast_gate) quick *= load_gate<DTYPE>(p.fast_gate, row.at(p.fast_b, p.fast_t, p.fast_h), p.fast_wide);
                if (p.slow_gate) steady *= load_gate<DTYPE>(p.slow_gate, row.at(p.slow_b, p.slow_t, p.slow_h), p.slow_wide);
                store_gate<DTYPE>(p.d_alpha, number, p.d_alpha_wide, quick - steady);
            }
        }
    });
}

// Sums over a block's threads, the same for all of them; `parts`: a number for each warp.
constexpr int MANY = 1024;
DEVICE float block_sum(float x, float* parts) {
    x = warp_sum(x);
    if (lane_id() == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    return warp_sum(lane_id() < static_cast<int>(blockDim.x) / 32 ? parts[lane_id()] : 0.0f);
}

struct Sums {
    const float* from;  // [rows, columns]
    void* to;           // [columns]
    int rows, columns, wide;
};
extern "C" __global__ void __launch_bounds__(MANY) dual_sums(const __grid_constant__ Sums p) {
    SHARED_MEMORY(memory);
    float sum = 0.0f;
#pragma unroll 4
    for (int row = threadIdx.x; row < p.rows; row += MANY) sum += p.from[static_cast<int64_t>(row) * p.columns + blockIdx.x];
    sum = block_sum(sum, reinterpret_cast<float*>(memory));
    if (threadIdx.x == 0) store_gate<DTYPE>(p.to, blockIdx.x, p.wide, sum);
}

struct States {
    float* states;
};
extern "C" __global__ void __launch_bounds__(MANY) dual_normalize(const __grid_constant__ States p) {
    SHARED_MEMORY(memory);
    float* const state = p.states + static_cast<int64_t>(blockIdx.x) * (KEYS * VALUES);
    float squares = 0.0f;
#pragma unroll 4
    for (int i = threadIdx.x; i < KEYS * VALUES; i += MANY) squares += state[i] * state[i];
    const float by = 1.0f / (sqrtf(block_sum(squares, reinterpret_cast<float*>(memory))) + 1e-8f);
#pragma unroll 4
    for (int i = threadIdx.x; i < KEYS * VALUES; i += MANY) state[i] *= by;
}
