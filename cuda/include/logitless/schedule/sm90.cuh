// sm90.cuh - the Hopper mainloop: D[M, N] = epilogue(A[M, K] B[N, K]^T), 16-bit operands, float
// accumulators.
//
// One persistent, warp-specialised kernel body for every product of the library; what differs is
// the configuration and the epilogue policy.
//
//   CTA       384 threads: warpgroup 0 is the producer (one elected thread issues every TMA load),
//             1 and 2 consume. setmaxnreg moves registers over: 40 / 232 a thread, or 24 / 240
//             where a thread holds 192 accumulators.
//   Cluster   kCluster CTAs along M share a column tile: each loads 1/kCluster of the B tile and
//             multicasts it, so that the L2 delivers A + B/kCluster a CTA (without: +6% time under
//             the power limit; 4 CTAs fit only 120 of 132 SMs).
//   Ring      kStages x (A kTileM x 64, B kTileN x 64), 128-byte swizzle.
//   Schedule  cooperative: both consumers share a tile, kTileM / 2 rows each.
//             ping-pong: they take turns at whole tiles, one's epilogue under the other's products:
//             for epilogues with an exponential and a store.
//
// Barriers and the race each prevents
//   full[s]   1 arrival: the own producer, announcing the whole stage (the peers' multicast shares
//             complete on it too). Without it wgmma would read a stage that TMA has not written.
//   empty[s]  one arrival a consuming warp of EVERY CTA of the cluster: 8 x kCluster cooperative,
//             4 x kCluster ping-pong (one warpgroup reads a stage). Without it TMA, the peer's
//             multicast too, would overwrite what wgmma still reads. A wrong count hangs, and only
//             once K > kStages * 64.
//   named 2, 3  one each a warpgroup: its store panel (epilogue/panel.cuh).
//   named 4, 5  ping-pong: which warpgroup may issue products. Without them both would interleave
//             their stages, and each would wait for the other's half of the ring.
//   cluster   at the start: nobody multicasts into, or arrives on, a barrier that is not
//             initialised. At the end: nobody leaves while a peer may still arrive on its barriers.
//   grid      launch_dependents at the start, wait_for_grid_ahead at the END. A product launched
//             beside the one ahead (dW beside dE) shares inputs with it that were complete before
//             either began, and neither touches what the other writes. Without the wait it could
//             end first, and what follows, which waits for it alone, would overtake the other. It
//             also stands before the early return. The producer's wait inside the walk prevents no
//             race: it keeps the clusters at one block of K (schedule/raster.cuh).
#pragma once
#include "logitless/epilogue/band.cuh"
#include "logitless/epilogue/fragments.cuh"
#include "logitless/epilogue/panel.cuh"
#include "logitless/mma/sm90.cuh"
#include "logitless/ptx/barrier.cuh"
#include "logitless/ptx/grid.cuh"
#include "logitless/schedule/raster.cuh"
#include "logitless/schedule/ring.cuh"

namespace logitless {

template <class Half_, int kTileM_, int kTileN_, int kStages_, int kCluster_, bool kPingPong_,
          int kMajorA_, int kMajorB_>
struct Sm90Config {
  using Half = Half_;
  static constexpr int kTileM = kTileM_, kTileN = kTileN_, kStages = kStages_, kCluster = kCluster_;
  static constexpr bool kPingPong = kPingPong_;
  static constexpr int kMajorA = kMajorA_, kMajorB = kMajorB_;
};

template <class Config, class Epilogue>
struct Sm90Gemm {
  using Half = typename Config::Half;
  static constexpr int kTileM = Config::kTileM, kTileN = Config::kTileN, kStages = Config::kStages;
  static constexpr int kCluster = Config::kCluster, kMajorA = Config::kMajorA,
                       kMajorB = Config::kMajorB;
  static constexpr bool kPingPong = Config::kPingPong;

