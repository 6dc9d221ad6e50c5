// store.cuh - accumulators that are the result: dW, dE, logits.
#pragma once
#include "logitless/epilogue/maps.cuh"
#include "logitless/epilogue/targets.cuh"

namespace logitless {

// D = half(alpha * row factor * acc + the targets' part). Where a row's targets come with it and
// not in lists, rows may go to places of their own.
template <class Targets, int kStorePanels>
struct HalfStoreEpilogue {
  static constexpr int kPanels = kStorePanels;
  static constexpr bool kGated = false;
  static constexpr bool kSliced = false;
  static constexpr bool kRolled = false;
  static constexpr bool kAhead = Targets::kAhead;

  // While the products of a tile run.
  template <int kColumns>
  static __device__ __forceinline__ void ahead(const Band& band) {
    Targets::template ahead<kColumns>(band);
  }

  template <int kColumns, class Store>
  static __device__ __forceinline__ void run(float (&acc)[kColumns / 2], const Band& band,
                                             Store& store) {
    const GemmParams& p = band.p;
    const float alpha = p.alpha ? __ldg(p.alpha) : 1.f;
    float a[2];
#pragma unroll
    for (int half = 0; half < 2; half++)
      a[half] = p.coef ? alpha * band.coefficient(0, half) : alpha;
#pragma unroll
    for (int i = 0; i < kColumns / 2; i++) acc[i] *= a[half_of(i)];
    Targets::template add<typename Store::Half, kColumns>(acc, band);
#pragma unroll
    for (int panel = 0; panel < kColumns / 64; panel++) {
      store.open(band.column + 64 * panel);
#pragma unroll
      for (int q = 0; q < 4; q++) {
        float v[8];
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] = acc[32 * panel + 8 * q + i];
        store.put(q, v);
      }
      if constexpr (Targets::kPlaces) {
        if (p.onehot_rows) {
          store.close_to(static_cast<u16*>(p.d), p.ldd, p.onehot_rows, band.rows, p.n);
          continue;
        }
      }
      store.template close<false>();
    }
  }
};

// D = alpha * row factor * acc + the targets' part in float, or D += it (kMapped: D = z, the logits
// after the maps).
template <class Map, bool kMapped, class Targets, int kStorePanels>
struct FloatStoreEpilogue {
  static constexpr int kPanels = kStorePanels;
  static constexpr bool kGated = !kMapped;  // the frozen head's repair: de_f32
  static constexpr bool kSliced = !kMapped && !Targets::kAhead;  // de_f32
  static constexpr bool kRolled = false;
  static constexpr bool kAhead = Targets::kAhead;

  // While the products of a tile run.
  template <int kColumns>
  static __device__ __forceinline__ void ahead(const Band& band) {
    Targets::template ahead<kColumns>(band);
  }

  template <int kColumns, class Store>
  static __device__ __forceinline__ void run(float (&acc)[kColumns / 2], const Band& band,
                                             Store& store) {
    const GemmParams& p = band.p;
    if (kMapped) Map::template apply<kColumns, true>(acc, band);
    const float alpha = kMapped ? Map::factor(p) : p.alpha ? __ldg(p.alpha) : 1.f;
    float a[2] = {alpha, alpha};
    if (kSliced && p.coef) {
#pragma unroll
      for (int half = 0; half < 2; half++) a[half] *= band.coefficient(0, half);
    }
#pragma unroll
    for (int i = 0; i < kColumns / 2; i++) acc[i] *= a[half_of(i)];
    Targets::template add<typename Store::Half, kColumns>(acc, band);
#pragma unroll
    for (int panel = 0; panel < kColumns / 32; panel++) {
      store.open(band.column + 32 * panel);
#pragma unroll
      for (int j = 0; j < 4; j++) {
        float v[4];
#pragma unroll
        for (int i = 0; i < 4; i++) v[i] = acc[16 * panel + 4 * j + i];
        store.put_float(j, v);
      }
      if (p.accumulate) store.template close<true>();
      else store.template close<false>();
    }
  }
};

}  // namespace logitless
