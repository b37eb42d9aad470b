// One chunk of 16 tokens of the gated delta rule in one warp (SPEC.md 3, 4): its factors, and what it does to rows of a matrix that follows the state.
//
//   factors   G_i = sum of g up to i inside the chunk; D_ij = exp(G_i - G_j) for i >= j
//             T = (I + stril(beta_i (k_i k_j) D_ij))^-1 diag(beta) by substitution in float32;  M = tril((q_i k_j) D_ij), its rows with the output's factor
//   rows X    of the transposed state (a row is one value column):   U = (V^T - e^G (X K^T)) T^T
//             o = e^G (Q X^T) + M U^T,      X <- e^(G_C) X + (U e^(G_C - G)) K
//   rows P    of a map, which starts as the identity: a start S0 becomes S0 P. A row of P is a row of X that has no values; what the tokens read
//             of it is q_eff, what they read of a start.
// The sums X and P stay in float32 in registers and are an operand after rounding. Keys and queries that are to be normalised keep their rows as they are:
// their inverse norms go into the factors.
#ifndef TITANS_DELTA_CHUNK_CUH
#define TITANS_DELTA_CHUNK_CUH

#include "fragments.cuh"
#include "loads.cuh"

constexpr int CHUNK = 16, SOLVE_ROW = 20, SOLVE_CHUNK = CHUNK * SOLVE_ROW + 16;

// Scratch for a pair of chunks, of a warp or of those that share its rows: the triangles, and a line of each factor.
struct PairScratch {
    float solve[2 * SOLVE_CHUNK];
    float log_decay[32], log_decay_rest[32];  // G, base 2, and for float32 what its rounding left out
    float beta[32], weight[32], key_norm[32]; // weight: beta times the key's inverse norm
    float read[32], tail[32];                 // e^G and e^(G_C - G), with the key's inverse norm
    float out[32], row_out[32];               // scale, gate and the query's inverse norm; with e^G
};

template <typename T> struct Factors {
    Pair<T> t00, t10, t11;                // T: blocks of rows and columns, zero above
    float read[4], tail[4];               // of tokens 2c, 2c+1, 2c+8, 2c+9
    float row_out[2];                     // of tokens r, r+8
    float total;                          // e^(G_C)
};
template <typename T> struct Scores {
    Pair<T> m00, m10, m11;                // M
};

// rsqrt(sum of squares + 1e-6) of a row
template <typename T, int COLUMNS> DEVICE float inverse_norm(const Tile<T, COLUMNS>& tile, int row) {
    float sum = 0.f;
#pragma unroll
    for (int column = 0; column < COLUMNS; column += 2) {
        const float2 x = Make<T>::floats(*tile.pair_at(row, column));
        sum += x.x * x.x + x.y * x.y;
    }
    return rsqrtf(sum + 1e-6f);
}

// The lane's token of the pair: its logarithm of decay (base 2), beta and output factor become lines of the scratch. `rows`: how many tokens can be read.
template <typename T, int K_TILE>
DEVICE void write_lines(PairScratch& scratch, float log_decay, float beta, float out, bool normed, const Tile<T, K_TILE>& k, const Tile<T, K_TILE>& q, int row0, int rows) {
    const int lane = lane_id();
    float sum = log_decay, rest = 0.f;
#pragma unroll
    for (int step = 1; step < CHUNK; step *= 2) {
        const float before = __shfl_up_sync(0xffffffffu, sum, step, CHUNK);
        const bool there = (lane & (CHUNK - 1)) >= step;
        if constexpr (!Dtype<T>::half) {  // differences of large sums have to be right to the last bits
            const float rest_before = __shfl_up_sync(0xffffffffu, rest, step, CHUNK), both = sum + before, back = both - sum;
            if (there) rest += rest_before + ((sum - (both - back)) + (before - back));
        }
        if (there) sum += before;
    }
    float left = __shfl_sync(0xffffffffu, sum, CHUNK - 1, CHUNK) - sum;
    if constexpr (!Dtype<T>::half) left += __shfl_sync(0xffffffffu, rest, CHUNK - 1, CHUNK) - rest;
    float key_norm = 1.f;
    if (normed && lane < rows) {
        key_norm = inverse_norm(k, row0 + lane);
        out *= inverse_norm(q, row0 + lane);
    }
    const float decay = exp2_fast(sum);
    scratch.log_decay[lane] = sum;
    if constexpr (!Dtype<T>::half) scratch.log_decay_rest[lane] = rest;
    scratch.beta[lane] = beta;
    scratch.weight[lane] = beta * key_norm;
    scratch.key_norm[lane] = key_norm;
    scratch.read[lane] = decay * key_norm;
    scratch.tail[lane] = exp2_fast(left) * key_norm;
    scratch.out[lane] = out;
    scratch.row_out[lane] = out * decay;
    __syncwarp();
}