  static constexpr int kBytesA = kTileM * kDepth * 2, kBytesB = kTileN * kDepth * 2;
  static constexpr int kStageBytes = kBytesA + kBytesB;
  static constexpr int kFragments =
      kTileM / (kPingPong ? 64 : 128);                          // 64-row fragments of a warpgroup
  static constexpr bool kWide = kFragments * kTileN / 2 > 128;  // accumulators a thread
  static constexpr int kProducerRegisters =
      kWide ? 24 : 40;  // x 128, with twice the consumers': 504 = 3 x 168
  static constexpr int kConsumerRegisters = kWide ? 240 : 232;
  static constexpr int kPanels = kStages * kStageBytes;  // offset of the store panels
  static constexpr int kBarriers = kPanels + 2 * Epilogue::kPanels * kPanelBytes;
  static constexpr int kSharedBytes = kBarriers + 2 * kStages * 8;
  static_assert(kSharedBytes <= 232448, "shared memory of an SM");
  static_assert(kFragments >= 1 && kTileN % 64 == 0, "whole fragments and panels");

  using Position = RingPosition<kStages>;
  using Tiles =
      Raster<kTileM * kCluster, kTileN,
             Epilogue::kGated && kTileM * kCluster <= 256,  // a larger tile has no repair
             Epilogue::kSliced>;
  using Turns = Walk<Epilogue::kAhead>;  // dW's are uneven

  // -- producer ----------------------------------------------------------------------------------
  // Loads this CTA's A tile and its share of the B tile of one k-block.
  static __device__ __forceinline__ void load(const TensorMap* map_a, const TensorMap* map_b, u32 a,
                                              u32 bar, int rank, int m, int n, int k) {
    const u32 b = a + kBytesA;
    if (kMajorA == kMajorK) {
      ptx::tma_load(a, map_a, k, m, bar);  // box 64 (k) x kTileM
    } else {
#pragma unroll
      for (int h = 0; h < kTileM / 64; h++)
        ptx::tma_load(a + h * kPanelBytes, map_a, m + h * 64, k, bar);
    }
    if (kMajorB == kMajorK) {  // box 64 (k) x kTileN / kCluster
      constexpr int kShare = kTileN / kCluster;
      ptx::tma_load_multicast<kCluster>(b + rank * (kBytesB / kCluster), map_b, k,
                                        n + rank * kShare, bar);
    } else if (kTileN / 64 % kCluster == 0) {  // boxes 64 (n) x 64 (k): a share of the panels
      constexpr int kShare = kTileN / 64 / kCluster;
#pragma unroll
      for (int h = 0; h < kShare; h++) {
        const int panel = rank * kShare + h;
        ptx::tma_load_multicast<kCluster>(b + panel * kPanelBytes, map_b, n + panel * 64, k, bar);
      }
    } else {  // boxes 64 (n) x 64 / kCluster (k): a share of each panel
      constexpr int kShare = 64 / kCluster;
#pragma unroll
      for (int panel = 0; panel < kTileN / 64; panel++)
        ptx::tma_load_multicast<kCluster>(b + panel * kPanelBytes + rank * (kPanelBytes / kCluster),
                                          map_b, n + panel * 64, k + rank * kShare, bar);
    }
  }

  static __device__ __forceinline__ void produce(const TensorMap* map_a, const TensorMap* map_b,
                                                 const Tiles& tiles, const Turns& turns,
                                                 u32 shared, u32 full, u32 empty, int k_blocks) {
    const int rank = ptx::cluster_rank();
    Position at;
    for (int i = 0; i < turns.count; i++) {
      if (turns.joins(i)) ptx::wait_for_grid_ahead();
      const Tile tile = tiles(turns(i));
      const int m = (tile.row_block * kCluster + rank) * kTileM, n = tile.column_block * kTileN;
      const int k0 = tile.slice * k_blocks * kDepth;
#pragma unroll 1  // 24 registers: nothing of a second iteration may be alive
      for (int kb = 0; kb < k_blocks; kb++) {
        ptx::mbarrier_wait(empty + 8 * at.stage, at.lap ^ 1);
        ptx::mbarrier_expect(full + 8 * at.stage, kStageBytes);  // out-of-range boxes count in full
        load(map_a, map_b, shared + at.stage * kStageBytes, full + 8 * at.stage, rank, m, n,
             k0 + kb * kDepth);
        at.advance();
      }
    }
  }

