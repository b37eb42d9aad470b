// Hopper's own instructions (sm_90a): products of a warpgroup that read shared memory through descriptors, registers handed from warpgroup to warpgroup, fences.
// A warpgroup is four warps from a multiple of four on. What a product adds to stays untouched until it was waited for.
#ifndef TITANS_HOPPER_CUH
#define TITANS_HOPPER_CUH

#include "warp.cuh"

template <int REGISTERS> DEVICE void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS)); }
template <int REGISTERS> DEVICE void leave_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS)); }

// what this thread wrote to shared memory may be read by products after the next barrier
DEVICE void fence_for_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// says that a named barrier is reached, without waiting for the others there
DEVICE void barrier_arrive(int id, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// four 8 x 8 tiles of 16-bit numbers to shared memory, as ldmatrix_x4 reads them; _trans: turned around
DEVICE void stmatrix_x4(void* row, const uint32_t (&r)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(shared_address(row)), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
}
DEVICE void stmatrix_x4_trans(void* row, const uint32_t (&r)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(shared_address(row)), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
}

// ---- Operands in shared memory: rows of 128 bytes, the 16-byte piece p of row r at place p ^ (r % 8), from a multiple of 1024 on (Tile<T, 64>).
// By rows (their numbers are summed over): 16 more of the summed dimension lie 32 bytes on. By columns (a row's numbers are the product's rows or columns):
// 16 more of the summed dimension lie 16 rows on, 2048 bytes.

constexpr int FURTHER_IN_ROWS = 32, FURTHER_IN_COLUMNS = 2048;

DEVICE uint64_t operand(const void* p) {
    return static_cast<uint64_t>((shared_address(p) & 0x3ffff) >> 4) | 1ull << 16 | static_cast<uint64_t>(1024 >> 4) << 32 | 1ull << 62;
}
DEVICE uint64_t further(uint64_t operand, int bytes) { return operand + (bytes >> 4); }

// the registers from here on may be used by products, and products see what was written to them
DEVICE void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING> DEVICE void products_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory"); }
// the compiler takes the numbers from here on only
template <int N> DEVICE void settled(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}

template <typename T> constexpr bool IS_BFLOAT = false;
template <> constexpr bool IS_BFLOAT<Bfloat> = true;

enum Lies { BY_ROWS = 0, BY_COLUMNS = 1 };

// d (+)= a b, 64 x 64, 16 of the summed dimension; warp w of the four has rows 16 w on, and of each 8 columns a lane has what it has of mma.sync's d.
// ADD: to what is there.
#define TITANS_PRODUCT(TYPE) \
    asm volatile( \
        "{\n.reg .pred add;\nsetp.ne.b32 add, %34, 0;\n" \
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, " \
        "%32, %33, add, 1, 1, %35, %36;\n}" \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]) \
        : "l"(a), "l"(b), "n"(static_cast<int>(ADD)), "n"(static_cast<int>(A)), "n"(static_cast<int>(B)))
template <typename T, Lies A, Lies B, bool ADD> DEVICE void product(float (&d)[32], uint64_t a, uint64_t b) {
    if constexpr (IS_BFLOAT<T>) TITANS_PRODUCT("bf16");
    else TITANS_PRODUCT("f16");
}

// the same with a in registers, as mma.sync takes it; they stay as they are until the product was waited for
#define TITANS_PRODUCT_OF(TYPE) \
    asm volatile( \
        "{\n.reg .pred add;\nsetp.ne.b32 add, %37, 0;\n" \
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, " \
        "{%32,%33,%34,%35}, %36, add, 1, 1, %38;\n}" \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]) \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(static_cast<int>(ADD)), "n"(static_cast<int>(B)))
template <typename T, Lies B, bool ADD> DEVICE void product_of(float (&d)[32], const uint32_t (&a)[4], uint64_t b) {
    if constexpr (IS_BFLOAT<T>) TITANS_PRODUCT_OF("bf16");
    else TITANS_PRODUCT_OF("f16");
}

#endif
