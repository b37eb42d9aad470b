// One chunk of 16 tokens of the gated delta rule in one warp (SPEC.md 3, 4): its factors, and what it does to rows of a matrix that follows the state.
//
//   factors   G_i = sum of g up to i inside the chunk; D_ij = exp(G_i - G_j) for i >= j
//             A = (I + stril(beta_i (k_i k_j) D_ij))^-1 by substitution in float32;  T = A diag(beta), in two 16-bit parts;  M = tril((q_i k_j) D_ij)
//   rows X    of the transposed state (a row is one value column):   U = (V^T - e^G (X K^T)) T^T
//             o = e^G (Q X^T) + M U^T,      X <- e^(G_C) X + (U e^(G_C - G)) K
//   rows D    of a map: a start S0 becomes S0 (gamma I - D) with gamma = e^(sum of g), so a row of D is a row of X whose values are gamma k:
//             U = e^G (gamma K^T - D K^T) T^T,   and q_eff = e^G (gamma Q - Q D^T) - M U^T is what the chunk's tokens read from the start.
// The sums X and D stay in float32 in registers and are an operand after rounding. Keys and queries that are to be normalised keep their rows as they are:
// their inverse norms go into the factors.
#ifndef TITANS_DELTA_CHUNK_CUH
#define TITANS_DELTA_CHUNK_CUH

#include "fragments.cuh"
#include "loads.cuh"

constexpr int CHUNK = 16, SOLVE_ROW = 24, SOLVE_CHUNK = CHUNK * SOLVE_ROW + 16;

// A warp's scratch for a pair of chunks: the triangles, and a line of each factor.
struct PairScratch {
    float solve[2 * SOLVE_CHUNK];
    float log_decay[32], log_decay_rest[32], beta[32], out[32], key_norm[32];  // the sum of logarithms, and for float32 what its rounding left out
};

template <typename T> struct Scores {
    Pair<T> p[2][2];  // M: block of rows, block of columns
};
template <typename T> struct Factors {
    Pair<T> high[2][2], low[2][2];  // T: block of rows, block of columns
    float read[4], tail[4];         // of tokens 2c, 2c+1, 2c+8, 2c+9: e^G and e^(G_C - G), with the key's inverse norm
    float row_read[2], row_out[2];  // of tokens r, r+8: e^G; scale, gate and the query's inverse norm
    float total;                    // e^(G_C)
};

// 2^(G_i - G_j) for tokens of a scratch's line
template <typename T> DEVICE float decay_between(const PairScratch& scratch, int i, int j) {
    const float between = scratch.log_decay[i] - scratch.log_decay[j];
    return exp2_fast(Dtype<T>::half ? between : between + (scratch.log_decay_rest[i] - scratch.log_decay_rest[j]));
}

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
    float key_norm = 1.f;
    if (normed && lane < rows) {
        key_norm = inverse_norm(k, row0 + lane);
        out *= inverse_norm(q, row0 + lane);
    }
    scratch.log_decay[lane] = sum;
    scratch.log_decay_rest[lane] = rest;
    scratch.beta[lane] = beta;
    scratch.out[lane] = out;
    scratch.key_norm[lane] = key_norm;
    __syncwarp();
}

// k_i k_j and q_i k_j of a chunk: the triangle to be inverted goes to the scratch, M is kept.
template <typename T, int K_TILE>
DEVICE void score(Scores<T>& kept, PairScratch& scratch, int which, const Tile<T, K_TILE>& k, const Tile<T, K_TILE>& q, int row0) {
    constexpr int STEPS = K_TILE / 16;
    const int lane = lane_id(), r = lane / 4, c = lane % 4, first = which * CHUNK;
    float kk[2][4] = {}, qk[2][4] = {};
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
        Pair<T> a0, a1, a2, a3, b0, b1, b2, b3;
        k.rows(a0, a1, a2, a3, row0, 16 * s);
        q.rows(b0, b1, b2, b3, row0, 16 * s);
        Product<T>::add(kk[0], a0, a1, a2, a3, a0, a2);
        Product<T>::add(kk[1], a0, a1, a2, a3, a1, a3);
        Product<T>::add(qk[0], b0, b1, b2, b3, a0, a2);
        Product<T>::add(qk[1], b0, b1, b2, b3, a1, a3);
    }
    float* triangle = scratch.solve + which * SOLVE_CHUNK;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int i = r + 8 * half;
        const float weight = scratch.beta[first + i] * scratch.key_norm[first + i];
