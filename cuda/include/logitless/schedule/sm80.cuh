// sm80.cuh - the mainloop for everything that has mma.sync: D[M, N] = epilogue(A[M, K] B[N, K]^T).
//
//   CTA        256 threads, 8 warps of kWarpM x 64, one CTA an SM.
//              Halves: tile 128 x 256 of 64 x 64 warps (2 x 4), 128 accumulators a thread. 4096
//              bytes of fragments for 64 x 64 x 16 products keep the shared-memory port below the
//              tensor pipe; 32 x 64 warps need 50% more and ran at 250 TFLOP/s on an H200, these
//              at 400.
//              Floats: 128 x 128 of 32 x 64 warps (4 x 2).
//   Ring       kStages x 64 bytes of K of the tile's rows, by cp.async: 4 x 24 KB = 96 KB fit the
//              99 KB parts (sm_86, 89, 120).
//   Registers  fragments of the next step are loaded before the products of this one.
//   Operands   pointers and pitches are multiples of 16 bytes; every extent may be ragged.
//
// Barriers and the race each prevents
//   copy_wait + __syncthreads, once a k-block, before the first fragments of the next stage are
//     read: every thread's copies into it have landed, for every thread; and every warp has the
//     last fragments of this stage in registers, so that copies issued after it may overwrite it.
//   __syncthreads after a tile: the next tile's first copies must not overtake a warp that still
//     reads ahead.
//
// A class block (index of the partials) is one warp's 64 columns.
#pragma once
#include "logitless/epilogue/direct.cuh"
#include "logitless/epilogue/fragments.cuh"
#include "logitless/mma/sm80.cuh"
#include "logitless/ptx/barrier.cuh"
#include "logitless/schedule/raster.cuh"

namespace logitless {

template <class Element_, int kTileN_, int kWarpM_, int kStages_, int kMajorA_, int kMajorB_>
struct Sm80Config {
  using Element = Element_;
  static constexpr int kTileM = 128, kTileN = kTileN_, kWarpM = kWarpM_, kStages = kStages_;
  static constexpr int kMajorA = kMajorA_, kMajorB = kMajorB_;
};

template <class Config, class Epilogue>
struct Sm80Gemm {
  using Element = typename Config::Element;
  static constexpr int kTileM = Config::kTileM, kTileN = Config::kTileN, kStages = Config::kStages;
  static constexpr int kThreads = 256, kWarpM = Config::kWarpM, kWarpN = 64,
                       kWarpsN = kTileN / kWarpN;
  static_assert(kTileM / kWarpM * kWarpsN == kThreads / 32, "eight warps cover the tile");
  using A = Sm80Operand<Element, Config::kMajorA, kTileM>;
  using B = Sm80Operand<Element, Config::kMajorB, kTileN>;
  using LoaderA = typename A::template Loader<kThreads>;
  using LoaderB = typename B::template Loader<kThreads>;
  static constexpr int kBlock = 64 / Element::kBytes;  // K of a stage
  static constexpr int kStageBytes = A::kBytes + B::kBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  static constexpr int kFragmentsM = kWarpM / 16, kFragmentsN = kWarpN / 16;
  using Tiles = Raster<kTileM, kTileN, Epilogue::kGated, Epilogue::kSliced>;

  using Mma = Sm80Mma<Element>;
  struct Fragments {
    typename Mma::Fragment a[kFragmentsM], b[kFragmentsN];
  };
  struct Offsets {
    u32 a, b;
    int lane;
  };

  static __device__ __forceinline__ void read(Fragments& f, u32 stage, const Offsets& at, int s) {
#pragma unroll
    for (int i = 0; i < kFragmentsM; i++)
      A::template fragment<true>(f.a[i].bits, stage, at.a, i, s, at.lane);
#pragma unroll
    for (int j = 0; j < kFragmentsN; j++)
      B::template fragment<false>(f.b[j].bits, stage + A::kBytes, at.b, j, s, at.lane);
  }

