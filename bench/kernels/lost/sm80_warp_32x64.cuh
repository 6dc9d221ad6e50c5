// LOST: mma.sync mainloop with a 128 x 128 tile of 32 x 64 warps, three stages, two CTAs an SM.
// H200, 8192 x 32064 x 4096, bf16: 231-255 TFLOP/s; its successor (cuda/include/logitless/schedule/sm80.cuh) 394-417.
// Why: 32 x 64 warps read 3072 bytes of fragments for 32 x 64 x 16 products where 64 x 64 warps read 4096 for twice as many (the
// shared-memory port was the wall), fragments were read in the step that used them, and each copy recomputed its bounds.
// sm80.cuh - the mainloop for everything that has mma.sync: D[M, N] = epilogue(A[M, K] B[N, K]^T).
//
//   CTA     256 threads, tile 128 x 128; 8 warps as 4 (M) x 2 (N), 32 x 64 each: 64 accumulators a thread, two CTAs an SM.
//   Ring    kStages x (A, B: 128 rows x 64 bytes of K) filled by cp.async, 16 KB a stage: 3 stages = 48 KB, so that two CTAs fit
//           the 99 KB parts (sm_86, 89, 120).
//   Operands need pointers and pitches that are multiples of 16 bytes; every extent may be ragged (zero fill).
//
// Barriers and the race each prevents
//   copy_wait + __syncthreads  before a stage is read: every thread's copies into it have landed, for every thread. The same barrier
//                              says that all warps are done with the stage of the previous k-block, which is the one the next copies
//                              overwrite: one barrier a k-block.
//   __syncthreads after a tile  the next tile's first copies must not overtake the slowest warp's last products.
//
// A class block (index of the partials) is one warp's 64 columns.
#pragma once
#include "logitless/epilogue/direct.cuh"
#include "logitless/mma/sm80.cuh"
#include "logitless/ptx/barrier.cuh"
#include "logitless/schedule/raster.cuh"

namespace logitless {

template <class Element, class Epilogue, int kStages, int kMajorA, int kMajorB>
struct Sm80Gemm {
  static constexpr int kTile = 128, kThreads = 256, kWarpM = 32, kWarpN = 64;
  using A = Sm80Operand<Element, kMajorA, kTile>;
  using B = Sm80Operand<Element, kMajorB, kTile>;
  static constexpr int kBlock = A::kDepthElements;  // K of a stage
  static constexpr int kStageBytes = A::kBytes + B::kBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  using Tiles = Raster<kTile, kTile, Epilogue::kGated>;

  static __device__ __forceinline__ void load(const GemmParams& p, u32 stage, int m, int n, int k, int rows, int depth) {
    const int t = threadIdx.x;
    if (kMajorA == kMajorK) A::template load<kThreads>(stage, p.a, p.lda, m, k, rows, depth, t);
    else A::template load<kThreads>(stage, p.a, p.lda, k, m, depth, p.m, t);
    if (kMajorB == kMajorK) B::template load<kThreads>(stage + A::kBytes, p.b, p.ldb, n, k, p.n, depth, t);
    else B::template load<kThreads>(stage + A::kBytes, p.b, p.ldb, k, n, depth, p.n, t);
  }

  static __device__ __forceinline__ void multiply(float (&acc)[2][kWarpN / 2], const GemmParams& p, u32 shared, int m, int n,
                                                  int warp_m, int warp_n, int lane, int rows, int depth) {
    const int blocks = ceil_div(depth, kBlock);
    const bool single = p.reserved & 1;
#pragma unroll
    for (int s = 0; s < kStages - 1; s++) {
      if (s < blocks) load(p, shared + s * kStageBytes, m, n, s * kBlock, rows, depth);
      ptx::copy_commit();
    }
    int stage = 0, fill = kStages - 1;
#pragma unroll 1
    for (int kb = 0; kb < blocks; kb++) {
      ptx::copy_wait<kStages - 2>();
      __syncthreads();
      if (kb + kStages - 1 < blocks) load(p, shared + fill * kStageBytes, m, n, (kb + kStages - 1) * kBlock, rows, depth);
      ptx::copy_commit();
      const u32 a = shared + stage * kStageBytes, b = a + A::kBytes;
#pragma unroll
      for (int s = 0; s < 2; s++) {  // 32 bytes of K each
        u32 left[2][4];
#pragma unroll
        for (int i = 0; i < 2; i++) A::left(left[i], a, warp_m * kWarpM + 16 * i, s, lane);
#pragma unroll
        for (int j = 0; j < kWarpN / 16; j++) {
          u32 right[4];
          B::right(right, b, warp_n * kWarpN + 16 * j, s, lane);
#pragma unroll
          for (int i = 0; i < 2; i++) Sm80Mma<Element>::mma(&acc[i][8 * j], left[i], right, single);
        }
      }
      stage = stage + 1 == kStages ? 0 : stage + 1;
      fill = fill + 1 == kStages ? 0 : fill + 1;
    }
    ptx::copy_wait<0>();
    __syncthreads();
  }

  static __device__ __forceinline__ void run(const GemmParams& p) {
    extern __shared__ __align__(128) unsigned char shared_raw[];
    const u32 shared = ptx::shared_address(shared_raw);
    const int warp = __shfl_sync(kFullWarp, threadIdx.x / 32, 0), lane = threadIdx.x & 31;
    const int warp_m = warp >> 1, warp_n = warp & 1;

    const int count = p.count ? __ldg(p.count) : -1;
    const int rows = count >= 0 && !p.count_is_k ? count : p.m;
    const int depth = count >= 0 && p.count_is_k ? count : p.k;
    const Tiles tiles(p, rows);
    const int total = tiles.tiles();
    DirectStore<Element> store(p, rows, lane);
#pragma unroll 1
    for (int t = blockIdx.x; t < total; t += gridDim.x) {
      const Tile tile = tiles(t);
      const int m = tile.row_block * kTile, n = tile.column_block * kTile;
      float acc[2][kWarpN / 2];
#pragma unroll
      for (int i = 0; i < kWarpN; i++) acc[i / (kWarpN / 2)][i % (kWarpN / 2)] = 0.f;
      multiply(acc, p, shared, m, n, warp_m, warp_n, lane, rows, depth);
#pragma unroll
      for (int i = 0; i < 2; i++) {
        store.row = m + warp_m * kWarpM + 16 * i;
        const Band band{p, rows, store.row, n + warp_n * kWarpN, 2 * tile.column_block + warp_n, lane};
        if (band.column < p.n) Epilogue::template run<kWarpN>(acc[i], band, store);
      }
    }
  }
};

}  // namespace logitless