#pragma unroll
        for (int n = 0; n < 2; n++) {
            float lower[2], inclusive[2];
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const int j = 2 * c + e + 8 * n;
                const float decay = j <= i ? decay_between<T>(scratch, first + i, first + j) * scratch.key_norm[first + j] : 0.f;
                inclusive[e] = qk[n][2 * half + e] * decay;
                lower[e] = j < i ? kk[n][2 * half + e] * decay * weight : 0.f;
            }
            kept.p[half][n] = Make<T>::pair_of(inclusive[0], inclusive[1]);
            *reinterpret_cast<float2*>(triangle + i * SOLVE_ROW + 8 * n + 2 * c) = make_float2(lower[0], lower[1]);
        }
    }
}

// Both chunks of the scratch: lane l inverts column l % 16 of the unit triangle l / 16 by substitution, times that column's beta, in place.
DEVICE void invert(PairScratch& scratch) {
    const int lane = lane_id(), column = lane % CHUNK;
    float* triangle = scratch.solve + lane / CHUNK * SOLVE_CHUNK;
    float x[CHUNK];
    __syncwarp();
#pragma unroll
    for (int i = 0; i < CHUNK; i++) {
        float line[CHUNK];
#pragma unroll
        for (int j = 0; j < i; j += 4) *reinterpret_cast<float4*>(line + j) = *reinterpret_cast<const float4*>(triangle + i * SOLVE_ROW + j);
        float sum = i == column ? 1.f : 0.f;
#pragma unroll
        for (int j = 0; j < i; j++) sum -= line[j] * x[j];
        x[i] = sum;
    }
    __syncwarp();
    const float beta = scratch.beta[lane];
#pragma unroll
    for (int i = 0; i < CHUNK; i++) triangle[i * SOLVE_ROW + column] = x[i] * beta;
    __syncwarp();
}

template <typename T> DEVICE void read_factors(Factors<T>& f, const PairScratch& scratch, int which) {
    const int lane = lane_id(), r = lane / 4, c = lane % 4, first = which * CHUNK, end = first + CHUNK - 1;
    const float* inverse = scratch.solve + which * SOLVE_CHUNK;
    f.total = exp2_fast(scratch.log_decay[end]);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int i = r + 8 * half;
        f.row_read[half] = exp2_fast(scratch.log_decay[first + i]);
        f.row_out[half] = scratch.out[first + i];
#pragma unroll
        for (int n = 0; n < 2; n++) {
            const float2 x = *reinterpret_cast<const float2*>(inverse + i * SOLVE_ROW + 8 * n + 2 * c);
            f.high[half][n] = Make<T>::pair_of(x.x, x.y);
            f.low[half][n] = Make<T>::rest(x.x, x.y, f.high[half][n]);
        }
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int token = first + 2 * c + (i & 1) + (i & 2) * 4;
        f.read[i] = exp2_fast(scratch.log_decay[token]) * scratch.key_norm[token];
        f.tail[i] = decay_between<T>(scratch, end, token) * scratch.key_norm[token];
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
    DEVICE void take_rest(const float (&x)[BLOCKS][4], const Rounded& rounded) {
#pragma unroll
        for (int n = 0; n < BLOCKS; n++) {
            p[0][n] = Make<T>::rest(x[n][0], x[n][1], rounded.p[0][n]);
            p[1][n] = Make<T>::rest(x[n][2], x[n][3], rounded.p[1][n]);
        }
    }
};

// One chunk for MT times 16 rows, the first being `first_row` of [values; map]: `values` rows read V, the others are rows of the map.
// What the tokens read is written over V (values) and over Q (maps) in the tiles: `before_writing` is called when nobody reads this chunk's Q any more.
template <typename T, int K_TILE, int V_TILE, int MT, typename Meet>
DEVICE void advance(float (&x)[MT][K_TILE / 8][4], const Factors<T>& f, const Scores<T>& scores, float gamma, int first_row, const Tile<T, K_TILE>& k, const Tile<T, K_TILE>& q,
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
        k.rows(k0, k1, k2, k3, row0, 16 * s);
#pragma unroll
        for (int m = 0; m < MT; m++) {
            const auto& a = start[m].p;
            Product<T>::add(u[m][0], a[0][2 * s], a[1][2 * s], a[0][2 * s + 1], a[1][2 * s + 1], k0, k2);
            Product<T>::add(u[m][1], a[0][2 * s], a[1][2 * s], a[0][2 * s + 1], a[1][2 * s + 1], k1, k3);
        }
    }