// two numbers side by side in a line
DEVICE float2 both(const float* line) { return *reinterpret_cast<const float2*>(line); }

// k_i k_j and q_i k_j of a chunk: the triangle to be inverted goes to the scratch, if this warp `writes`, M is kept.
template <typename T, int K_TILE>
DEVICE void score(Scores<T>& kept, PairScratch& scratch, int which, const Tile<T, K_TILE>& k, const Tile<T, K_TILE>& q, int row0, bool writes = true) {
    constexpr int STEPS = K_TILE / 16;
    const int lane = lane_id(), r = lane / 4, c = lane % 4, first = which * CHUNK;
    float kk[2][4] = {}, qk[2][4] = {};
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
        Pair<T> k0, k1, k2, k3, q0, q1, q2, q3;
        k.right_rows(k0, k1, k2, k3, row0, 16 * s);
        q.rows(q0, q1, q2, q3, row0, 16 * s);
        Product<T>::add(kk[0], k0, k2, k1, k3, k0, k1);
        Product<T>::add(kk[1], k0, k2, k1, k3, k2, k3);
        Product<T>::add(qk[0], q0, q1, q2, q3, k0, k1);
        Product<T>::add(qk[1], q0, q1, q2, q3, k2, k3);
    }
    float* triangle = scratch.solve + which * SOLVE_CHUNK + r * SOLVE_ROW + 2 * c;
    const float *row_log = scratch.log_decay + first + r, *row_rest = scratch.log_decay_rest + first + r;
    const auto block = [&](int half, int n) {  // rows from 8 half on, columns from 8 n on; the inversion does not read the diagonal
        const float* column = scratch.log_decay + first + 2 * c + 8 * n;
        const float2 logs = both(column), norms = both(scratch.key_norm + first + 2 * c + 8 * n);
        const float row = row_log[8 * half], weight = scratch.weight[first + r + 8 * half], out = scratch.out[first + r + 8 * half];
        float first_log = row - logs.x, second_log = row - logs.y;
        if constexpr (!Dtype<T>::half) {
            const float2 rests = both(scratch.log_decay_rest + first + 2 * c + 8 * n);
            first_log += row_rest[8 * half] - rests.x, second_log += row_rest[8 * half] - rests.y;
        }
        float x = exp2_fast(first_log) * norms.x, y = exp2_fast(second_log) * norms.y;
        if (half == n) x = 2 * c <= r ? x : 0.f, y = 2 * c < r ? y : 0.f;
        if (writes) *reinterpret_cast<float2*>(triangle + 8 * half * SOLVE_ROW + 8 * n) = make_float2(kk[n][2 * half] * (x * weight), kk[n][2 * half + 1] * (y * weight));
        return Make<T>::pair_of(qk[n][2 * half] * (x * out), qk[n][2 * half + 1] * (y * out));
    };
    kept.m00 = block(0, 0), kept.m10 = block(1, 0), kept.m11 = block(1, 1);
}

// M of a 16-bit chunk among the warps that share the scratch: in the triangle's place, right of it and of its blocks above the diagonal.
template <typename T> DEVICE void hand_over(const Scores<T>& scores, PairScratch& scratch, int which) {
    uint32_t* line = reinterpret_cast<uint32_t*>(scratch.solve + which * SOLVE_CHUNK + lane_id() / 4 * SOLVE_ROW);
    const int c = lane_id() % 4;
    line[8 + 2 * c] = scores.m00, line[9 + 2 * c] = scores.m10, line[16 + c] = scores.m11;
}
template <typename T> DEVICE void take_over(Scores<T>& scores, const PairScratch& scratch, int which) {
    const uint32_t* line = reinterpret_cast<const uint32_t*>(scratch.solve + which * SOLVE_CHUNK + lane_id() / 4 * SOLVE_ROW);
    const int c = lane_id() % 4;
    scores.m00 = line[8 + 2 * c], scores.m10 = line[9 + 2 * c], scores.m11 = line[16 + c];
}