  static __device__ __forceinline__ void multiply(float (&acc)[kFragmentsM][kWarpN / 2],
                                                  const LoaderA& load_a, const LoaderB& load_b,
                                                  const Offsets& at, u32 shared, int depth,
                                                  bool single) {
    const int blocks = ceil_div(depth, kBlock);
    auto fill = [&](int kb, int slot) {
      if (kb < blocks) {
        load_a.load(shared + slot * kStageBytes, kb * kBlock, depth);
        load_b.load(shared + slot * kStageBytes + A::kBytes, kb * kBlock, depth);
      }
      ptx::copy_commit();
    };
#pragma unroll
    for (int s = 0; s < kStages - 1; s++) fill(s, s);
    ptx::copy_wait<kStages - 2>();
    __syncthreads();
    Fragments f[2];
    read(f[0], shared, at, 0);
    int stage = 0, free = kStages - 1;
    [[maybe_unused]] float block[kFragmentsM][kWarpN / 2];  // products of one stage (kSeparate)
#pragma unroll 1
    for (int kb = 0; kb < blocks; kb++) {
      fill(kb + kStages - 1, free);
      free = stage;
      const int next = stage + 1 == kStages ? 0 : stage + 1;
#pragma unroll
      for (int s = 0; s < 2; s++) {
        if (s == 0) {
          read(f[1], shared + stage * kStageBytes, at, 1);
        } else {
          ptx::copy_wait<kStages - 2>();
          __syncthreads();
          read(f[0], shared + next * kStageBytes, at, 0);  // past the last block: stale, unused
        }
        if constexpr (Mma::kSeparate)
          Mma::template product<kFragmentsM, kFragmentsN>(block, f[s].a, f[s].b, single, s == 0);
        else Mma::template product<kFragmentsM, kFragmentsN>(acc, f[s].a, f[s].b, single, false);
      }
      if constexpr (Mma::kSeparate) {
#pragma unroll
        for (int i = 0; i < kFragmentsM; i++)
#pragma unroll
          for (int j = 0; j < kWarpN / 2; j++) acc[i][j] += block[i][j];
      }
      stage = next;
    }
    ptx::copy_wait<0>();
    __syncthreads();
  }

  static __device__ __forceinline__ void run(const GemmParams& p) {
    extern __shared__ __align__(128) unsigned char shared_raw[];
    const u32 shared = ptx::shared_address(shared_raw);
    const int warp = __shfl_sync(kFullWarp, threadIdx.x / 32, 0), lane = threadIdx.x & 31;
    const int warp_m = warp / kWarpsN, warp_n = warp % kWarpsN;

    const int count = p.count ? __ldg(p.count) : -1;
    if (p.count && count < 0) return;
    const int rows = count >= 0 && !p.count_is_k ? count : p.m;
    const int depth = count >= 0 && p.count_is_k ? count : p.k;
    const Offsets at{A::left_offset(warp_m * kWarpM, lane), B::right_offset(warp_n * kWarpN, lane),
                     lane};
    const Tiles tiles(p, rows);
    const int total = tiles.tiles();
    DirectStore<Element> store(p, rows, lane);
#pragma unroll 1
    for (int t = blockIdx.x; t < total; t += gridDim.x) {
      const Tile tile = tiles(t);
      const int m = tile.row_block * kTileM, n = tile.column_block * kTileN;
      // This slice of K, as operands of their own.
      const int share = Epilogue::kSliced ? tiles.share(ceil_div(depth, kBlock)) * kBlock : depth;
      const int k0 = min(tile.slice * share, depth), length = min(share, depth - k0);
      float acc[kFragmentsM][kWarpN / 2];
#pragma unroll
      for (int f = 0; f < kFragmentsM; f++)
#pragma unroll
        for (int i = 0; i < kWarpN / 2; i++) acc[f][i] = 0.f;
      multiply(acc, LoaderA(A::from(p.a, p.lda, k0), p.lda, m, rows, length, threadIdx.x),
               LoaderB(B::from(p.b, p.ldb, k0), p.ldb, n, p.n, length, threadIdx.x), at, shared,
               length, p.reserved & 1);
      if constexpr (Epilogue::kSliced) store.shift = static_cast<i64>(tile.slice) * p.slice_rows * p.ldd;
      for_each_fragment<true>(acc, [&](float (&fragment)[kWarpN / 2], int f) {
        store.row = m + warp_m * kWarpM + 16 * f;
        const Band band{
            p, rows, store.row, n + warp_n * kWarpN, kWarpsN * tile.column_block + warp_n, lane};
        if (band.column < p.n) Epilogue::template run<kWarpN>(fragment, band, store);
      });
    }
  }
};

}  // namespace logitless
