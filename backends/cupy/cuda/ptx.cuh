// The instructions that CUDA C++ has no words for, one inline function each: mma.sync, ldmatrix, cp.async, named barriers, clusters, conversions.
// sm_80 and later; clusters only where the file is compiled for sm_90 or later. No header is included, so that NVRTC needs nothing beside itself.
// The tests' emulator defines TITANS_PTX_CUH and brings functions of the same names: all that a kernel does beyond plain CUDA C++ stands here.
#ifndef TITANS_PTX_CUH
#define TITANS_PTX_CUH

using uint16_t = unsigned short;
using uint32_t = unsigned int;
using uint64_t = unsigned long long;
using int32_t = int;
using int64_t = long long;

#define DEVICE __device__ __forceinline__
// A block's dynamic shared memory, the only kind that kernels here use: `SHARED_MEMORY(memory);` makes `memory` a pointer to its bytes.
#define SHARED_MEMORY(name) extern __shared__ __align__(128) unsigned char name[]

DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// the same number, of which the compiler knows nothing: what is computed from it is computed there, and not kept in registers from before a loop
DEVICE int fresh(int x) {
    asm volatile("" : "+r"(x));
    return x;
}

// ---- Conversions. A 16-bit number travels as its bits; in a packed pair the first number lies in the low half.

DEVICE uint16_t bf16_bits(float x) {
    uint16_t bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}
DEVICE uint16_t f16_bits(float x) {
    uint16_t bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}
DEVICE float f16_value(uint16_t bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
}
DEVICE uint32_t bf16_pair(float first, float second) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %2, %1;" : "=r"(pair) : "f"(first), "f"(second));
    return pair;
}
DEVICE uint32_t f16_pair(float first, float second) {
    uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0, %2, %1;" : "=r"(pair) : "f"(first), "f"(second));
    return pair;
}
// float32 rounded to tf32's 10 bits of mantissa, as the bits of a float32
DEVICE uint32_t tf32_bits(float x) {
    uint32_t bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
    return bits;
}
DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// ---- Products d += a b of one warp: a is 16 x k row-major, b is k x 8 column-major, d is 16 x 8, float32.
// Lane l holds, with r = l / 4 and c = l % 4:   d: (r, 2c) (r, 2c+1) (r+8, 2c) (r+8, 2c+1)
// k = 16: a: pairs (r, 2c..) (r+8, 2c..) (r, 2c+8..) (r+8, 2c+8..)      b: pairs (2c.., r) (2c+8.., r)      [b: (row of k, column)]
// k = 8 (tf32): a: (r, c) (r+8, c) (r, c+4) (r+8, c+4)                  b: (c, r) (c+4, r)

DEVICE void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
DEVICE void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
DEVICE void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// ---- 8 x 8 tiles of 16-bit numbers from shared memory: lane l gives the address of row l % 8 of tile l / 8 (16 bytes, aligned; of x2 the lanes
// below 16 count). Register i holds of tile i what lane l = 4 r + c needs: (r, 2c) and (r, 2c + 1); with _trans, (2c, r) and (2c + 1, r).

DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
DEVICE void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(row)) : "memory");
}
DEVICE void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(row)) : "memory");
}

// an 8 x 8 tile of 16-bit numbers in registers, (r, 2c) and (r, 2c + 1) in lane 4 r + c, turned around
DEVICE uint32_t transposed(uint32_t tile) {
    uint32_t turned;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(turned) : "r"(tile));
    return turned;
}

// ---- Asynchronous copies of 16 aligned bytes to shared memory; zeros where not valid, and then the global address is not read.

DEVICE void cp_async_16(void* shared, const void* global, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(valid ? 16 : 0) : "memory");
}
DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
DEVICE void cp_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }

// ---- A barrier of some warps of a block: `threads`, a multiple of 32, meet at number `id`, 1 to 15 (0 is __syncthreads).

DEVICE void barrier_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// ---- Clusters of blocks (sm_90 and later; a kernel says __cluster_dims__). Elsewhere a block is a cluster of its own.

#if __CUDA_ARCH__ >= 900
DEVICE uint32_t cluster_rank() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
DEVICE uint32_t cluster_size() {
    uint32_t size;
    asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    return size;
}
DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
// the same where what was written need not be seen by the others: they may only go on
DEVICE void cluster_arrive_relaxed() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
// what lies in the block `rank` of this cluster where `mine` lies in this one; 4 bytes
DEVICE uint32_t cluster_load_bits(const void* mine, uint32_t rank) {
    uint32_t there, bits;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(mine)), "r"(rank));
    asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(bits) : "r"(there) : "memory");
    return bits;
}
// the same of 16 aligned bytes
DEVICE uint4 cluster_load_16(const void* mine, uint32_t rank) {
    uint32_t there;
    uint4 x;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(mine)), "r"(rank));
    asm volatile("ld.shared::cluster.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(there) : "memory");
    return x;
}
#else
DEVICE uint32_t cluster_rank() { return 0; }
DEVICE uint32_t cluster_size() { return 1; }
DEVICE void cluster_arrive() {}
DEVICE void cluster_arrive_relaxed() {}
DEVICE void cluster_wait() { __syncthreads(); }
DEVICE uint32_t cluster_load_bits(const void* mine, uint32_t) { return *static_cast<const volatile uint32_t*>(mine); }
DEVICE uint4 cluster_load_16(const void* mine, uint32_t) { return *static_cast<const uint4*>(mine); }
#endif

#endif