  // -- consumer ----------------------------------------------------------------------------------
  using Accumulators = float[kFragments][kTileN / 2];

  static __device__ __forceinline__ void touch(Accumulators& acc) {
#pragma unroll
    for (int f = 0; f < kFragments; f++) ptx::touch(acc[f]);
  }

  // Products of one tile; `meanwhile` is called once they have begun. A stage is given back one
  // k-block late, when wait_group 1 says that it has been read, and without ever draining the pipe;
  // lane c of each warp arrives at CTA c.
  template <class Function>
  static __device__ __forceinline__ void multiply(Accumulators& acc, Position& at, u32 shared,
                                                  u32 full, u32 empty, int offset, int lane,
                                                  int k_blocks, int turn, Function&& meanwhile) {
    if (k_blocks == 0) {  // no live row: the sum over none
#pragma unroll
      for (int f = 0; f < kFragments; f++)
#pragma unroll
        for (int i = 0; i < kTileN / 2; i++) acc[f][i] = 0.f;
    }
    int previous = 0;
#pragma unroll 1
    for (int kb = 0; kb < k_blocks; kb++) {
      ptx::mbarrier_wait(full + 8 * at.stage, at.lap);
      const u32 stage = shared + at.stage * kStageBytes;
      const u64 a = Operand<kMajorA>::descriptor(stage + offset),
                b = Operand<kMajorB>::descriptor(stage + kBytesA);
      touch(acc);
      ptx::wgmma_fence();
#pragma unroll
      for (int k = 0; k < kDepth / 16; k++)
#pragma unroll
        for (int f = 0; f < kFragments; f++)
          Wgmma<Half, kTileN, kMajorA, kMajorB>::mma(
              acc[f], a + k * Operand<kMajorA>::kStep + f * Operand<kMajorA>::kNextPanel,
              b + k * Operand<kMajorB>::kStep, kb | k);
      ptx::wgmma_commit();
      touch(acc);
      if (kb > 0) {
        ptx::wgmma_wait<1>();
        if (lane < kCluster) ptx::mbarrier_arrive(empty + 8 * previous, lane);
      } else {
        meanwhile();
      }
      previous = at.stage;
      at.advance();
    }
    if (kPingPong && turn)
      ptx::barrier_arrive(turn, 256);  // every product is issued: the other may start
    ptx::wgmma_wait<0>();
    touch(acc);
    if (k_blocks > 0 && lane < kCluster) ptx::mbarrier_arrive(empty + 8 * previous, lane);
  }

