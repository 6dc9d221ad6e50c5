// store_exp.cuh - the forward of `memory="fast"`: exponentials against a fixed reference per row,
// stored and summed.
//
// The reference is the row's target logit (GemmParams.ref), known before the product from a
// row-times-row dot: what is stored needs no rescaling later, only a factor a row. With t = z -
// ref, over the classes other than the target:
//   D         X = half(e^t dz/dx), 0 at the target; e^t below 2^(shift - 126) is stored as 0 (the
//             sums keep it). dz/dx is 1 but under a softcap
//   plane 0   sum of e^t, per row and class block
//   plane 1   sum of t e^t (kMoment: the entropy's; without a softcap, whose slope hides t in X)
// A row that counts for nothing has ref = +inf: every exponential is 0 without a branch. The sum
// leaves the range of a float where the rest lies about 88 nats above or below the target; whoever
// folds the blocks sees that, lists the 256-row block (GemmParams.gate) and launches this kernel
// again with another reference for the row.
//
// Two bodies, one chosen per warp and tile: the careful one runs where a target lies in the tile,
// or in the last, ragged tile.
#pragma once
#include "logitless/epilogue/maps.cuh"

namespace logitless {

template <class Map, bool kMoment, int kStorePanels>
struct StoreExpEpilogue {
  static constexpr int kPanels = kStorePanels;
  static constexpr bool kGated = true;
  static constexpr bool kSliced = false;
  static constexpr bool kRolled = false;
  static constexpr bool kAhead = false;

  template <int kColumns, bool kCareful, class Store>
  static __device__ __forceinline__ void body(float (&acc)[kColumns / 2], const Band& band,
                                              Store& store, const Exceptions& ex) {
    const float factor = kLog2e * Map::factor(band.p);
    const float offset[2] = {-kLog2e * band.scalar(band.p.ref, 0, infinity()),
                             -kLog2e * band.scalar(band.p.ref, 1, infinity())};
    const float smallest = band.p.shift > 0.f ? ptx::exp2(band.p.shift - 126.f) : 0.f;
    const float inverse = Map::kCapped && band.p.softcap != 0.f ? 1.f / band.p.softcap : 0.f;
    float sum[2] = {0.f, 0.f}, moment[2] = {0.f, 0.f};
#pragma unroll
    for (int panel = 0; panel < kColumns / 64; panel++) {
      store.open(band.column + 64 * panel);
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
          if (kMoment) moment[half] = fmaf(e, fmaxf(t, -200.f), moment[half]);
          const float x = Map::kCapped ? e * Map::slope(acc[at], inverse) : e;
          v[i] = e >= smallest ? x : 0.f;
        }
        store.put(q, v);
      }
      store.template close<false>();
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
      band.emit(0, half, ptx::quad_sum(sum[half]));
      if (kMoment) band.emit(1, half, kLn2 * ptx::quad_sum(moment[half]));
    }
  }

  template <int kColumns, class Store>
  static __device__ __forceinline__ void run(float (&acc)[kColumns / 2], const Band& band,
                                             Store& store) {
    Map::template apply<kColumns>(acc, band);
    const Exceptions ex = Exceptions::find<kColumns>(band);
    if (ex.any) body<kColumns, true>(acc, band, store, ex);
    else body<kColumns, false>(acc, band, store, ex);
  }
};

}  // namespace logitless