// Both chunks of the scratch: lane l inverts column l % 16 of the unit triangle l / 16 by substitution, times that column's beta, in place.
// Warps that share the scratch do the same and `meet` before the one that `writes` does, and after it. LOWER: nothing is written above the diagonal's blocks.
template <bool LOWER, typename Meet> DEVICE void invert(PairScratch& scratch, Meet meet, bool writes = true) {
    const int lane = lane_id(), column = lane % CHUNK;
    float* triangle = scratch.solve + lane / CHUNK * SOLVE_CHUNK;
    __syncwarp();
    const float beta = scratch.beta[lane];
    float x[CHUNK];
#pragma unroll
    for (int block = 0; block < CHUNK; block += 4) {  // four rows at a time: four sums that do not wait for each other
        float sum[4], own[4][4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float4 four = *reinterpret_cast<const float4*>(triangle + (block + i) * SOLVE_ROW + block);
            own[i][0] = four.x, own[i][1] = four.y, own[i][2] = four.z, own[i][3] = four.w;
            sum[i] = block + i == column ? beta : 0.f;
        }
#pragma unroll
        for (int j = 0; j < block; j += 4)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float4 four = *reinterpret_cast<const float4*>(triangle + (block + i) * SOLVE_ROW + j);
                sum[i] -= four.x * x[j], sum[i] -= four.y * x[j + 1], sum[i] -= four.z * x[j + 2], sum[i] -= four.w * x[j + 3];
            }
#pragma unroll
        for (int i = 0; i < 4; i++) {
#pragma unroll
            for (int j = 0; j < i; j++) sum[i] -= own[i][j] * x[block + j];
            x[block + i] = sum[i];
        }
    }
    meet();
#pragma unroll
    for (int i = 0; i < CHUNK; i++)
        if (writes && (!LOWER || i >= 8 || column < 8)) triangle[i * SOLVE_ROW + column] = x[i];
    meet();
}

template <typename T> DEVICE void read_factors(Factors<T>& f, const PairScratch& scratch, int which) {
    const int lane = lane_id(), r = lane / 4, c = lane % 4, first = which * CHUNK;
    const float* inverse = scratch.solve + which * SOLVE_CHUNK + r * SOLVE_ROW + 2 * c;
    const float2 t00 = both(inverse), t10 = both(inverse + 8 * SOLVE_ROW), t11 = both(inverse + 8 * SOLVE_ROW + 8);
    f.t00 = Make<T>::pair_of(t00.x, t00.y), f.t10 = Make<T>::pair_of(t10.x, t10.y), f.t11 = Make<T>::pair_of(t11.x, t11.y);
    f.total = exp2_fast(scratch.log_decay[first + CHUNK - 1]);
#pragma unroll
    for (int n = 0; n < 2; n++) {
        const float2 read = both(scratch.read + first + 2 * c + 8 * n), tail = both(scratch.tail + first + 2 * c + 8 * n);
        f.read[2 * n] = read.x, f.read[2 * n + 1] = read.y, f.tail[2 * n] = tail.x, f.tail[2 * n + 1] = tail.y;
        f.row_out[n] = scratch.row_out[first + r + 8 * n];
    }
}

// Rounded rows: an operand from sums, for 16 rows.
template <typename T, int BLOCKS> struct Rounded {
    Pair<T> p[2][BLOCKS];
    DEVICE void take(const float (&x)[BLOCKS][4]) {
#pragma unroll
        for (int n = 0; n < BLOCKS; n++) {
            p[0][n] = Make<T>::pair_of(x[n][0], x[n][1]);
            p[1][n] = Make<T>::pair_of(x[n][2], x[n][3]);
        }
    }
    // d += these rows times 16 rows of b from 16 s on, 8 of its columns
    DEVICE void times(float (&d)[4], int s, Pair<T> b0, Pair<T> b1) const { Product<T>::add(d, p[0][2 * s], p[1][2 * s], p[0][2 * s + 1], p[1][2 * s + 1], b0, b1); }
};