  static __device__ __forceinline__ void consume(const TensorMap* map_d, const GemmParams& p,
                                                 const Tiles& tiles, const Turns& turns,
                                                 u32 shared, u32 full, u32 empty, int rows,
                                                 int k_blocks, int w, int warp, int lane) {
    constexpr u32 kTurn = 4;
    const int rank = ptx::cluster_rank();
    const int offset = kPingPong ? 0 : w * kFragments * kPanelBytes;
    Position at;
    PanelStore<Half, Epilogue::kPanels> store(
        map_d, shared + kPanels + w * Epilogue::kPanels * kPanelBytes, 2 + w, warp, lane);
    if (kPingPong && w == 1) {
      at.skip(k_blocks);
      if (turns.count > 0) ptx::barrier_arrive(kTurn, 256);  // the first turn is warpgroup 0's
    }
    Accumulators acc;
    for (int i = kPingPong ? w : 0; i < turns.count; i += kPingPong ? 2 : 1) {
      if (kPingPong) ptx::barrier_sync(kTurn + w, 256);
      // The turn goes to the next tile's warpgroup, if there is a next tile: every arrival meets a
      // wait.
      const Tile tile = tiles(turns(i));
      const int first_row =
          (tile.row_block * kCluster + rank) * kTileM + (kPingPong ? 0 : w * kFragments * 64);
      const auto band_of = [&](int f) {
        return Band{p,    rows, first_row + 64 * f + 16 * warp, tile.column_block * kTileN,
                    tile.column_block, lane};
      };
      multiply(acc, at, shared, full, empty, offset, lane, k_blocks,
               i + 1 < turns.count ? kTurn + (w ^ 1) : 0, [&] {
                 if constexpr (Epilogue::kAhead)
                   for (int f = 0; f < kFragments; f++)
                     Epilogue::template ahead<kTileN>(band_of(f));
               });
      for_each_fragment<Epilogue::kRolled>(acc, [&](float (&fragment)[kTileN / 2], int f) {
        store.row = first_row + 64 * f + tile.slice * p.slice_rows;
        Epilogue::template run<kTileN>(fragment, band_of(f), store);
      });
      if (kPingPong) at.skip(k_blocks);
    }
    store.drain();
  }

  static __device__ __forceinline__ void run(const TensorMap* map_a, const TensorMap* map_b,
                                             const TensorMap* map_d, const GemmParams& p) {
    ptx::launch_dependents();
    // Nothing to do: every block of every cluster, before any barrier.
    if ((p.count && __ldg(p.count) < 0) || (Epilogue::kGated && p.gate && __ldg(p.gate) == 0)) {
      ptx::wait_for_grid_ahead();
      return;
    }
    // No result: the map of D is that of A's rows in their places.
    if (!Epilogue::kPanels && p.in_place && __ldg(p.in_place)) map_a = map_d;
    extern __shared__ __align__(1024) unsigned char shared_raw[];
    const u32 shared = ptx::shared_address(shared_raw), full = shared + kBarriers,
              empty = full + kStages * 8;
    const int warpgroup = __shfl_sync(kFullWarp, threadIdx.x / 128, 0);
    const int warp = __shfl_sync(kFullWarp, (threadIdx.x / 32) & 3, 0), lane = threadIdx.x & 31;

    if (threadIdx.x == 0) {
      if (shared & 1023) __trap();  // the swizzle is a function of the address
      ptx::tma_prefetch(map_a);
      ptx::tma_prefetch(map_b);
      if (Epilogue::kPanels) ptx::tma_prefetch(map_d);
      for (int s = 0; s < kStages; s++) {
        ptx::mbarrier_init(full + 8 * s, 1);
        ptx::mbarrier_init(empty + 8 * s, (kPingPong ? 4 : 8) * kCluster);
      }
      ptx::mbarrier_init_fence();
    }
    ptx::cluster_sync();

    const int count = p.count ? __ldg(p.count) : -1;
    const int rows = count >= 0 && !p.count_is_k ? count : p.m;
    const int depth = count >= 0 && p.count_is_k ? count : p.k;
    const Tiles tiles(p, rows);
    const int k_blocks = tiles.share(ceil_div(depth, kDepth));
    const Turns turns(p, tiles.tiles(), ptx::cluster_index(), ptx::cluster_count());
    if (warpgroup == 0) {
      ptx::registers_shrink<kProducerRegisters>();
      if (warp == 0 && ptx::elect_one())
        produce(map_a, map_b, tiles, turns, shared, full, empty, k_blocks);
    } else {
      ptx::registers_grow<kConsumerRegisters>();
      consume(map_d, p, tiles, turns, shared, full, empty, rows, k_blocks, warpgroup - 1, warp,
              lane);
    }
    __syncwarp();
    ptx::wait_for_grid_ahead();
    ptx::cluster_sync();
  }
};

}  // namespace logitless