#pragma unroll
    for (int m = 0; m < MT; m++) {
        const int row = first_row + 16 * m;
        const bool maps = row >= V_TILE;
        Pair<T> given[2][2];  // rows half, tokens half
        if (maps) k.columns(given[0][0], given[1][0], given[0][1], given[1][1], row - V_TILE, row0);
        else v.columns(given[0][0], given[1][0], given[0][1], given[1][1], row, row0);
        Pair<T> error[2][2];
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int n = 0; n < 2; n++) {
                const float2 own = Make<T>::floats(given[half][n]);
                const float first_read = f.read[2 * n], second_read = f.read[2 * n + 1];
                const float weight0 = maps ? gamma * first_read : 1.f, weight1 = maps ? gamma * second_read : 1.f;
                error[half][n] = Make<T>::pair_of(weight0 * own.x - first_read * u[m][n][2 * half], weight1 * own.y - second_read * u[m][n][2 * half + 1]);
            }
#pragma unroll
        for (int n = 0; n < 2; n++) {
#pragma unroll
            for (int e = 0; e < 4; e++) u[m][n][e] = 0.f;
            if constexpr (Dtype<T>::half)
                Product<T>::add(u[m][n], error[0][0], error[1][0], error[0][1], error[1][1], f.low[n][0], f.low[n][1]);
            Product<T>::add(u[m][n], error[0][0], error[1][0], error[0][1], error[1][1], f.high[n][0], f.high[n][1]);
        }
    }

    Pair<T> query[2][BLOCKS];
#pragma unroll
    for (int s = 0; s < STEPS; s++) q.rows(query[0][2 * s], query[1][2 * s], query[0][2 * s + 1], query[1][2 * s + 1], row0, 16 * s);
    before_writing();
#pragma unroll
    for (int m = 0; m < MT; m++) {
        const int row = first_row + 16 * m;
        const bool maps = row >= V_TILE;
#pragma unroll
        for (int half = 0; half < 2; half++) {  // 8 columns of what is read
            float o[4] = {};
#pragma unroll
            for (int s = 0; s < STEPS; s++)
                Product<T>::add(o, query[0][2 * s], query[1][2 * s], query[0][2 * s + 1], query[1][2 * s + 1], start[m].p[half][2 * s], start[m].p[half][2 * s + 1]);
            const int column = maps ? row - V_TILE + 8 * half : row + 8 * half;
#pragma unroll
            for (int t = 0; t < 2; t++) {
                if (maps) {
                    const float2 own = Make<T>::floats(*q.pair_at(row0 + r + 8 * t, column + 2 * c));
                    o[2 * t] -= gamma * own.x;
                    o[2 * t + 1] -= gamma * own.y;
                }
                o[2 * t] *= f.row_read[t];
                o[2 * t + 1] *= f.row_read[t];
            }
            const Pair<T> u0 = Make<T>::pair_of(u[m][0][2 * half], u[m][0][2 * half + 1]), u1 = Make<T>::pair_of(u[m][1][2 * half], u[m][1][2 * half + 1]);
            Product<T>::add(o, scores.p[0][0], scores.p[1][0], scores.p[0][1], scores.p[1][1], u0, u1);
#pragma unroll
            for (int t = 0; t < 2; t++) {
                const float out = maps ? -f.row_out[t] : f.row_out[t];
                const Pair<T> both = Make<T>::pair_of(out * o[2 * t], out * o[2 * t + 1]);
                const int token = row0 + r + 8 * t;
                if (maps) *q.pair_at(token, column + 2 * c) = both;
                else *v.pair_at(token, column + 2 * c) = both;
            }
        }
    }

#pragma unroll
    for (int m = 0; m < MT; m++) {
        Pair<T> late[2][2];
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int n = 0; n < 2; n++)
                late[half][n] = Make<T>::pair_of(f.tail[2 * n] * u[m][n][2 * half], f.tail[2 * n + 1] * u[m][n][2 * half + 1]);
#pragma unroll
        for (int b = 0; b < BLOCKS; b += 2) {
            Pair<T> k0, k1, k2, k3;
            k.columns(k0, k1, k2, k3, 8 * b, row0);
#pragma unroll
            for (int e = 0; e < 4; e++) x[m][b][e] *= f.total, x[m][b + 1][e] *= f.total;
            Product<T>::add(x[m][b], late[0][0], late[1][0], late[0][1], late[1][1], k0, k2);
            Product<T>::add(x[m][b + 1], late[0][0], late[1][0], late[0][1], late[1][1], k1, k3);
        }
    }
}

#endif