// One chunk for MT times 16 rows, the first being `first_row` of [values; map]: `values` rows read V, the others are rows of the map.
// What the tokens read is written over V (values) and over Q (maps) in the tiles: `before_writing` is called when nobody reads this chunk's Q any more.
template <typename T, int K_TILE, int V_TILE, int MT, typename Meet>
DEVICE void advance(float (&x)[MT][K_TILE / 8][4], const Factors<T>& f, const Scores<T>& scores, int first_row, const Tile<T, K_TILE>& k, const Tile<T, K_TILE>& q,
                    const Tile<T, V_TILE>& v, int row0, Meet before_writing) {
    constexpr int BLOCKS = K_TILE / 8, STEPS = K_TILE / 16;
    const int lane = lane_id(), r = lane / 4, c = lane % 4;
    Rounded<T, BLOCKS> start[MT];
#pragma unroll
    for (int m = 0; m < MT; m++) start[m].take(x[m]);

    float u[MT][2][4] = {};  // X K^T, then U
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
        Pair<T> k0, k1, k2, k3;
        k.right_rows(k0, k1, k2, k3, row0, 16 * s);
#pragma unroll
        for (int m = 0; m < MT; m++) start[m].times(u[m][0], s, k0, k1), start[m].times(u[m][1], s, k2, k3);
    }
#pragma unroll
    for (int m = 0; m < MT; m++) {
        const int row = first_row + 16 * m;
        Pair<T> error[2][2], given[2][2];  // rows half, tokens half
        const bool reads = row < V_TILE;
        if (reads) v.columns(given[0][0], given[1][0], given[0][1], given[1][1], row, row0);
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int n = 0; n < 2; n++) {
                float first = -f.read[2 * n] * u[m][n][2 * half], second = -f.read[2 * n + 1] * u[m][n][2 * half + 1];
                if (reads) {
                    const float2 own = Make<T>::floats(given[half][n]);
                    first += own.x, second += own.y;
                }
                error[half][n] = Make<T>::pair_of(first, second);
            }
#pragma unroll
        for (int n = 0; n < 2; n++) {
#pragma unroll
            for (int e = 0; e < 4; e++) u[m][n][e] = 0.f;
            Product<T>::add(u[m][n], error[0][0], error[1][0], error[0][1], error[1][1], n ? f.t10 : f.t00, n ? f.t11 : Make<T>::zero());
        }
    }

    Pair<T> query[2][BLOCKS];
#pragma unroll
    for (int s = 0; s < STEPS; s++) q.rows(query[0][2 * s], query[1][2 * s], query[0][2 * s + 1], query[1][2 * s + 1], row0, 16 * s);
    before_writing();
#pragma unroll
    for (int m = 0; m < MT; m++) {
        const int row = first_row + 16 * m;
#pragma unroll
        for (int half = 0; half < 2; half++) {  // 8 columns of what is read
            float o[4] = {};
#pragma unroll
            for (int s = 0; s < STEPS; s++)
                Product<T>::add(o, query[0][2 * s], query[1][2 * s], query[0][2 * s + 1], query[1][2 * s + 1], start[m].p[half][2 * s], start[m].p[half][2 * s + 1]);
#pragma unroll
            for (int e = 0; e < 4; e++) o[e] *= f.row_out[e >> 1];
            const Pair<T> u0 = Make<T>::pair_of(u[m][0][2 * half], u[m][0][2 * half + 1]), u1 = Make<T>::pair_of(u[m][1][2 * half], u[m][1][2 * half + 1]);
            Product<T>::add(o, scores.m00, scores.m10, Make<T>::zero(), scores.m11, u0, u1);
#pragma unroll
            for (int t = 0; t < 2; t++) {
                const Pair<T> rounded_pair = Make<T>::pair_of(o[2 * t], o[2 * t + 1]);
                if (row < V_TILE) *v.pair_at(row0, r + 8 * t, row + 8 * half + 2 * c) = rounded_pair;
                else *q.pair_at(row0, r + 8 * t, row - V_TILE + 8 * half + 2 * c) = rounded_pair;
            }
        }
    }

    Pair<T> late[MT][2][2];
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int n = 0; n < 2; n++)
                late[m][half][n] = Make<T>::pair_of(f.tail[2 * n] * u[m][n][2 * half], f.tail[2 * n + 1] * u[m][n][2 * half + 1]);
#pragma unroll
    for (int b = 0; b < BLOCKS; b += 2) {
        Pair<T> k0, k1, k2, k3;
        k.right_columns(k0, k1, k2, k3, 8 * b, row0);
#pragma unroll
        for (int m = 0; m < MT; m++) {
#pragma unroll
            for (int e = 0; e < 4; e++) x[m][b][e] *= f.total, x[m][b + 1][e] *= f.total;
            Product<T>::add(x[m][b], late[m][0][0], late[m][1][0], late[m][0][1], late[m][1][1], k0, k1);
            Product<T>::add(x[m][b + 1], late[m][0][0], late[m][1][0], late[m][0][1], late[m][1][1], k2, k3);
        }
    }
}

#endif
