// LOST (a tie): sums of exponentials against a fixed reference per row, the target's logit, instead of a maximum a class block.
// H200, N = 8192, of E W^T by cuBLAS, interleaved / sustained:
//                        D 4096, V 128256   D 2304, V 256000   D 1024, V 65536
//   this, p128x192       1.009 / 0.976      0.968 / 0.946      0.894 / 0.932
//   maximum, p128x192    1.007 / 0.961      0.959 / 0.963      0.885 / 0.924
//   this, c256x192       1.050 / 0.969      1.028 / 0.954      1.020 / 0.955
//   maximum, c256x192    1.069 / 0.989      1.065 / 0.949      1.055 / 1.009
// Why: as fast, but it needs the target's logit first, and a repair of the rows that lie 88 nats from it. Its storing form lives on in
// cuda/include/logitless/epilogue/store_exp.cuh, where one factor a row is the point.
// rest.cuh - sums of exponentials against a fixed reference per row, with or without storing the exponentials.
//
// The reference is the row's target logit (GemmParams.ref), known before the product from a row-times-row dot: no running
// maximum, no rescaling, no target search. With t = z - ref, per row and class block, over the classes other than the target:
//   plane 0   S = sum e^t
//   plane 1   T = sum t e^t                   kEntropy; t e^t = 0 where e^t is 0, also for t = -inf
//   D         X = half(e^t), 0 at the target   kStore; entries below 2^(shift - 126) are stored as 0 (the sums keep them)
// A row that counts for nothing has ref = +inf: every exponential is 0 without a branch. S leaves the range of a float when the
// rest lies about 88 nats above or below the target; the finish kernel sees that and lists the row for a repair (online.cuh).
//
// Two bodies, one chosen per warp and tile: the careful one runs where a target lies in the tile, or in the last, ragged tile.
#pragma once
#include "logitless/epilogue/maps.cuh"

namespace logitless {

template <class Map, bool kEntropy, bool kStore, int kStorePanels>
struct RestEpilogue {
  static constexpr int kPanels = kStore ? kStorePanels : 0;
  static constexpr bool kGated = kStore;  // a repair stores the rows again
  static constexpr bool kRolled = false;

  template <int kColumns, bool kCareful, class Store>
  static __device__ __forceinline__ void body(float (&acc)[kColumns / 2], const Band& band, Store& store, const Exceptions& ex) {
    const float factor = kLog2e * Map::factor(band.p);
    const float offset[2] = {-kLog2e * band.scalar(band.p.ref, 0, infinity()), -kLog2e * band.scalar(band.p.ref, 1, infinity())};
    const float smallest = kStore && band.p.shift > 0.f ? ptx::exp2(band.p.shift - 126.f) : 0.f;
    float sum[2] = {0.f, 0.f}, moment[2] = {0.f, 0.f};
#pragma unroll
    for (int panel = 0; panel < kColumns / 64; panel++) {
      if (kStore) store.open(band.column + 64 * panel);
#pragma unroll
      for (int q = 0; q < 4; q++) {
        float v[8];
#pragma unroll
        for (int i = 0; i < 8; i++) {
          const int at = 32 * panel + 8 * q + i, half = half_of(at);
          const float t = fmaf(acc[at], factor, offset[half]);
          float e = ptx::exp2(t);
          if (kCareful) e = ex.is_rest(at) ? e : 0.f;
          sum[half] += e;
          if (kEntropy) moment[half] = fmaf(e, fmaxf(t, -200.f), moment[half]);
          if (kStore) v[i] = e >= smallest ? e : 0.f;
        }
        if (kStore) store.put(q, v);
      }
      if (kStore) store.template close<false>();
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
      band.emit(0, half, ptx::quad_sum(sum[half]));
      if (kEntropy) band.emit(1, half, kLn2 * ptx::quad_sum(moment[half]));
    }
  }

  template <int kColumns, class Store>
  static __device__ __forceinline__ void run(float (&acc)[kColumns / 2], const Band& band, Store& store) {
    Map::template apply<kColumns>(acc, band);
    const Exceptions ex = Exceptions::find<kColumns>(band);
    if (ex.any) body<kColumns, true>(acc, band, store, ex);
    else body<kColumns, false>(acc, band, store, ex);
  }
};

}  // namespace logitless
